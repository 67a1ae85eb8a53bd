"""A server that speaks S3, in this process: moto's, whose bytes, times and requests a test may look at and change."""

import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import boto3
import pytest
from moto.core import DEFAULT_ACCOUNT_ID
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.models import s3_backends
from werkzeug.serving import make_server
from werkzeug.wrappers import Request, Response

from core.bucket import BucketStore
from core.settings import get_settings
from core.storage import get_store

BUCKET = "stillhouse"
KEYS = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests-secret", "AWS_REGION": "us-east-1"}


class Asked(NamedTuple):
    """A request that reached the server."""

    method: str
    path: str
    headers: dict[str, str]


class Prefix(NamedTuple):
    """What a store has in the bucket."""

    prefix: str

    def keys(self, start: str = "") -> dict[str, Any]:
        """Returns what the server holds of each key that begins so, by the key below the prefix."""
        held = s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets[BUCKET].keys
        whole = f"{self.prefix}{start}"
        return {key.removeprefix(self.prefix): held[key] for key in sorted(held) if key.startswith(whole)}

    def age(self, at: float, start: str = "") -> None:
        """Makes objects as old as if they had been stored at that time."""
        for held in self.keys(start).values():
            held.last_modified = datetime.fromtimestamp(at, UTC).replace(tzinfo=None)

    def damage(self, start: str = "") -> None:
        """Changes a byte of every object whose key begins so."""
        for held in self.keys(start).values():
            held.value = held.value[:-1] + bytes([held.value[-1] ^ 1])

    def cut(self, start: str = "") -> None:
        """Takes the last byte away from every object whose key begins so."""
        for held in self.keys(start).values():
            held.value = held.value[:-1]


class S3:
    """The server; `away` makes it answer 503, as one does that is overloaded."""

    def __init__(self) -> None:
        self.asked: deque[Asked] = deque(maxlen=10_000)
        self.away = False
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        Thread(target=self._server.serve_forever, daemon=True).start()
        keys = {"aws_access_key_id": KEYS["AWS_ACCESS_KEY_ID"], "aws_secret_access_key": KEYS["AWS_SECRET_ACCESS_KEY"]}
        self.client = boto3.client("s3", endpoint_url=self.endpoint, region_name="us-east-1", **keys)
        self.client.create_bucket(Bucket=BUCKET)
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # not a line for each request

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        request = Request(environ)
        self.asked.append(Asked(request.method, request.full_path, dict(request.headers)))
        app = Response("slow down", 503) if self.away else self._app
        answer: Iterable[bytes] = app(environ, start_response)
        return answer

    def below(self, url: str) -> Prefix:
        """Returns what a store of that address has here."""
        path = url.removeprefix(f"s3://{BUCKET}").strip("/")
        return Prefix(f"{path}/" if path else "")

    def environment(self, prefix: str = "") -> dict[str, str]:
        """Returns the settings of a store in this bucket."""
        return KEYS | {"STILLHOUSE_S3_URL": f"s3://{BUCKET}/{prefix}", "STILLHOUSE_S3_ENDPOINT": self.endpoint}


@cache
def the_s3() -> S3:
    """Returns this process's server."""
    return S3()


def own_bucket(root: Path, **settings: Any) -> BucketStore:
    """Returns a store of a test's own in the bucket, with nothing at hand yet."""
    os.environ.update(KEYS)
    url = f"s3://{BUCKET}/{root.parent.name}-{root.name}"
    chosen = {"s3_url": url, "s3_endpoint": the_s3().endpoint, "s3_retry_s": 0} | settings
    return BucketStore(root, get_settings().model_copy(update=chosen))


@pytest.fixture
def in_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Has the whole process keep its store in the bucket."""
    settings = {"STILLHOUSE_S3_RETRY_S": "0", "STILLHOUSE_STORAGE_DIR": str(tmp_path)}
    for name, value in (the_s3().environment(tmp_path.name) | settings).items():
        monkeypatch.setenv(name, value)
    forget_store()
    yield
    monkeypatch.undo()
    forget_store()


def forget_store() -> None:
    """Has this process read its settings anew."""
    get_settings.cache_clear()
    get_store.cache_clear()
