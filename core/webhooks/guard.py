"""Requests to addresses that tenants name: to public ones alone, and to the very address that was looked at."""

import ipaddress
import socket
import ssl
import time
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpcore

from core.settings import get_settings

TIMEOUT_S = 10
MAX_ANSWER_BYTES = 2000
MAX_URL_CHARS = 2000
NAT64 = ipaddress.ip_network("64:ff9b::/96")


class NotAllowed(Exception):
    """The address may not be asked."""


class Answer(NamedTuple):
    """What an endpoint said; of the text only the beginning."""

    status: int
    text: str


def check_url(url: str) -> None:
    """Raises NotAllowed for a URL that can never be asked, whatever its name means."""
    try:
        address = urlsplit(url)
        port = address.port
    except ValueError as error:
        raise NotAllowed(f"this is no URL: {error}") from error
    if len(url) > MAX_URL_CHARS or not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        raise NotAllowed(f"a URL has at most {MAX_URL_CHARS} characters, all of ASCII, without blanks and backslashes")
    if address.scheme not in {"http", "https"} or not address.hostname:
        raise NotAllowed("write http://host/path or https://host/path")
    if address.username is not None or address.password is not None:
        raise NotAllowed("the URL may not hold a user or a password; messages are signed")
    if port == 0:
        raise NotAllowed("there is no port 0")
    try:
        literal = ipaddress.ip_address(address.hostname)
    except ValueError:
        return  # a name, or a number in another way of writing: what it means is checked when it is asked
    if not is_public(literal) and not _is_listed(address.hostname, port):
        raise NotAllowed(f"'{address.hostname}' is no public address")


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Tells whether an address is one of the internet's own, and so are those that it may stand for.

    Origin: RFC 6890 (special purposes), RFC 6052 and 3056 (IPv4 inside IPv6).
    """
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        if inner is not None and not is_public(inner):
            return False
        if address in NAT64 and not is_public(ipaddress.IPv4Address(int(address) & (2**32 - 1))):
            return False
        if address.is_site_local:
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def _is_listed(host: str, port: int | None) -> bool:
    """Tells whether the operator lets tenants name that host although it is not public."""
    listed = {name.strip().lower() for name in get_settings().webhook_hosts.split(",")}
    return bool(listed & {host.lower(), f"{host.lower()}:{port}"})


class _InTime(httpcore.NetworkStream):
    """A connection that is over at a deadline, however slowly bytes drip in."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: float) -> None:
        self._stream, self._deadline = stream, deadline

    def _left(self, timeout: float | None) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise httpcore.ReadTimeout(f"no whole answer within {TIMEOUT_S} s")
        return min(left, TIMEOUT_S if timeout is None else timeout)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Returns what has come."""
        return self._stream.read(max_bytes, self._left(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Sends bytes."""
        self._stream.write(buffer, self._left(timeout))

    def close(self) -> None:
        """Ends the connection."""
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        """Returns the same connection, encrypted."""
        inner = self._stream.start_tls(ssl_context, server_hostname, self._left(timeout))
        return _InTime(inner, self._deadline)

    def get_extra_info(self, info: str) -> Any:
        """Returns what the connection below knows."""
        return self._stream.get_extra_info(info)


class Guarded(httpcore.SyncBackend):
    """Connects to the address that was looked at, so that no name can mean another one a moment later."""

    def __init__(self) -> None:
        super().__init__()
        self.deadline = time.monotonic() + TIMEOUT_S

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        """Returns a connection. Raises NotAllowed for a host that has an address that is not public."""
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
        private = [address for address in addresses if not is_public(address)]
        if private and not _is_listed(host, port):
            raise NotAllowed(f"'{host}' means {private[0]}, which is no public address")
        made = super().connect_tcp(str(addresses[0]), port, timeout, local_address, socket_options)
        return _InTime(made, self.deadline)

    def connect_unix_socket(self, path: str, *_: Any, **__: Any) -> httpcore.NetworkStream:
        """Refuses."""
        raise NotAllowed(f"'{path}' is no address of a network")


def request(
    method: str, url: str, headers: Mapping[str, str], body: bytes, most_bytes: int = MAX_ANSWER_BYTES
) -> Answer:
    """Returns the answer, and of it at most so many bytes; a redirect is an answer, and is not followed.

    Raises NotAllowed, OSError, or an error of httpcore where there is no answer in time.
    """
    check_url(url)
    timeouts = dict.fromkeys(("connect", "read", "write", "pool"), float(TIMEOUT_S))
    sent = [("user-agent", "Stillhouse"), *headers.items()]
    with (
        httpcore.ConnectionPool(network_backend=Guarded(), max_connections=1) as pool,
        pool.stream(method, url, headers=sent, content=body, extensions={"timeout": timeouts}) as answer,
    ):
        text = b""
        for chunk in answer.iter_stream():
            text += chunk
            if len(text) > most_bytes:
                break
        return Answer(answer.status, text[:most_bytes].decode("utf-8", "replace").replace("\x00", "�"))
