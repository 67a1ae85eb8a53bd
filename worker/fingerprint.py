"""What a stage's result depends on, as one key: its order, the bytes of its inputs, and the environment."""

import hashlib
import json
import os
import platform
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from core.storage import ManifestFile, manifest_digest

ROOT = Path(__file__).parents[1]
SOURCES = ("core", "worker/engine", "worker/kernels", "worker/methods")
LIBRARIES = (
    "compressed_tensors",
    "executorch",
    "gguf",
    "matplotlib",
    "nncf",
    "numpy",
    "onnx",
    "onnxruntime",
    "openvino",
    "peft",
    "safetensors",
    "tokenizers",
    "torch",
    "torchao",
    "transformers",
)
GPU_INFORMATION = Path("/proc/driver/nvidia/gpus")


def stage_key(order: dict[str, Any], roles: dict[str, list[ManifestFile]], **computed: int) -> str:
    """Returns the sha256 that two runs share only if they make the same bytes.

    Args:
        order: What the child is told, without its folders.
        roles: The files that it is given, by role; `data` and `history` are roles, too.
        computed: How many threads and processes compute, and in which way; sums in another order differ in their last
            bits.
    """
    inputs = {role: manifest_digest(files) for role, files in roles.items()}
    document = {"order": order, "inputs": inputs, **computed, "environment": environment()}
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@cache
def environment() -> dict[str, Any]:
    """Returns what of this machine decides the bytes: our source, the libraries, the kind of processor and GPU."""
    return {
        "source": _source_digest(),
        "python": sys.version.split()[0],
        "libraries": {name: _version(name) for name in LIBRARIES},
        "processor": _processor(),
        "visible_gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "gpus": sorted({_gpu_model(path) for path in GPU_INFORMATION.glob("*/information")}),
    }


def _source_digest() -> str:
    whole = hashlib.sha256()
    for source in SOURCES:
        path = ROOT / source
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            whole.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return whole.hexdigest()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _processor() -> str:
    """Returns machine, model and instruction sets: the libraries choose their kernels by them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    except OSError:
        lines = []
    wanted = ("vendor_id", "model name", "cpu family", "model\t", "flags", "Features")
    text = platform.machine() + "".join(line for line in lines if line.startswith(wanted))
    return hashlib.sha256(text.encode()).hexdigest()


def _gpu_model(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("Model")), "")
