"""ONNX forms in a real browser: onnxruntime-web, as WebAssembly in Chromium, which nothing but this machine serves."""

import json
import os
import queue
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import onnxruntime
import pytest
from transformers import AutoTokenizer

from tests.engine_bench import FAST, Bench, make_spec

FOLDER = Path(__file__).parent / "browser"
PACKAGE = FOLDER / "node_modules" / "onnxruntime-web"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TEXTS = ["my parcel is late", "please help with the password reset code now", "refund"]
BOUNDS = {"onnx": 1e-5, "onnx_fp16": 1e-3, "onnx_int8": 1e-2, "onnx_int4": 1e-2}  # as a share of the logits' range
SECONDS = 120
pytestmark = [
    pytest.mark.skipif(not PACKAGE.is_dir(), reason="onnxruntime-web is not there; `make browser` fetches it"),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome is installed"),
]


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder, and takes what the page has found."""

    found: "queue.SimpleQueue[dict[str, Any]]"

    def do_POST(self) -> None:
        self.found.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        """Says nothing."""


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, "queue.SimpleQueue[dict[str, Any]]"]]:
    """Yields the address of a folder on the loopback, and what its page posts."""
    found: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    own = type("Own", (Handler,), {"found": found})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(own, directory=str(folder))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", found
        server.shutdown()


def browse(folder: Path, profile: Path) -> dict[str, Any]:
    """Returns what the page of a folder posts once a browser has opened it."""
    root = ["--no-sandbox"] if os.geteuid() == 0 else []
    log_path = profile.parent / "chromium.log"
    with serving(folder) as (url, found), log_path.open("wb") as log:
        quiet = ["--headless=new", "--no-first-run", "--disable-background-networking"]
        command = [CHROMIUM, *quiet, f"--user-data-dir={profile}", *root, f"{url}/page.html"]
        browser = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            return found.get(timeout=SECONDS)
        except queue.Empty:
            pytest.fail(f"the page says nothing: {log_path.read_text()[-2000:]}")
        finally:
            browser.terminate()
            browser.wait()


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the forms of a trained student."""
    bench = Bench(tmp_path_factory.mktemp("bench")).lay()
    stages = [
        {"kind": "finetune", "of": "student", **FAST},
        {"kind": "export", "formats": [{"kind": kind} for kind in BOUNDS]},
    ]
    bench.succeed_all(make_spec(stages))
    return bench.inputs


def test_forms_give_in_a_browser_the_logits_that_they_give_in_python(forms: Path, tmp_path: Path) -> None:
    inputs = dict(AutoTokenizer.from_pretrained(forms / "onnx")(TEXTS, padding=True, return_tensors="np"))
    site = tmp_path / "site"
    site.mkdir()
    shutil.copyfile(FOLDER / "page.html", site / "page.html")
    (site / "package").symlink_to(PACKAGE)
    (site / "forms").symlink_to(forms)
    asked = {"forms": list(BOUNDS), "inputs": {name: ids_BT.tolist() for name, ids_BT in inputs.items()}}
    (site / "asked.json").write_text(json.dumps(asked))
    found = browse(site, tmp_path / "profile")
    assert "error" not in found, found
    assert "Chrome" in found["agent"]
    for form, bound in BOUNDS.items():
        answer = found["answers"][form]
        assert "error" not in answer, f"{form}: {answer}"
        session = onnxruntime.InferenceSession(forms / form / "model.onnx", providers=["CPUExecutionProvider"])
        [expected] = session.run(["logits"], {node.name: inputs[node.name] for node in session.get_inputs()})
        logits = np.array(answer["data"]).reshape(answer["dims"])
        np.testing.assert_allclose(logits, expected, rtol=0, atol=bound * np.ptp(expected), err_msg=form)
