"""A downloaded ONNX classifier, measured by someone who has nothing else of Stillhouse.

    pip install onnxruntime tokenizers
    python artifact_alone.py FOLDER TEXTS.jsonl [--threads N] [--max-p95-ms X] [--max-bytes N] [--min-accuracy X]

The folder is an artifact with `model.onnx`, `tokenizer.json` and `labels.json`; the texts are JSON Lines with `text`,
and for the accuracy a `label`. They are answered one by one, the first ones before the clock is started; a time goes
from the text to its label, and that of the model alone is told besides. Prints one line of JSON: the 50th and 95th
percentile in milliseconds, the accuracy, and the bytes of all files. Fails when a limit is missed.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

WARM_UP_TEXTS = 50


def read(path: Path, column: str, label_column: str) -> tuple[list[str], list[str] | None]:
    """Returns the texts, and their labels if all have one."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    labels = [row.get(label_column) for row in rows]
    return [row[column] for row in rows], None if None in labels else labels


def answer(folder: Path, texts: list[str], num_threads: int) -> tuple[list[str], list[float], list[float]]:
    """Returns the label of each text, the seconds that each took, and those of the model alone."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = num_threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    labels = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
    names = [node.name for node in session.get_inputs()]
    found, whole_s, model_s = [], [], []
    for text in texts[:WARM_UP_TEXTS] + texts:
        began = time.perf_counter()
        encoded = tokenizer.encode(text)
        columns = {
            "input_ids": encoded.ids,
            "attention_mask": encoded.attention_mask,
            "token_type_ids": encoded.type_ids,
        }
        inputs = {name: np.array([columns[name]], dtype=np.int64) for name in names}
        tokenized = time.perf_counter()
        logits = session.run(["logits"], inputs)[0][0]
        ended = time.perf_counter()
        found.append(labels[int(logits.argmax())])
        whole_s.append(ended - began)
        model_s.append(ended - tokenized)
    return found[-len(texts) :], whole_s[-len(texts) :], model_s[-len(texts) :]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--threads", type=int, default=2, help="of the runtime (default 2)")
    parser.add_argument("--max-p95-ms", type=float)
    parser.add_argument("--max-bytes", type=int)
    parser.add_argument("--min-accuracy", type=float)
    arguments = parser.parse_args()
    texts, labels = read(arguments.texts, arguments.text_column, arguments.label_column)
    if arguments.min_accuracy is not None and labels is None:
        parser.error(f"--min-accuracy: not every line of {arguments.texts} has a '{arguments.label_column}'")
    found, whole_s, model_s = answer(arguments.folder, texts, arguments.threads)
    p50_ms, p95_ms = (1e3 * np.percentile(whole_s, [50, 95])).tolist()
    seen: dict[str, Any] = {
        "num_texts": len(texts),
        "p50_ms": p50_ms,
        "p95_ms": p95_ms,
        "model_p95_ms": float(1e3 * np.percentile(model_s, 95)),
        "accuracy": labels and float(np.mean([one == label for one, label in zip(found, labels, strict=True)])),
        "bytes": sum(path.stat().st_size for path in arguments.folder.rglob("*") if path.is_file()),
    }
    print(json.dumps(seen))
    missed = {
        "--max-p95-ms": arguments.max_p95_ms is not None and p95_ms > arguments.max_p95_ms,
        "--max-bytes": arguments.max_bytes is not None and seen["bytes"] > arguments.max_bytes,
        "--min-accuracy": arguments.min_accuracy is not None and seen["accuracy"] < arguments.min_accuracy,
    }
    for option in (option for option, is_missed in missed.items() if is_missed):
        print(f"{option} is missed", file=sys.stderr)
    return 1 if any(missed.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
