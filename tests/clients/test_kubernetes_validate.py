"""The manifests are what Kubernetes has, by its own schemas."""

from pathlib import Path

import pytest

from tests.clients.conftest import ROOT, python_of, run

MANIFESTS = sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml"))
OWN = [path for path in MANIFESTS if path.stem not in {"kustomization", "scaling"}]  # those are not Kubernetes' own


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.stem)
def test_a_manifest_is_valid(path: Path, tmp_path: Path) -> None:
    command = python_of("kubernetes-validate==1.37.0").with_name("kubernetes-validate")
    run([command, "--strict", "--quiet", path])
    broken = tmp_path / path.name
    broken.write_text(path.read_text().replace("metadata:", "metadatum:", 1))
    with pytest.raises(AssertionError):
        run([command, "--strict", "--quiet", broken])
