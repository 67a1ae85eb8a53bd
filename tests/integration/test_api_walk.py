"""A walk with `curl` alone, over a real socket: from the upload to the downloaded artifact."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api import SPLITS, model_files, num_blobs, run_job


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Yields the address of a live server of its own process."""
    command = [sys.executable, "-m", "uvicorn", "app.main:app", "--port", "0", "--host", "127.0.0.1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            found = re.search(r"http://127\.0\.0\.1:\d+", line)
            if found:
                break
        threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would stop the server
        yield found.group(0)
    finally:
        process.terminate()
        process.wait(20)


class Curl:
    def __init__(self, url: str, key: str) -> None:
        self.url, self.key = url, key

    def __call__(self, path: str, *options: str) -> tuple[int, dict[str, str], bytes]:
        command = ["curl", "-sS", "-i", "--noproxy", "*", "-H", f"Authorization: Bearer {self.key}", *options]
        out = subprocess.run([*command, self.url + path], capture_output=True, check=True).stdout
        while out.startswith(b"HTTP/1.1 100"):
            out = out.split(b"\r\n\r\n", 1)[1]
        head, body = out.split(b"\r\n\r\n", 1)
        status, *lines = head.decode().split("\r\n")
        return int(status.split()[1]), {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}, body


@pytest.fixture
def curl(server: str, tenant: tuple[str, str]) -> Curl:
    return Curl(server, tenant[1])


def _lay(folder: Path, files: dict[str, bytes]) -> None:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)


def test_from_upload_to_download(curl: Curl, tmp_path: Path) -> None:
    _lay(tmp_path, {f"{split}.jsonl": data for split, data in SPLITS.items()})
    files = model_files()
    _lay(tmp_path / "model", files)
    parts = [o for split in SPLITS for o in ("-F", f"{split}=@{tmp_path}/{split}.jsonl")]
    status, headers, body = curl("/v1/datasets", "-F", "name=tickets", *parts)
    assert (status, headers["location"]) == (201, "/v1/datasets/tickets"), body
    parts = [o for path in files for o in ("-F", f"files=@{tmp_path}/model/{path};filename={path}")]
    assert curl("/v1/models", "-F", "name=minilm", *parts)[0] == 201
    spec = "teacher: {model: minilm}\nstudent: {kind: teacher_layers, keep: [0, 2]}\ndata: tickets\n"
    (tmp_path / "spec.yaml").write_text(spec)
    post = ("-H", "Content-Type: application/yaml", "--data-binary", f"@{tmp_path}/spec.yaml")
    assert curl("/v1/jobs/validate", *post)[0] == 200
    status, headers, body = curl("/v1/jobs", *post, "-H", "Idempotency-Key: walk")
    assert status == 202, body
    job = json.loads(body)
    assert headers["location"] == f"/v1/jobs/{job['id']}"
    run_job(job["id"])
    status, headers, body = curl(f"/v1/jobs/{job['id']}")
    assert json.loads(body)["state"] == "succeeded"
    assert curl(f"/v1/jobs/{job['id']}", "-H", f"If-None-Match: {headers['etag']}")[0] == 304
    status, _, body = curl(f"/v1/jobs/{job['id']}/events", "-N", "-H", "Accept: text/event-stream")
    assert b"event: done" in body
    path = f"/v1/jobs/{job['id']}/artifacts/student/model.safetensors"
    status, headers, whole = curl(path)
    assert whole == model_files(2)["model.safetensors"]
    status, _, rest = curl(path, "-r", "100-", "-H", f"If-Range: {headers['etag']}")
    assert (status, rest) == (206, whole[100:])
    assert curl(path, "-I")[1]["content-length"] == str(len(whole))
    assert curl(f"/v1/jobs/{job['id']}/artifacts/student/download")[2][:20].startswith(b"student/")


def test_an_upload_cut_in_the_middle_leaves_nothing(curl: Curl, server: str) -> None:
    before = num_blobs()
    host, port = server.removeprefix("http://").split(":")
    part = b'--b\r\nContent-Disposition: form-data; name="train"; filename="t.jsonl"\r\n\r\n' + SPLITS["train"]
    head = (
        f"POST /v1/datasets HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {curl.key}\r\n"
        f"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: {10 * len(part)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + part)
    status, _, body = curl("/v1/datasets")
    while 'status="499"' not in curl("/metrics")[2].decode():  # until the server has seen the end of the connection
        assert status == 200
    assert json.loads(body)["data"] == []
    assert num_blobs() == before


def test_a_large_upload_is_not_held_in_memory(curl: Curl, tmp_path: Path) -> None:
    """60 MB of rows: the server's peak grows by far less."""
    row = json.dumps({"text": "x" * 990, "label": "%d"}) + "\n"
    with (tmp_path / "big.jsonl").open("w") as file:
        file.writelines(row % (n % 5) for n in range(60_000))
    status, _, body = curl("/v1/datasets", "-F", "name=big", "-F", f"train=@{tmp_path}/big.jsonl", "-H", "Expect:")
    assert status == 201, body
    assert json.loads(body)["splits"]["train"]["num_rows"] == 60_000
    resident = re.search(r"^process_resident_memory_bytes (\S+)$", curl("/metrics")[2].decode(), re.MULTILINE)
    assert float(resident.group(1)) < 160e6
