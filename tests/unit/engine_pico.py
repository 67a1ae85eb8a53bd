"""A pico classifier, its data, and stages run through the real child process."""

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LABELS = ["animal", "food", "tool", "weather"]
WORDS = {
    "animal": ["cat", "dog", "horse", "mouse", "bird", "sheep"],
    "food": ["bread", "cheese", "apple", "soup", "rice", "butter"],
    "tool": ["hammer", "saw", "drill", "wrench", "ladder", "nail"],
    "weather": ["rain", "snow", "storm", "sun", "cloud", "wind"],
}
FILLER = ["the", "a", "is", "there", "today", "again", "with", "my", "old", "new", "see", "near", "and", "house"]


def make_rows(count: int, seed: int) -> list[dict[str, str]]:
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        label = LABELS[index % len(LABELS)]
        words = rng.choices(FILLER, k=rng.randint(2, 14)) + [rng.choice(WORDS[label])]
        rng.shuffle(words)
        rows.append({"text": " ".join(words), "label": label})
    return rows


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *FILLER, *(word for group in WORDS.values() for word in group)]
    backend = Tokenizer(WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = BertNormalizer(), BertPreTokenizer()
    backend.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def make_teacher(folder: Path, num_layers: int = 4) -> Path:
    import torch
    from transformers import BertConfig, BertModel

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass
class Finished:
    """What a child left behind."""

    returncode: int
    reports: list[dict[str, Any]]
    log: str
    outputs: Path

    @property
    def last(self) -> dict[str, Any]:
        return self.reports[-1]

    def of(self, type: str) -> list[dict[str, Any]]:
        return [report for report in self.reports if report["type"] == type]

    def points(self) -> list[list[Any]]:
        return [point for report in self.of("metrics") for point in report["points"]]


@dataclass
class Bench:
    """A workplace for the stages of one job, as the supervisor lays it out."""

    root: Path
    spec: dict[str, Any]
    ordinal: int = 0
    inputs: Path = field(init=False)

    def __post_init__(self) -> None:
        self.inputs = self.root / "inputs"
        for split, count, seed in (("train", 160, 1), ("validation", 40, 2), ("test", 48, 3)):
            write_rows(self.inputs / "data" / f"{split}.jsonl", make_rows(count, seed))
        make_teacher(self.inputs / "teacher")

    def write_order(self, stage: dict[str, Any], outputs: Path, max_memory_bytes: int = 0) -> Path:
        outputs.mkdir(parents=True, exist_ok=True)
        order = {
            "stage": stage,
            "spec": self.spec,
            "ordinal": self.ordinal,
            "labels": LABELS,
            "inputs_dir": str(self.inputs),
            "outputs_dir": str(outputs),
            "num_threads": 1,
            "max_memory_bytes": max_memory_bytes,
        }
        path = outputs.parent / f"{outputs.name}.order.json"
        path.write_text(json.dumps(order), encoding="utf-8")
        return path

    def run(self, stage: dict[str, Any], name: str = "", orders: bytes = b"", max_memory_bytes: int = 0) -> Finished:
        outputs = self.root / (name or f"out-{self.ordinal}")
        path = self.write_order(stage, outputs, max_memory_bytes)
        reading, writing = os.pipe()
        with subprocess.Popen(
            [sys.executable, "-m", "worker.engine.child", str(path), "--report-fd", str(writing)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[writing],
            cwd=Path(__file__).parents[2],
        ) as child:
            os.close(writing)
            child.stdin.write(orders)
            child.stdin.flush()
            with os.fdopen(reading, "rb") as pipe:
                reports = [json.loads(line) for line in pipe]
            log = child.stdout.read().decode()
        return Finished(child.returncode, reports, log, outputs)

    def adopt(self, finished: Finished) -> None:
        """Makes a stage's outputs the next stage's inputs."""
        for folder in finished.outputs.iterdir():
            target = self.inputs / folder.name
            if target.exists():
                for path in target.iterdir():
                    path.unlink()
                target.rmdir()
            folder.rename(target)
        with (self.inputs / "history.jsonl").open("a", encoding="utf-8") as history:
            for name, step, value in finished.points():
                point = {"ordinal": self.ordinal, "kind": "any", "name": name, "step": step, "value": value}
                history.write(json.dumps(point) + "\n")
        self.ordinal += 1


def make_spec(stages: list[dict[str, Any]], keep: tuple[int, ...] = (0, 3)) -> dict[str, Any]:
    from core.jobs.spec import load_spec

    spec = {
        "name": "pico",
        "teacher": {"model": "pico"},
        "student": {"kind": "teacher_layers", "keep": list(keep)},
        "data": "pico",
        "stages": stages,
        "seed": 7,
    }
    return load_spec(spec).model_dump(mode="json")
