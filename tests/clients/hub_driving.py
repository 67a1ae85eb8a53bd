"""What a user does with `huggingface_hub`, of any version: prints as JSON what it found. Needs nothing of this project.

python hub_driving.py MODEL_REPO DATASET_REPO BIG_REPO FOLDER
"""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.utils import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError


def read(folder: str) -> dict[str, str]:
    """Returns the sha256 of each file by its path."""
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def failing(call: Callable[[], Any]) -> str:
    """Returns which of the Hub's errors a call ends in."""
    try:
        call()
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        return next(
            name for name in ("RepositoryNotFoundError", "RevisionNotFoundError", "EntryNotFoundError") if name in kinds
        )
    return "none"


def keep_at_it(repo: str, path: str, folder: Path) -> int:
    """Returns how many calls it took until a file was there."""
    for count in range(1, 6):
        try:
            hf_hub_download(repo, path, cache_dir=folder)
        except Exception as error:  # whichever the HTTP library of this version raises
            sys.stderr.write(f"call {count}: {error!r}\n")
        else:
            return count
    raise SystemExit("the file never came")


def push(api: HfApi, repo: str, source: str, kind: str) -> str:
    """Returns the commit of a folder that was pushed."""
    api.create_repo(repo, repo_type=kind, exist_ok=True)
    api.create_repo(repo, repo_type=kind, exist_ok=True)
    api.upload_folder(repo_id=repo, repo_type=kind, folder_path=source)
    return api.repo_info(repo, repo_type=kind).sha


def main(model: str, dataset: str, big: str, place: str) -> dict[str, Any]:
    """Returns what was found."""
    api, folder = HfApi(), Path(place)
    info = api.model_info(model, files_metadata=True)
    branches = {branch.name: branch.target_commit for branch in api.list_repo_refs(model).branches}
    owner = api.whoami()["name"]
    snapshot = snapshot_download(model, cache_dir=folder)
    rows = snapshot_download(dataset, repo_type="dataset", cache_dir=folder)
    found = {
        "version": huggingface_hub.__version__,
        "verified": None,
        "whoami": owner,
        "sha": info.sha,
        "siblings": sorted([sibling.rfilename, sibling.size] for sibling in info.siblings),
        "branches": branches,
        "files": sorted(api.list_repo_files(model)),
        "folder": [entry.path for entry in api.list_repo_tree(model, "1_Pooling")],
        "paths": [entry.path for entry in api.get_paths_info(model, ["config.json", "nothing"])],
        "tensors": sorted(api.get_safetensors_metadata(model).weight_map),
        "snapshot": read(snapshot),
        "onnx": read(snapshot_download(model, revision="onnx-int8", cache_dir=folder)),
        "by commit": read(snapshot_download(model, revision=branches["onnx-int8"], cache_dir=folder / "other")),
        "dataset": sorted(read(rows)),
        "pushed": push(api, f"{owner}/pushed", snapshot, "model"),
        "pushed rows": push(api, f"{owner}/pushed-rows", rows, "dataset"),
        "models": [one.id for one in api.list_models(author=owner, limit=3)],
        "found": [one.id for one in api.list_models(search="BIG", full=True)],
        "data sets": [one.id for one in api.list_datasets()],
        "commits": [commit.commit_id for commit in api.list_repo_commits(f"{owner}/pushed", formatted=True)],
        "calls": keep_at_it(big, "extra.safetensors", folder / "big"),
        "no repo": failing(lambda: api.model_info(f"{model}x")),
        "no revision": failing(lambda: api.model_info(model, revision="v9")),
        "no file": failing(lambda: hf_hub_download(model, "nothing.bin", cache_dir=folder)),
        "no key": failing(lambda: HfApi(token=False).model_info(model)),
    }
    if found["version"] >= "1":  # 0.36 cannot do it
        checked = api.verify_repo_checksums(model, cache_dir=folder)
        found["verified"] = [checked.checked_count, len(checked.mismatches), len(checked.missing_paths)]
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(*sys.argv[1:])) + "\n")
