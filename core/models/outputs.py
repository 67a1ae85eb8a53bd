"""Artifacts of jobs, where a spec names one as a model."""

import json
from collections.abc import Iterable

from core.errors import ModelInvalid
from core.models.checking import GRIDS, read_grid_bits
from core.models.facts import ModelFacts, read_facts
from core.models.safetensors_header import read_tensors
from core.storage import ManifestFile, get_store


def read_output(files: Iterable[ManifestFile]) -> ModelFacts:
    """Returns the facts of the model that an artifact holds. Raises ModelInvalid where it holds none as a whole."""
    by_path = {file.path: get_store().get_path(file.sha256) for file in files}
    weights = [path for name, path in by_path.items() if name.endswith(".safetensors") and name != GRIDS]
    if "config.json" not in by_path or not weights:
        raise ModelInvalid(_say_lacking(set(by_path)))
    try:
        tensors = [tensor for path in weights for tensor in read_tensors(path)]
        grid_bits = read_grid_bits(by_path[GRIDS]) if GRIDS in by_path else []
        return read_facts(json.loads(by_path["config.json"].read_bytes()), tensors=tensors, grid_bits=grid_bits)
    except ValueError as error:
        raise ModelInvalid(f"this artifact cannot be used as a model: {error}") from error


def _say_lacking(paths: set[str]) -> str:
    """Returns why an artifact of these files is no model to start from, and what to do."""
    folders = {path.partition("/")[0] for path in paths if "/" in path}
    if "adapters/adapter_config.json" in paths:
        return (
            "this artifact is a model with a prompt beside it, and no job starts from that; name the model that the "
            "prompt was learned for, or train an adapter that becomes part of it, as 'lora'"
        )
    if folders & {"adapters", "branches"}:
        return (
            "this artifact is what tasks share, and what each has of its own beside it; have a stage 'export' write "
            "'single_tasks', and name the folder of a task in that, or train with task.shared 'all'"
        )
    models = sorted(folder for folder in folders if f"{folder}/config.json" in paths)
    if models:
        shown = ", ".join(f"'{folder}'" for folder in models[:10])
        return f"this artifact holds several models, in folders ({shown}); name one as 'job:<id>/<artifact>/<folder>'"
    return "this artifact holds no config.json with safetensors weights; name the artifact 'student'"
