"""Asks a teacher's API for a stage: the child names what to ask, the key and the network are here.

An answer is stored before the child hears of it, under the sha256 of its request, so that nobody of the tenant pays for
it again; a job that wants one that another is waiting for waits, too. A request that was sent when this process died is
asked again; it carries its sha256 as `Idempotency-Key`.
"""

import hashlib
import json
import logging
import math
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from sqlalchemy.orm import Session

from core.errors import StageFailed, StillhouseError
from core.ids import new_id
from core.jobs.answers import Spent, find_answer, keep_answer, release_request, sum_spent, take_request
from core.jobs.ownership import Claim, owned
from core.jobs.spec import load_spec
from core.settings import get_settings
from core.tenants.secrets import read_secret
from worker.transactions import transact

if TYPE_CHECKING:
    import httpx

PATHS = {"chat": "/chat/completions", "completions": "/completions"}
PASSING = frozenset({408, 409, 425, 429}) | frozenset(range(500, 600))
MAX_ANSWER_BYTES = 4 * 1024 * 1024
FIRST_PAUSE_S, LAST_PAUSE_S = 0.5, 60.0
STORING_S = 30.0  # in which an answer that has come is stored, or the next attempt is begun
POLL_S = 0.5
SHOWN = 300
NOTHING = Spent(0, 0, 0)
log = logging.getLogger(__name__)
Send = Callable[[dict[str, Any]], None]


class Answer(NamedTuple):
    """What is kept of an answer: its text, the likeliest first tokens if they were told, and what it cost.

    Attributes:
        is_cut: Whether it reached the most tokens that it may have, and not its end.
        usage: Tokens of its prompt and of itself; None where the API does not tell.
    """

    text: str
    top: dict[str, float] | None
    is_cut: bool
    usage: tuple[int, int] | None

    @property
    def cost(self) -> Spent:
        """What it is paid for, as far as the API tells."""
        return Spent(1, *(self.usage or (0, 0)))


class NoAnswer(Exception):
    """This attempt got none, but another one may; `pause_s` is how long the server asks to wait.

    `cost` is what it is paid for all the same.
    """

    def __init__(self, message: str, pause_s: float = 0.0, cost: Spent = NOTHING) -> None:
        super().__init__(message)
        self.pause_s, self.cost = pause_s, cost


class Asker:
    """Asks the teacher of one job, with bounded concurrency; what it hears goes to `send` as `answer` orders."""

    def __init__(self, taken: Claim, send: Send) -> None:
        import httpx

        self._taken, self._send = taken, send
        self._teacher, self._secret, self._spent = transact(self._look)
        _check_host(self._teacher.base_url)
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._num_open = 0
        self._under_way: dict[str, Future[dict[str, Any]]] = {}
        self._error: StageFailed | None = None
        headers = {"Authorization": f"Bearer {self._secret}"} if self._secret else {}
        limits = httpx.Limits(max_connections=self._teacher.concurrency)
        self._client = httpx.Client(headers=headers, timeout=self._teacher.timeout_s, limits=limits)
        self._pool = ThreadPoolExecutor(self._teacher.concurrency, thread_name_prefix="ask")

    def _look(self, session: Session) -> tuple[Any, str | None, Spent]:
        job = owned(session, self._taken)
        teacher: Any = load_spec(job.spec).teacher
        api = teacher.api()
        if api is None:
            raise StageFailed("internal", "The stage asks, but its job's teacher has no API.")
        secret = read_secret(session, job.tenant_id, api.secret) if api.secret else None
        return teacher, secret, sum_spent(session, job.tenant_id, job.id)

    def ask(self, number: int, body: dict[str, Any]) -> None:
        """Has a request answered, by the store or by the API; `number` comes back with the answer."""
        if not self._closing.is_set():
            self._pool.submit(self._serve, number, body)

    def close(self) -> None:
        """Starts no further request; the answers of open ones are still kept as they come."""
        self._closing.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _serve(self, number: int, body: dict[str, Any]) -> None:
        if self._closing.is_set():
            return
        try:
            told = {"answer": self._answer(body)}
        except Exception as error:
            failure = as_failure(error)
            if failure is error:
                with self._lock:
                    self._error = self._error or failure
            told = {"error": failure.report()}
        self._send({"order": "answer", "number": number, **told})

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        url = self._teacher.base_url.rstrip("/") + PATHS[self._teacher.endpoint]
        key = hashlib.sha256(json.dumps({"url": url, "body": body}, sort_keys=True).encode()).hexdigest()
        mine: Future[dict[str, Any]] = Future()
        with self._lock:
            first = self._under_way.setdefault(key, mine)
        if first is not mine:
            return first.result()  # an equal request is under way, and paid for once
        try:
            mine.set_result(self._look_up(url, key, body))
        except BaseException as error:
            mine.set_exception(error)
        finally:
            with self._lock:
                del self._under_way[key]
        return mine.result()

    def _look_up(self, url: str, key: str, body: dict[str, Any]) -> dict[str, Any]:
        """Returns the answer that is stored, or else the API's, which then is."""
        known = self._await_turn(key)
        if known is not None:
            return known
        try:
            return self._pay(url, key, body)
        except BaseException:
            transact(lambda session: release_request(session, self._taken.tenant_id, self._taken.job_id, key))
            raise

    def _await_turn(self, key: str) -> dict[str, Any] | None:
        """Returns the answer that is stored, if need be once another job of the tenant has it; None if it is ours."""
        while True:
            known, is_ours = transact(lambda session: self._take(session, key))
            if known is not None or is_ours:
                return known
            if self._closing.wait(POLL_S):
                what = "The stage ended while another job waited for the same answer."
                raise StageFailed("teacher_unavailable", what, retryable=True)

    def _take(self, session: Session, key: str) -> tuple[dict[str, Any] | None, bool]:
        """Returns the answer that is stored, or None and whether we may now send the request."""
        tenant_id, job_id = self._taken.tenant_id, self._taken.job_id
        known = find_answer(session, tenant_id, key)
        seconds = self._teacher.timeout_s + LAST_PAUSE_S + STORING_S
        if known is not None or not take_request(session, tenant_id, job_id, key, seconds):
            return known, False
        known = find_answer(session, tenant_id, key)  # stored between the two
        if known is not None:
            release_request(session, tenant_id, job_id, key)
        return known, known is None

    def _pay(self, url: str, key: str, body: dict[str, Any]) -> dict[str, Any]:
        """Returns the API's answer, which is stored."""
        found = self._ask_until_answered(url, key, body)
        kept = {"text": found.text, "top": found.top, "is_cut": found.is_cut}
        self._keep(key, kept, found.cost)
        blind = next((name for name in ("max_tokens", "max_cost") if getattr(self._teacher, name) is not None), None)
        if blind and found.usage is None:
            what = f"The teacher's API does not tell how many tokens an answer takes, and teacher.{blind} needs that."
            hint = f"Set teacher.max_requests in place of teacher.{blind}; what was answered is kept."
            raise StageFailed("teacher_unavailable", what, suggestion=hint)
        return kept

    def _keep(self, key: str, answer: dict[str, Any], cost: Spent) -> None:
        tenant_id, job_id = self._taken.tenant_id, self._taken.job_id
        transact(lambda session: keep_answer(session, tenant_id, job_id, key, answer, cost))

    def _open_one(self) -> None:
        """Counts an open request. Raises StageFailed when the budget has no room, or the asking has ended."""
        with self._lock:
            if self._error is not None:
                raise self._error
            over = find_excess(self._teacher, self._spent, self._num_open)
            if over:
                raise StageFailed(
                    "budget_exhausted",
                    f"The teacher's {over} is reached: {self._spent.requests} answers, {self._spent.prompt_tokens} "
                    f"tokens of prompts and {self._spent.completion_tokens} of answers are paid for; all that could be "
                    "read are kept.",
                    suggestion=f"Raise teacher.{over} and submit the job again: it asks only for what is left.",
                )
            self._num_open += 1

    def _close_one(self, cost: Spent) -> None:
        with self._lock:
            self._num_open -= 1
            self._spent = Spent(*(total + one for total, one in zip(self._spent, cost, strict=True)))

    def _ask_until_answered(self, url: str, key: str, body: dict[str, Any]) -> Answer:
        pause_s = FIRST_PAUSE_S
        for attempt in range(1, self._teacher.tries + 1):
            try:
                return self._ask_within_budget(url, key, body)
            except NoAnswer as error:
                if error.cost.requests:  # under a key that no request has, so that a later run counts it, too
                    self._keep(new_id("unread"), {}, error.cost)
                log.warning("attempt %d of %d at an answer: %s", attempt, self._teacher.tries, error)
                wait_s = max(error.pause_s, pause_s * random.uniform(0.5, 1.5))  # noqa: S311 - so that not all come at once
                if attempt == self._teacher.tries or self._closing.wait(min(wait_s, LAST_PAUSE_S)):
                    what = f"The teacher's API gave no answer in {attempt} attempts; the last: {error}"
                    hint = "See whether the API is up, and submit the job again: it asks only for what is left."
                    raise StageFailed("teacher_unavailable", what, suggestion=hint, retryable=True) from error
                pause_s *= 2
                transact(lambda session: self._take(session, key))  # for as long as the next attempt takes
        raise AssertionError

    def _ask_within_budget(self, url: str, key: str, body: dict[str, Any]) -> Answer:
        """Returns the API's answer. Raises StageFailed as `_open_one`, and NoAnswer."""
        self._open_one()
        cost = NOTHING
        try:
            found = self._ask_once(url, key, body)
            cost = found.cost
        except NoAnswer as error:
            cost = error.cost
            raise
        finally:
            self._close_one(cost)
        return found

    def _ask_once(self, url: str, key: str, body: dict[str, Any]) -> Answer:
        import httpx

        deadline = time.monotonic() + self._teacher.timeout_s
        try:
            with self._client.stream("POST", url, json=body, headers={"Idempotency-Key": key}) as response:
                content = _read(response, deadline)
        except httpx.LocalProtocolError as error:  # it shows the header that it refuses, which may be the key
            raise NoAnswer("the request cannot be sent; is the key as the API gave it?") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise NoAnswer(self._show(f"{type(error).__name__}: {error}")) from error
        shown = self._show(content.decode("utf-8", "replace"))
        if response.status_code in PASSING:
            raise NoAnswer(f"{response.status_code}: {shown}", _pause_of(response))
        if response.status_code != 200:
            raise StageFailed(
                "teacher_unavailable",
                f"The teacher's API refuses: {response.status_code}: {shown}",
                suggestion="Check base_url, model, secret and options of the teacher.",
            )
        try:
            return read_answer(self._teacher.endpoint, json.loads(content))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            message = f"not an answer of this API: {type(error).__name__} in {shown}"
            raise NoAnswer(message, cost=read_cost(content)) from error

    def _show(self, text: str) -> str:
        """Returns the beginning of what is told others, without the key."""
        return _sound(text.replace(self._secret, "***") if self._secret else text)[:SHOWN]


def find_excess(teacher: Any, spent: Spent, num_open: int) -> str | None:
    """Returns the budget that one more request would overdraw; open ones count as requests, their tokens not yet."""
    cost = (spent.prompt_tokens * teacher.prompt_price + spent.completion_tokens * teacher.completion_price) / 1e6
    used = {
        "max_requests": spent.requests + num_open,
        "max_tokens": spent.prompt_tokens + spent.completion_tokens,
        "max_cost": cost,
    }
    limits = {name: getattr(teacher, name) for name in used}
    return next((name for name, limit in limits.items() if limit is not None and used[name] >= limit), None)


def read_answer(endpoint: str, data: dict[str, Any]) -> Answer:
    """Returns what is kept of an answer in the shapes of the OpenAI API. Raises ValueError, KeyError and the like."""
    choice = data["choices"][0]
    told = choice.get("logprobs") or {}
    text = (choice["message"]["content"] or "") if endpoint == "chat" else choice["text"]
    if "content" in told:  # of a chat; llama.cpp gives completions this shape, too
        places = told["content"] or []
        tokens = [place["token"] for place in places]
        tops = [[(one["token"], one["logprob"]) for one in place["top_logprobs"]] for place in places]
    else:
        tokens = told.get("tokens") or []
        tops = [list(place.items()) for place in told.get("top_logprobs") or []]
    first = next((_by_text(top) for token, top in zip(tokens, tops, strict=False) if token.strip() and top), None)
    return Answer(_sound(text), first, choice.get("finish_reason") == "length", _read_usage(data))


def read_cost(content: bytes) -> Spent:
    """Returns what is paid for an answer that cannot be read: a request, and the tokens if these can."""
    try:
        return Spent(1, *(_read_usage(json.loads(content)) or (0, 0)))
    except (ValueError, TypeError, AttributeError):
        return Spent(1, 0, 0)


def _read_usage(data: dict[str, Any]) -> tuple[int, int] | None:
    told = data.get("usage") or {}
    usage = int(told.get("prompt_tokens") or 0), int(told.get("completion_tokens") or 0)
    return usage if any(usage) else None


def _by_text(top: list[tuple[str, float]]) -> dict[str, float]:
    """Returns log p by text; tokens of one text, such as a letter and its byte, are together as likely as their sum."""
    found: dict[str, float] = {}
    for token, log_p in top:
        text, one = _sound(token), float(log_p)
        more, less = max(one, found.get(text, -math.inf)), min(one, found.get(text, -math.inf))
        found[text] = more + math.log1p(math.exp(less - more)) if less > -math.inf else more
    return found


def _sound(text: str) -> str:
    """Returns a text as the database takes it. Raises AttributeError if it is none."""
    return text.replace("\x00", "").encode("utf-8", "replace").decode()


def as_failure(error: Exception) -> StageFailed:
    """Returns an error as the child raises it again: itself, or what a fault of ours means to the stage."""
    if isinstance(error, StageFailed):
        return error
    if isinstance(error, StillhouseError):
        return StageFailed("teacher_unavailable", error.message, retryable=True)
    log.error("a request failed here", exc_info=error)
    return StageFailed("teacher_unavailable", f"{type(error).__name__} in the worker; see its log", retryable=True)


def _check_host(base_url: str) -> None:
    if not get_settings().may_ask(base_url):
        raise StageFailed(
            "teacher_unavailable",
            f"This worker may not ask '{urlsplit(base_url).netloc}'.",
            suggestion="Its operator allows hosts with STILLHOUSE_TEACHER_HOSTS.",
        )


def _read(response: "httpx.Response", deadline: float) -> bytes:
    """Returns the whole body. Raises NoAnswer past the deadline: the client's own limit is on each part of it alone."""
    content, is_late = b"", False
    for chunk in response.iter_bytes():
        if is_late:
            raise NoAnswer("the answer was still coming at the end of timeout_s")
        content += chunk
        if len(content) > MAX_ANSWER_BYTES:
            raise NoAnswer(f"an answer of more than {MAX_ANSWER_BYTES:,} bytes")
        is_late = time.monotonic() > deadline  # one that is whole by then is paid for, and not asked for again
    return content


def _pause_of(response: "httpx.Response") -> float:
    try:
        return max(0.0, float(response.headers.get("Retry-After", 0)))
    except ValueError:
        return 0.0  # a date; our own pause is as good
