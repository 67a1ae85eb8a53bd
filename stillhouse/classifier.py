"""A downloaded ONNX model, run as a user would run it: onnxruntime and tokenizers, nothing else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from stillhouse.errors import InvalidInput

DEFAULT_MAX_TOKENS = 512
TAGS = "token_classification"
Values = NDArray[np.float64]
Opened = TypeVar("Opened")


class Head(NamedTuple):
    """What a model gives for one task: its labels, where their logits stand, and of what kind it is."""

    labels: list[str]
    columns: list[int]
    kind: str | None

    @property
    def gives(self) -> str:
        """What the numbers of its labels are."""
        return "value" if self.kind == "regression" else "probability"

    def read(self, logits_C: Values) -> list[tuple[str, float]]:
        """Returns every label with its number, the largest first."""
        found_C = self._numbers(logits_C[self.columns])
        return [(self.labels[index], float(found_C[index])) for index in np.argsort(-found_C)]

    def _numbers(self, logits_C: Values) -> Values:
        if self.kind == "regression":
            return logits_C
        if self.kind == "multi_label_classification":
            likelier_C = 1 / (1 + np.exp(-np.abs(logits_C)))
            return np.where(logits_C < 0, 1 - likelier_C, likelier_C)
        exponents_C = np.exp(logits_C - logits_C.max())
        probabilities_C: Values = exponents_C / exponents_C.sum()
        return probabilities_C


class Classifier:
    """The model of a folder with `model.onnx`, `tokenizer.json` and `labels.json`.

    Attributes:
        heads: What it gives for each of its tasks, by name; of a model of one task the name is empty.
    """

    def __init__(self, folder: str | Path) -> None:
        import onnxruntime

        folder = Path(folder)
        if (folder / "model.onnx").is_file() and (folder / "generation_config.json").is_file():
            raise InvalidInput(
                f"{folder} holds a language model, which gives no labels. Have it write with onnxruntime, or with "
                "optimum's ORTModelForCausalLM."
            )
        missing = [n for n in ("model.onnx", "tokenizer.json", "labels.json") if not (folder / n).is_file()]
        if missing:
            raise InvalidInput(f"{folder} holds no {missing[0]}. Name a downloaded 'onnx' or 'onnx_int8' folder.")
        path = folder / "config.json"
        config = _opened(path, _read_json) if path.is_file() else {}
        labels = _opened(folder / "labels.json", _read_json)
        self.heads = {
            task: Head([labels[place].removeprefix(f"{task}/" * bool(task)) for place in found], found, kind)
            for task, kind in config.get("tasks", {"": config.get("problem_type")}).items()
            if kind != TAGS
            and (found := [n for n, label in enumerate(labels) if label.startswith(f"{task}/" * bool(task))])
        }
        self._tokenizer = _opened(folder / "tokenizer.json", Tokenizer.from_file)
        self._tokenizer.enable_truncation(_max_tokens(folder))
        self._tokenizer.no_padding()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self._session = _opened(
            folder / "model.onnx",
            lambda path: onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]),
        )
        self._reads_words = len(self._session.get_outputs()[0].shape) != 2
        if not self.heads or (self._reads_words and not config.get("tasks")):
            raise InvalidInput(f"{folder} holds a model that gives each word a tag, not a classifier of whole texts.")

    def classify(self, text: str, pair: str | None = None, task: str | None = None) -> list[tuple[str, float]]:
        """Returns every label with its probability, the most probable first; `pair` is a second text.

        Of a model that gives several labels, each probability is of one alone; a regression's number is given as it is.
        A model of several tasks answers for one of them.
        """
        chosen = self.choose(task)
        if len(chosen) > 1:
            raise InvalidInput(f"The model has several tasks; name one of {', '.join(chosen)}.")
        return self.classify_all(text, pair)[next(iter(chosen))]

    def choose(self, task: str | None) -> dict[str, Head]:
        """Returns the head of a task, or of each. Raises InvalidInput for a task that the model does not have."""
        if task is None:
            return self.heads
        if task not in self.heads:
            known = ", ".join(self.heads) if any(self.heads) else "none, as it is of one task"
            raise InvalidInput(f"The model has no task '{task}' of whole texts; known: {known}.")
        return {task: self.heads[task]}

    def classify_all(self, text: str, pair: str | None = None) -> dict[str, list[tuple[str, float]]]:
        """Returns what `classify` does for each task of the model, by its name."""
        encoded = self._tokenizer.encode(text, pair)
        columns = {
            "input_ids": encoded.ids,
            "attention_mask": encoded.attention_mask,
            "token_type_ids": encoded.type_ids,
        }
        inputs = {node.name: np.array([columns[node.name]], dtype=np.int64) for node in self._session.get_inputs()}
        logits = self._session.run(["logits"], inputs)[0][0].astype(np.float64)
        logits_C = logits[0] if self._reads_words else logits  # those of a text are its first token's
        return {task: head.read(logits_C) for task, head in self.heads.items()}


def _read_json(path: str) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def _opened(path: Path, read: Callable[[str], Opened]) -> Opened:
    """Returns what is read of a file. Raises InvalidInput, whatever the library says of a damaged one."""
    try:
        return read(str(path))
    except Exception as error:
        raise InvalidInput(f"{path} cannot be read: {error}. Download it again.") from error


def _max_tokens(folder: Path) -> int:
    """Returns the longest input: what the tokenizer's own configuration says, within what the model can take."""
    limits = []
    for name, key in (("tokenizer_config.json", "model_max_length"), ("config.json", "max_position_embeddings")):
        path = folder / name
        value = json.loads(path.read_text(encoding="utf-8")).get(key) if path.is_file() else None
        if isinstance(value, int) and value > 0:
            limits.append(value)
    return min(limits, default=DEFAULT_MAX_TOKENS)
