"""HTTP with typed errors, retries where they are harmless, and server-sent events that resume."""

import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx

from stillhouse.errors import NotConfigured, Unreachable, error_class

RETRIED_STATUSES = frozenset({429, 503})
SAFE_METHODS = frozenset({"GET", "HEAD"})
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 8.0
PAGE_ITEMS = 100
TIMEOUT = httpx.Timeout(60.0, connect=10.0)
STREAM_TIMEOUT = httpx.Timeout(45.0, connect=10.0)  # a live event stream says something every 15 s


class Transport:
    """Speaks to one server with one key; safe to use from several threads."""

    def __init__(self, url: str, api_key: str, retries: int = 4) -> None:
        self.url = url
        self.retries = retries
        api_key = api_key.strip()
        if not (api_key.isascii() and api_key.isprintable()) or " " in api_key:
            raise NotConfigured("The API key holds a character that no key has; copy it again (STILLHOUSE_API_KEY).")
        try:
            local = urlsplit(url).hostname in {"127.0.0.1", "localhost", "::1"}
            self._http = httpx.Client(
                base_url=url,
                headers={"Authorization": f"Bearer {api_key}"},
                timeout=TIMEOUT,
                trust_env=not local,  # a proxy can't reach this machine's own loopback
            )
        except (ValueError, httpx.InvalidURL) as error:
            raise NotConfigured(f"'{url}' is no address of a server ({error}); set STILLHOUSE_URL.") from error

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def request(self, method: str, path: str, *, repeatable: bool = False, **options: Any) -> httpx.Response:
        """Returns the answer, read whole. Raises ApiError or Unreachable.

        A failed call is repeated when it is safe by its method, or when the caller says that it is `repeatable`.
        """
        repeatable = repeatable or method in SAFE_METHODS
        for attempt in range(self.retries + 1):
            last = attempt == self.retries
            try:
                response = self._http.request(method, path, **options)
            except httpx.TransportError as error:
                never_sent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
                if last or not (repeatable or never_sent):
                    raise _unreachable(self.url, error) from error
                time.sleep(pause_s(attempt))
                continue
            if response.status_code in RETRIED_STATUSES and repeatable and not last:
                time.sleep(_asked_pause_s(response) or pause_s(attempt))
                continue
            raise_for_error(response)
            return response
        raise AssertionError("unreachable: the last attempt returns or raises")

    def json(self, method: str, path: str, **options: Any) -> Any:
        """Returns the answer's JSON object, or None for an empty answer."""
        response = self.request(method, path, **options)
        try:
            found = response.json() if response.content else None
        except ValueError as error:
            raise self._no_stillhouse() from error
        if not isinstance(found, dict | None):
            raise self._no_stillhouse()
        return found

    def data(self, path: str, params: dict[str, Any] | None = None) -> Any:
        """Returns what a list that has one page holds."""
        return self._data_of(self.json("GET", path, params=params))

    def _data_of(self, page: Any) -> Any:
        if not isinstance(page, dict) or not isinstance(page.get("data"), list | dict):
            raise self._no_stillhouse()
        return page["data"]

    def _no_stillhouse(self) -> Unreachable:
        return Unreachable(f"{self.url} does not answer as Stillhouse does; is STILLHOUSE_URL right?")

    def pages(self, path: str, params: dict[str, Any] | None = None, limit: int | None = None) -> Iterator[Any]:
        """Yields the items of a list, page by page, at most `limit` of them."""
        query = {name: value for name, value in (params or {}).items() if value is not None}
        query["limit"] = min(limit or PAGE_ITEMS, PAGE_ITEMS)
        count = 0
        while True:
            page = self.json("GET", path, params=query)
            for item in self._data_of(page):
                if limit is not None and count >= limit:
                    return
                yield item
                count += 1
            if not page.get("next_cursor"):
                return
            query["after"] = page["next_cursor"]

    @contextmanager
    def stream(self, path: str, headers: dict[str, str]) -> Iterator[httpx.Response]:
        """Yields an answer to read bit by bit. Raises ApiError; a lost connection stays an httpx error."""
        with self._http.stream("GET", path, headers=headers, timeout=STREAM_TIMEOUT) as response:
            if not response.is_success:
                response.read()
                raise_for_error(response)
            yield response

    def server_sent(
        self, path: str, after: int, is_over: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[int, str, Any]]:
        """Yields `(id, event, data)` of one event stream until it ends or breaks (an httpx error).

        `is_over` is asked with every line, of which a quiet stream has one each 15 s.
        """
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": str(after)} if after else {})
        with self.stream(path, headers) as response:
            fields: dict[str, str] = {}
            for line in _lines(response):
                if is_over():
                    return
                if line and not line.startswith(":"):
                    name, _, value = line.partition(":")
                    value = value.removeprefix(" ")
                    fields[name] = f"{fields[name]}\n{value}" if name == "data" and name in fields else value
                elif not line and "data" in fields:
                    yield int(fields.get("id", 0)), fields.get("event", "message"), json.loads(fields["data"])
                    fields = {}


def _lines(response: httpx.Response) -> Iterator[str]:
    """Yields lines as an event stream has them, which end at a line feed alone: texts hold what others end at."""
    rest = ""
    for text in response.iter_text():
        *lines, rest = (rest + text).split("\n")
        yield from lines


def raise_for_error(response: httpx.Response) -> None:
    """Raises the ApiError that any answer but a good one, or that nothing has changed, stands for."""
    if response.is_success or response.status_code == httpx.codes.NOT_MODIFIED:
        return
    if response.has_redirect_location:  # a key is sent nowhere else than where its user said
        raise Unreachable(f"The server redirects to {response.headers['location']}; set STILLHOUSE_URL to where it is.")
    try:
        envelope = response.json()["error"]
        message = str(envelope["message"])
    except (ValueError, KeyError, TypeError):  # a proxy between us and the server
        envelope, message = {}, f"HTTP {response.status_code}: {response.text[:200] or response.reason_phrase}"
    raise error_class(response.status_code)(
        message,
        status=response.status_code,
        code=str(envelope.get("code", "unknown")),
        param=envelope.get("param"),
        details=envelope.get("details"),
        request_id=envelope.get("request_id") or response.headers.get("X-Request-ID"),
    )


def pause_s(attempt: int) -> float:
    """Returns the seconds to wait after a failed attempt: doubling, with jitter so that clients don't march in step."""
    return min(FIRST_PAUSE_S * 2.0**attempt, LONGEST_PAUSE_S) * random.uniform(0.5, 1.0)  # noqa: S311


def _asked_pause_s(response: httpx.Response) -> float | None:
    asked = response.headers.get("Retry-After", "")
    return min(float(asked), 60.0) if asked.isdigit() else None


def _unreachable(url: str, error: httpx.TransportError) -> Unreachable:
    reason = str(error) or type(error).__name__
    return Unreachable(f"{url} does not answer ({reason}). Is the server up, and is STILLHOUSE_URL right?")
