"""Checks the files of a model folder by content: only data that cannot run code is accepted."""

import json
import pickletools
import threading
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from core.errors import MAX_DETAILS, ModelInvalid, ModelLacking
from core.models.facts import ModelFacts, read_facts
from core.models.safetensors_header import Tensor, read_metadata, read_tensors
from core.storage import is_safe_path

TEXT_SUFFIXES = {".txt", ".md", ".jinja", ".gitattributes"}
ALLOWED_SUFFIXES = {".safetensors", ".json", ".model"} | TEXT_SUFFIXES
TOKENIZER_FILES = {
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
GRIDS = "grids.safetensors"  # beside weights that the stage `quantize` rounded
MAX_JSON_BYTES = 64 * 1024 * 1024
MAX_CONFIG_BYTES = 4 * 1024 * 1024
MAX_TEXT_BYTES = 64 * 1024 * 1024
SNIFF_BYTES = 64 * 1024
CODE_KEYS = ("auto_map", "trust_remote_code", "custom_pipelines")
MAGIC = {
    b"PK\x03\x04": "a zip archive, as torch.save writes it, which holds pickled code",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy file, which may hold pickled code",
    b"GGUF": "a GGUF file",
    b"\x1f\x8b": "a gzip archive",
    b"\x7fELF": "a program",
}
PARSING = threading.Lock()  # a JSON file may take 25 times its bytes in memory: one of all uploads at a time
CODE_OPCODES = {"GLOBAL", "STACK_GLOBAL", "INST"}
CALL_OPCODES = {"REDUCE", "BUILD", "NEWOBJ", "NEWOBJ_EX", "OBJ", "INST"}


def is_allowed_name(path: str) -> bool:
    """Tells whether a file of that name may be part of a model."""
    name = path.rsplit("/", 1)[-1]
    return Path(name).suffix.lower() in ALLOWED_SUFFIXES or name in TEXT_SUFFIXES


def check_path(path: str) -> str | None:
    """Returns what is wrong with a file's path, or None."""
    if not is_safe_path(path):
        return (
            "the path must be relative, without '..', backslashes or control characters; send paths inside the folder"
        )
    if not is_allowed_name(path):
        return f"files of this kind are not accepted; allowed: {', '.join(sorted(ALLOWED_SUFFIXES))}"
    return None


def check_model(files: Mapping[str, Path]) -> ModelFacts:
    """Returns the facts of a model folder, given as path -> location.

    Raises:
        ModelInvalid: There are files that are no good; with every problem.
        ModelLacking: All files are good, and some are missing.
    """
    details: list[dict[str, Any]] = []
    tensors: dict[str, list[Tensor]] = {}
    config: dict[str, Any] = {}
    grid_bits: list[int] = []
    folders = {str(parent) for path in files for parent in PurePosixPath(path).parents}
    for path, location in files.items():
        try:
            problem = check_path(path) or sniff(location)
            if path in folders:
                problem = "another file lies in a folder of this name; rename one of them"
            if problem is not None:
                raise ValueError(problem)
            found = _check_content(path, location)
            grid_bits = read_grid_bits(location) if path == GRIDS else grid_bits
        except ValueError as error:
            details.append({"file": path, "message": str(error)})
            continue
        if path == "config.json":
            config = found
        elif path.endswith(".safetensors"):
            tensors[path] = found
    lacking = _check_whole(files, details, tensors)
    raise_details(details + lacking if details else [])
    if lacking:
        raise _invalid(lacking, ModelLacking)
    try:
        weights = [tensor for shard in _weights(tensors) for tensor in shard]
        return read_facts(config, tensors=weights, grid_bits=grid_bits)
    except (ValueError, TypeError) as error:
        raise _invalid([{"file": "config.json", "message": _first_line(error)}]) from error


def read_grid_bits(location: Path) -> list[int]:
    """Returns the bits of the grids in a file beside a model, each number once. Raises ValueError if it tells none."""
    try:
        found = sorted({wanted["bits"] for wanted in json.loads(read_metadata(location)["wanted"]).values()})
    except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError):
        found = []
    if not found or not all(type(bits) is int for bits in found):
        raise ValueError("the file does not tell the bits of grids; leave it out, or upload it as `quantize` wrote it")
    return found


def raise_details(details: list[dict[str, Any]]) -> None:
    """Raises ModelInvalid for a list of `{file, message}` that is not empty."""
    if details:
        raise _invalid(details)


def _invalid(details: list[dict[str, Any]], kind: type[ModelInvalid] = ModelInvalid) -> ModelInvalid:
    first = details[0]
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return kind(f"{first['file']}: {first['message']}{more}", param=first["file"], details=details[:MAX_DETAILS])


def sniff(location: Path) -> str | None:
    """Returns why the bytes are dangerous whatever the file's name says, or None."""
    with location.open("rb") as source:
        head = source.read(SNIFF_BYTES)
    known = next((name for magic, name in MAGIC.items() if head.startswith(magic)), None)
    if known is None and _is_pickle(head):
        known = "a Python pickle, which runs code when it is loaded"
    return (
        f"the content is {known}; convert the weights to safetensors (`save_pretrained` writes it)" if known else None
    )


def _is_pickle(head: bytes) -> bool:
    is_length = head[3:9] == b"\0\0\0\0\0{"  # with which safetensors begin; any bytes may be a length's first ones
    if len(head) >= 2 and head[0] == 0x80 and 2 <= head[1] <= 5 and not is_length:  # PROTO: every modern pickle's first
        return True
    names: set[str] = set()
    try:
        for opcode, _, _ in pickletools.genops(head):
            names.add(opcode.name)
    except Exception:  # genops raises many types on bytes that are no pickle
        return False
    return bool(names & CODE_OPCODES and names & CALL_OPCODES)


def _check_content(path: str, location: Path) -> Any:
    suffix = Path(path).suffix.lower()
    if suffix == ".safetensors":
        return read_tensors(location)
    if suffix == ".json":
        with PARSING:
            return _check_json(path, location)
    if suffix == ".model":
        return _check_sentencepiece(location)
    return _check_text(location)


def _check_json(path: str, location: Path) -> Any:
    most = MAX_CONFIG_BYTES if path == "config.json" else MAX_JSON_BYTES
    if location.stat().st_size > most:
        raise ValueError(f"a {path if path == 'config.json' else 'JSON file'} has at most {most:,} bytes")
    try:
        data = json.loads(location.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no valid JSON: {_first_line(error)}") from error
    if path.endswith("config.json"):
        key = find_code_key(data)
        if key:
            raise ValueError(f"'{key}' would run code from the model's folder, which is never done; remove it")
    if path in {"config.json", INDEX} and not isinstance(data, dict):
        raise ValueError("the file must hold a JSON object")
    return data if path == "config.json" else None


def find_code_key(data: Any) -> str | None:
    """Returns the first key at any depth that asks for code from the model's folder, or None."""
    todo = [data]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            found = next((key for key in CODE_KEYS if value.get(key)), None)
            if found or "auto_map" in value:
                return found or "auto_map"
            todo.extend(value.values())
        elif isinstance(value, list):
            todo.extend(value)
    return None


def _check_text(location: Path) -> None:
    if location.stat().st_size > MAX_TEXT_BYTES:
        raise ValueError(f"a text file has at most {MAX_TEXT_BYTES:,} bytes")
    if b"\x00" in location.read_bytes():
        raise ValueError("the file is no text")


def _check_sentencepiece(location: Path) -> None:
    if location.stat().st_size > MAX_TEXT_BYTES:
        raise ValueError(f"a tokenizer model has at most {MAX_TEXT_BYTES:,} bytes")
    data = location.read_bytes()
    position, pieces = 0, 0
    while position < len(data):
        tag, position = _varint(data, position)
        if tag & 7 != 2:  # every field of a sentencepiece ModelProto is a message: wire type 2
            raise ValueError("the file is no sentencepiece model")
        length, position = _varint(data, position)
        position += length
        pieces += tag >> 3 == 1
    if position != len(data) or not pieces:
        raise ValueError("the file is no sentencepiece model, or is cut off")


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        if position >= len(data):
            break
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("the file is no sentencepiece model, or is cut off")


def _check_whole(
    files: Mapping[str, Path], details: list[dict[str, Any]], tensors: dict[str, list[Tensor]]
) -> list[dict[str, Any]]:
    known_bad = {detail["file"] for detail in details}
    missing = []
    if "config.json" not in files:
        missing.append({"file": "config.json", "message": "the file is missing; upload the whole folder of the model"})
    if not TOKENIZER_FILES & set(files):
        names = ", ".join(sorted(TOKENIZER_FILES))
        missing.append({"file": "tokenizer.json", "message": f"no tokenizer; one of these is needed: {names}"})
    if INDEX in files and INDEX not in known_bad:
        missing += _check_index(json.loads(files[INDEX].read_bytes().decode("utf-8-sig")), files, tensors)
    elif WEIGHTS not in files and INDEX not in files:
        missing.append({"file": WEIGHTS, "message": "no weights; save the model as safetensors and upload that file"})
    return missing


def _check_index(
    index: dict[str, Any], files: Mapping[str, Path], tensors: dict[str, list[Tensor]]
) -> list[dict[str, Any]]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        return [{"file": INDEX, "message": "'weight_map' must map tensor names to files"}]
    problems = [
        {"file": name, "message": f"the file is missing, and {INDEX} names it"}
        for name in sorted(set(weight_map.values()))
        if name not in files
    ]
    present = {(tensor.name, name) for name, shard in tensors.items() for tensor in shard}
    lost = [(name, file) for name, file in weight_map.items() if file in tensors and (name, file) not in present]
    if lost:
        problems.append({"file": lost[0][1], "message": f"tensor '{lost[0][0][:80]}' is missing, and {INDEX} names it"})
    return problems


def _weights(tensors: dict[str, list[Tensor]]) -> list[list[Tensor]]:
    whole = tensors.get(WEIGHTS)
    if whole is not None:
        return [whole]
    return [shard for path, shard in tensors.items() if "/" not in path and path != GRIDS]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
