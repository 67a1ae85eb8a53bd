"""HTTP with typed errors, retries where they are harmless, and server-sent events that resume."""

import json
import random
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Generic, Self, TypeVar
from urllib.parse import urlsplit

import httpx

from stillhouse.errors import NotConfigured, ServerError, Unreachable, error_class
from stillhouse.forms import F, Formed, IsOver
from stillhouse.results import Result

RETRIED_STATUSES = frozenset({429, 503})
SAFE_METHODS = frozenset({"GET", "HEAD"})
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 8.0
PAGE_ITEMS = 100
TIMEOUT = httpx.Timeout(60.0, connect=10.0)
STREAM_TIMEOUT = httpx.Timeout(45.0, connect=10.0)  # a live event stream says something every 15 s
LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=20)  # a stream keeps its own for hours
Parsed = TypeVar("Parsed", bound=Result)


class Transport(Generic[F]):
    """Speaks to one server with one key; safe to use from several threads, or from one event loop."""

    def __init__(self, form: type[F], url: str, api_key: str, retries: int = 4) -> None:
        self.url = url
        self.retries = retries
        api_key = api_key.strip()
        if not (api_key.isascii() and api_key.isprintable()) or " " in api_key:
            raise NotConfigured("The API key holds a character that no key has; copy it again (STILLHOUSE_API_KEY).")
        self._key = {"Authorization": f"Bearer {api_key}"}
        try:
            local = urlsplit(url).hostname in {"127.0.0.1", "localhost", "::1"}
            # A proxy can't reach this machine's own loopback.
            self.form = form(base_url=url, timeout=TIMEOUT, limits=LIMITS, trust_env=not local)
        except (ValueError, httpx.InvalidURL) as error:
            raise NotConfigured(f"'{url}' is no address of a server ({error}); set STILLHOUSE_URL.") from error

    async def request(self, method: str, path: str, *, repeatable: bool = False, **options: Any) -> httpx.Response:
        """Returns the answer, read whole. Raises ApiError or Unreachable.

        A failed call is repeated when it is safe by its method, or when the caller says that it is `repeatable`.
        """
        repeatable = repeatable or method in SAFE_METHODS
        for attempt in range(self.retries + 1):
            last = attempt == self.retries
            try:
                response = await self.form.send(self._build(method, path, **options))
            except httpx.TransportError as error:
                never_sent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
                if last or not (repeatable or never_sent):
                    raise _unreachable(self.url, error) from error
                await self.form.sleep(pause_s(attempt))
                continue
            if response.status_code in RETRIED_STATUSES and repeatable and not last:
                await self.form.sleep(_asked_pause_s(response) or pause_s(attempt))
                continue
            raise_for_error(response)
            return response
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _build(self, method: str, path: str, *, headers: dict[str, str] | None = None, **options: Any) -> httpx.Request:
        """Returns a request to the server, the only one that the key goes to."""
        return self.form.http.build_request(method, path, headers=self._key | (headers or {}), **options)

    async def json(self, method: str, path: str, **options: Any) -> Any:
        """Returns the answer's JSON object, or None for an empty answer."""
        response = await self.request(method, path, **options)
        try:
            found = response.json() if response.content else None
        except ValueError as error:
            raise self._no_stillhouse() from error
        if not isinstance(found, dict | None):
            raise self._no_stillhouse()
        return found

    async def result(self, kind: type[Parsed], method: str, path: str, **options: Any) -> Parsed:
        """Returns the answer, typed."""
        return kind.model_validate(await self.json(method, path, **options))

    async def data(self, path: str, params: dict[str, Any] | None = None) -> Any:
        """Returns what a list that has one page holds."""
        return self._data_of(await self.json("GET", path, params=params))

    def _data_of(self, page: Any) -> Any:
        if not isinstance(page, dict) or not isinstance(page.get("data"), list | dict):
            raise self._no_stillhouse()
        return page["data"]

    def _no_stillhouse(self) -> Unreachable:
        return Unreachable(f"{self.url} does not answer as Stillhouse does; is STILLHOUSE_URL right?")

    async def page(self, kind: type[Parsed], path: str) -> AsyncIterator[Parsed]:
        """Yields the items of a list that has one page."""
        for item in await self.data(path):
            yield kind.model_validate(item)

    async def pages(
        self, kind: type[Parsed], path: str, params: dict[str, Any] | None = None, limit: int | None = None
    ) -> AsyncIterator[Parsed]:
        """Yields the items of a list, page by page, at most `limit` of them."""
        query = {name: value for name, value in (params or {}).items() if value is not None}
        query["limit"] = min(limit or PAGE_ITEMS, PAGE_ITEMS)
        count = 0
        while True:
            page = await self.json("GET", path, params=query)
            for item in self._data_of(page):
                if limit is not None and count >= limit:
                    return
                yield kind.model_validate(item)
                count += 1
            if not page.get("next_cursor"):
                return
            query["after"] = page["next_cursor"]

    @asynccontextmanager
    async def stream(self, path: str, headers: dict[str, str]) -> AsyncIterator[httpx.Response]:
        """Yields an answer to read bit by bit. Raises ApiError; a lost connection stays an httpx error."""
        async with self._opened(self._build("GET", path, headers=headers, timeout=STREAM_TIMEOUT)) as response:
            await self._check_stream(response)
            yield response

    async def text(self, path: str) -> str:
        """Returns a stored text, read whole from wherever the server has it. Raises ApiError or Unreachable."""
        for attempt in range(self.retries + 1):
            try:
                async with self.file(path) as response:
                    await self.form.read(response)
                    return response.text
            except (httpx.TransportError, ServerError) as error:
                if attempt == self.retries:
                    raise _unreachable(self.url, error) from error
                await self.form.sleep(pause_s(attempt))
        raise AssertionError("unreachable: the last attempt returns or raises")

    @asynccontextmanager
    async def file(self, path: str, span: str = "", version: str = "") -> AsyncIterator[httpx.Response]:
        """Yields the answer with a file's bytes, all or a span such as `bytes=0-99`, as `stream` does; or a 416.

        The server may send us on to its storage, once for each request, by a 302 to an address that is signed and soon
        expires. The key is not sent there, nor the version, by which our server alone calls the file. Raises
        ServerError for whatever goes wrong there, as the server can be asked for another address.
        """
        headers = {"Accept-Encoding": "identity"} | ({"Range": span} if span else {})
        ours = headers | ({"If-Range": version} if span else {})
        async with self._opened(self._build("GET", path, headers=ours, timeout=STREAM_TIMEOUT)) as response:
            if not (response.status_code == httpx.codes.FOUND and response.has_redirect_location):
                if response.status_code != httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
                    await self._check_stream(response)
                yield response
                return
            await self.form.read(response)
        async with self._opened(self._build_elsewhere(response, headers)) as response:
            status = response.status_code
            if not response.is_success and status != httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise ServerError(f"The server's storage answers HTTP {status}.", status=status, code="storage")
            yield response

    def _build_elsewhere(self, sent_on: httpx.Response, headers: dict[str, str]) -> httpx.Request:
        """Returns the request to where an answer sends us on to, without the key."""
        try:
            address = sent_on.url.join(sent_on.headers["Location"])
            return self.form.http.build_request("GET", address, headers=headers, timeout=STREAM_TIMEOUT)
        except (ValueError, httpx.InvalidURL) as error:
            message = "The server sends us on to an address that cannot be read."
            raise ServerError(message, status=sent_on.status_code, code="storage") from error

    @asynccontextmanager
    async def _opened(self, request: httpx.Request) -> AsyncIterator[httpx.Response]:
        response = await self.form.send(request, stream=True)
        try:
            yield response
        finally:
            await self.form.end(response)

    async def _check_stream(self, response: httpx.Response) -> None:
        if not response.is_success:
            await self.form.read(response)
            raise_for_error(response)

    async def server_sent(
        self, path: str, after: int, is_over: IsOver = lambda: False
    ) -> AsyncGenerator[tuple[int, str, Any], None]:
        """Yields `(id, event, data)` of one event stream until it ends or breaks (an httpx error).

        `is_over` is asked with every line, of which a quiet stream has one each 15 s.
        """
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": str(after)} if after else {})
        async with self.stream(path, headers) as response:
            fields: dict[str, str] = {}
            async for line in self._lines(response):
                if is_over():
                    return
                if line and not line.startswith(":"):
                    name, _, value = line.partition(":")
                    value = value.removeprefix(" ")
                    fields[name] = f"{fields[name]}\n{value}" if name == "data" and name in fields else value
                elif not line and "data" in fields:
                    yield int(fields.get("id", 0)), fields.get("event", "message"), json.loads(fields["data"])
                    fields = {}

    async def _lines(self, response: httpx.Response) -> AsyncIterator[str]:
        """Yields lines as an event stream has them, which end at a line feed alone: texts hold what others end at."""
        rest = b""
        async for chunk in self.form.chunks(response):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                yield line.decode(errors="replace")


class Group(Formed[F]):
    """The operations of one noun."""

    def __init__(self, transport: Transport[F]) -> None:
        self._transport = transport

    @property
    def _form(self) -> F:
        return self._transport.form

    def __deepcopy__(self, _: Any) -> Self:
        return self  # it stands for connections, of which there is no copy


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


def _unreachable(url: str, error: Exception) -> Unreachable:
    reason = str(error) or type(error).__name__
    return Unreachable(f"{url} does not answer ({reason}). Is the server up, and is STILLHOUSE_URL right?")
