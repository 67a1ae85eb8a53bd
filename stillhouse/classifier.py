"""A downloaded ONNX model, run as a user would run it: onnxruntime and tokenizers, nothing else."""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from stillhouse.errors import InvalidInput

DEFAULT_MAX_TOKENS = 512
Values = NDArray[np.float64]


class Classifier:
    """The model of a folder with `model.onnx`, `tokenizer.json` and `labels.json`."""

    def __init__(self, folder: str | Path) -> None:
        import onnxruntime

        folder = Path(folder)
        missing = [n for n in ("model.onnx", "tokenizer.json", "labels.json") if not (folder / n).is_file()]
        if missing:
            raise InvalidInput(f"{folder} holds no {missing[0]}. Name a downloaded 'onnx' or 'onnx_int8' folder.")
        config = folder / "config.json"
        self._kind = json.loads(config.read_text(encoding="utf-8")).get("problem_type") if config.is_file() else None
        self.gives = "value" if self._kind == "regression" else "probability"
        self.labels: list[str] = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.enable_truncation(_max_tokens(folder))
        self._tokenizer.no_padding()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        if len(self._session.get_outputs()[0].shape) != 2:
            raise InvalidInput(f"{folder} holds a model that gives each word a tag, not a classifier of whole texts.")

    def classify(self, text: str, pair: str | None = None) -> list[tuple[str, float]]:
        """Returns every label with its probability, the most probable first; `pair` is a second text.

        Of a model that gives several labels, each probability is of one alone; a regression's number is given as it is.
        """
        encoded = self._tokenizer.encode(text, pair)
        columns = {
            "input_ids": encoded.ids,
            "attention_mask": encoded.attention_mask,
            "token_type_ids": encoded.type_ids,
        }
        inputs = {node.name: np.array([columns[node.name]], dtype=np.int64) for node in self._session.get_inputs()}
        found_C = self._read(self._session.run(["logits"], inputs)[0][0].astype(np.float64))
        return [(self.labels[index], float(found_C[index])) for index in np.argsort(-found_C)]

    def _read(self, logits_C: Values) -> Values:
        if self._kind == "regression":
            return logits_C
        if self._kind == "multi_label_classification":
            likelier_C = 1 / (1 + np.exp(-np.abs(logits_C)))
            return np.where(logits_C < 0, 1 - likelier_C, likelier_C)
        exponents_C = np.exp(logits_C - logits_C.max())
        probabilities_C: Values = exponents_C / exponents_C.sum()
        return probabilities_C


def _max_tokens(folder: Path) -> int:
    """Returns the longest input: what the tokenizer's own configuration says, within what the model can take."""
    limits = [DEFAULT_MAX_TOKENS]
    for name, key in (("tokenizer_config.json", "model_max_length"), ("config.json", "max_position_embeddings")):
        path = folder / name
        value = json.loads(path.read_text(encoding="utf-8")).get(key) if path.is_file() else None
        if isinstance(value, int) and value > 0:
            limits.append(value)
    return min(limits)
