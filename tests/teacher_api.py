"""A teacher behind an OpenAI-compatible API on loopback, which counts what it was asked and can be made to fail."""

import json
import math
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx

from tests.pico import WORDS

KEY = "sk-teacher-0123456789"
PROMPT_TOKENS, COMPLETION_TOKENS = 20, 1


class TeacherApi:
    """Names the class of a text by its words, or turns a prompt round; `delivered` counts what reached the client.

    Attributes:
        faults: What the next requests get instead of an answer.
        with_logprobs: Whether it tells the likeliest tokens.
        with_usage: Whether it tells what an answer costs.
        left: How many more answers it gives before it holds the requests until `release()`.
    """

    def __init__(self, *, with_logprobs: bool = True, with_usage: bool = True) -> None:
        self.with_logprobs, self.with_usage = with_logprobs, with_usage
        self.faults: deque[str] = deque()
        self.delivered: Counter[str] = Counter()
        self.seen: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.left = math.inf
        self._change = threading.Condition()

    @contextmanager
    def serving(self) -> Iterator[str]:
        """Yields the base URL while the API is up."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            self.release()
            server.shutdown()
            server.server_close()

    def release(self) -> None:
        """Lets all requests pass from now on."""
        with self._change:
            self.left = math.inf
            self._change.notify_all()

    def wait_for_turn(self) -> None:
        """Returns when one more answer may be given."""
        with self._change:
            while self.left <= 0:
                self._change.wait()
            self.left -= 1

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Returns the answer to a request."""
        is_chat = path.endswith("/chat/completions")
        prompt = body["messages"][-1]["content"] if is_chat else body["prompt"]
        if "Text: " not in prompt:
            return self.write(prompt, is_chat, body["max_tokens"])
        text = prompt.partition("Text: ")[2].partition("\n")[0].split()
        counts = {label: sum(word in words.split() for word in text) for label, words in WORDS.items()}
        total = sum(2.0**count for count in counts.values())
        log_p = {label: math.log(2.0**count / total) for label, count in counts.items()}
        label = max(log_p, key=lambda name: log_p[name])
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
        choice |= {"message": {"role": "assistant", "content": f" {label}."}} if is_chat else {"text": f" {label}."}
        if self.with_logprobs and is_chat and body.get("logprobs"):
            top = [{"token": f" {name[:3]}", "logprob": value} for name, value in log_p.items()]
            choice["logprobs"] = {"content": [{"token": f" {label[:3]}", "logprob": log_p[label], "top_logprobs": top}]}
        elif self.with_logprobs and body.get("logprobs"):
            top = {f" {name[:3]}": value for name, value in log_p.items()}
            choice["logprobs"] = {"tokens": [f" {label[:3]}"], "top_logprobs": [top]}
        return self.wrap(choice, is_chat)

    def write(self, prompt: str, is_chat: bool, max_tokens: int) -> dict[str, Any]:
        """Returns a text in answer to a prompt: its words the other way round, and nothing to one that says so."""
        words = [] if prompt == "nothing" else prompt.split()[::-1]
        text, reason = " ".join(words[:max_tokens]), "length" if len(words) > max_tokens else "stop"
        choice = {"message": {"role": "assistant", "content": f" {text}\n"}} if is_chat else {"text": f" {text}\n"}
        return self.wrap({"index": 0, "finish_reason": reason} | choice, is_chat)

    def wrap(self, choice: dict[str, Any], is_chat: bool) -> dict[str, Any]:
        """Returns what is answered, with what it costs."""
        usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": COMPLETION_TOKENS}
        told = {"usage": usage} if self.with_usage else {}
        return {"object": "chat.completion" if is_chat else "text_completion", "choices": [choice], **told}


class Forwarder(TeacherApi):
    """Has another API answer, a real one at this address."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self._client = httpx.Client(base_url=address)

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._client.post(path, json=body).raise_for_status().json()


def _handler(api: TeacherApi) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            api.seen.append(body)
            api.keys.add(self.headers.get("Authorization"))
            try:
                fault = api.faults.popleft()
            except IndexError:
                fault = ""
            if fault:
                self._fail(fault)
                return
            api.wait_for_turn()
            if self._is_gone():
                self.close_connection = True
                return
            api.delivered[json.dumps(body, sort_keys=True)] += 1
            self._send(200, json.dumps(api.answer(self.path, body)).encode())

        def _fail(self, fault: str) -> None:
            if fault == "half":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b'{"choices": [')
                self.close_connection = True
            elif fault == "trickle":
                self._trickle()
            elif fault == "nonsense":
                self._send(200, b"<html>busy</html>")
            elif fault == "utf-16":
                self._send(404, "<html>not here</html>".encode("utf-16"))
            elif fault == "empty":
                self._send(200, json.dumps(api.wrap({}, is_chat=True) | {"choices": []}).encode())
            else:
                error = {"error": {"message": f"no, {self.headers.get('Authorization')}"}}
                self._send(int(fault), json.dumps(error).encode(), {"Retry-After": "0"})

        def _trickle(self) -> None:
            """Sends a byte now and then, for a minute at most or until nobody listens."""
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.close_connection = True
            with suppress(OSError):
                for _ in range(600):
                    self.wfile.write(b" ")
                    time.sleep(0.1)

        def _is_gone(self) -> bool:
            try:
                return self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
            except BlockingIOError:
                return False
            except OSError:
                return True

        def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: Any) -> None:
            """Says nothing."""

    return Handler
