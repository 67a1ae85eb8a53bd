"""From upload to download with `curl` alone, against a real worker."""

import json
import subprocess
from pathlib import Path

from tests.e2e.stack import Stack, until


def test_walk_with_curl_alone(stack: Stack, pico_files: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    stack.start_worker()
    base = f"http://127.0.0.1:{stack.port}/v1"
    key = stack.http.headers["authorization"]

    def curl(path: str, *options: str) -> bytes:
        command = ["curl", "-sSf", "--noproxy", "*", "-H", f"Authorization: {key}", *options, base + path]
        return subprocess.run(command, capture_output=True, check=True).stdout

    model, splits = pico_files
    files = [part for path in sorted(model.iterdir()) for part in ("-F", f"files=@{path}")]
    curl("/models", "-F", "name=walker", *files)
    curl("/datasets", "-F", "name=walk", *[part for name, path in splits.items() for part in ("-F", f"{name}=@{path}")])
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        "teacher: {model: walker}\n"
        "student: {kind: teacher_layers, keep: [1]}\n"
        "data: walk\n"
        "stages: [{kind: distill, epochs: 1}, {kind: export, formats: [{kind: onnx}]}]\n"
    )
    job = json.loads(curl("/jobs", "--data-binary", f"@{spec}"))["id"]
    until(lambda: json.loads(curl(f"/jobs/{job}"))["state"] == "succeeded")
    (tmp_path / "onnx.tar").write_bytes(curl(f"/jobs/{job}/artifacts/onnx/download"))
    subprocess.run(["tar", "xf", "onnx.tar"], cwd=tmp_path, check=True)

    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    feeds = {node.name: np.ones((1, 4), dtype=np.int64) for node in session.get_inputs()}
    [logits_BC] = session.run(None, feeds)
    assert logits_BC.shape == (1, len(json.loads((tmp_path / "onnx" / "labels.json").read_text())))
