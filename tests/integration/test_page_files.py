"""The files of the web page, as a browser asks for them."""

import gzip
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from starlette.testclient import TestClient

FOLDER = Path(__file__).parents[2] / "app" / "page" / "static"
FILES = sorted(path.name for path in FOLDER.iterdir() if path.name != "index.html")


def test_every_file_is_served_with_a_strict_policy(api_client: TestClient) -> None:
    for path, name in [("/", "index.html"), *((f"/page/{name}", name) for name in FILES)]:
        plain = api_client.get(path, headers={"Accept-Encoding": "identity"})
        packed = api_client.get(path)
        expected = (FOLDER / name).read_bytes()
        assert (plain.status_code, plain.content, packed.content) == (200, expected, expected)
        assert packed.headers["Content-Encoding"] == "gzip"
        assert int(packed.headers["Content-Length"]) == len(gzip.compress(expected))
        assert plain.headers["Content-Security-Policy"].startswith("default-src 'self';")
        assert "unsafe" not in plain.headers["Content-Security-Policy"]
        assert (plain.headers["X-Frame-Options"], plain.headers["X-Content-Type-Options"]) == ("DENY", "nosniff")
        again = api_client.get(path, headers={"If-None-Match": plain.headers["ETag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert api_client.head(path).content == b""
    assert api_client.get("/page/none.js").status_code == 404


def test_nothing_is_written_into_the_page_itself() -> None:
    page = (FOLDER / "index.html").read_text()
    assert re.findall(r"<script(?![^>]*\bsrc=)|<style|\bon\w+=|\bstyle=", page) == []
    for name in FILES:
        code = (FOLDER / name).read_text()
        assert (
            re.findall(r"innerHTML = |outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", code) == []
        ), name
        assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)", code) == [], name
        assert len(code.splitlines()) <= 400, name


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_every_script_parses() -> None:
    for name in FILES:
        if name.endswith(".js"):
            script = (FOLDER / name).read_bytes()
            done = subprocess.run(["node", "--check", "--input-type=module"], input=script, capture_output=True)
            assert done.returncode == 0, (name, done.stderr)
