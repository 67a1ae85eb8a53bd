"""The client's two forms: calls that block, and calls that are awaited.

What the client does is written once, with `async`. `Async` runs it as it stands. `Sync` blocks its thread wherever
`Async` would pause, so a coroutine comes to its end at its first step, and no event loop is needed.
"""

import asyncio
import queue
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import asynccontextmanager, suppress
from functools import update_wrapper
from types import MethodType
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, overload

import httpx

P = ParamSpec("P")
Taker = TypeVar("Taker")  # what a method belongs to
Returned = TypeVar("Returned")
Awaited = TypeVar("Awaited")
Item = TypeVar("Item")
IsOver = Callable[[], bool]  # asked often by work that runs beside other work, for a thread ends only by itself
Join = Callable[[float], Awaitable[None]]
AT_ONCE = 100  # requests of one client; streams are not counted, as each may stay open for hours


class Sync:
    """Blocks the thread; what runs at once runs in threads."""

    def __init__(self, **settings: Any) -> None:
        self.http = httpx.Client(**settings)

    def begin(self, work: Any) -> Any:
        """Returns what a coroutine returns, or an iterator over what an async iterator yields."""
        return _iterate(work) if isinstance(work, AsyncGenerator) else run(work)

    async def send(self, request: httpx.Request, *, stream: bool = False) -> httpx.Response:
        """Returns the answer, read whole unless it is a stream."""
        return self.http.send(request, stream=stream)

    async def read(self, response: httpx.Response) -> None:
        """Reads a streamed answer whole."""
        response.read()

    async def chunks(self, response: httpx.Response) -> AsyncIterator[bytes]:
        """Yields a streamed answer's bytes as they come."""
        for chunk in response.iter_bytes():
            yield chunk

    async def end(self, response: httpx.Response) -> None:
        """Ends a streamed answer, read or not."""
        response.close()

    async def close(self) -> None:
        """Closes the connections."""
        self.http.close()

    async def sleep(self, seconds: float) -> None:
        """Waits."""
        time.sleep(seconds)

    async def compute(self, function: Callable[P, Returned], *args: P.args, **kwargs: P.kwargs) -> Returned:
        """Returns what a function returns that takes long."""
        return function(*args, **kwargs)

    async def each(
        self, work: Callable[[Item, IsOver], Coroutine[Any, Any, None]], items: Iterable[Item], parallel: int
    ) -> None:
        """Does the work for each item, some at a time. Raises what one raised, when the others have ended, too."""
        over = threading.Event()
        with ThreadPoolExecutor(parallel) as pool:
            futures = [pool.submit(lambda item: run(work(item, over.is_set)), item) for item in items]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                over.set()
                pool.shutdown(cancel_futures=True)
                raise

    @asynccontextmanager
    async def beside(self, work: Callable[[IsOver], Coroutine[Any, Any, None]]) -> AsyncIterator[Join]:
        """Has some work done beside what is in the context; yields a function that waits some seconds for its end."""
        over = threading.Event()
        thread = threading.Thread(target=lambda: run(work(over.is_set)), daemon=True)
        thread.start()

        async def join(timeout_s: float) -> None:
            thread.join(timeout_s)

        try:
            yield join
        finally:
            over.set()

    def queue(self) -> "queue.SimpleQueue[Any]":
        """Returns a queue from one work to another."""
        return queue.SimpleQueue()

    async def take(self, waiting: Any, timeout_s: float) -> list[Any]:
        """Returns what is in a queue, after waiting for the first of it."""
        with suppress(queue.Empty):
            return [waiting.get(timeout=timeout_s), *(waiting.get() for _ in range(waiting.qsize()))]
        return []


class Async:
    """Pauses the coroutine, so that the event loop of asyncio does other work; what runs at once runs in tasks."""

    def __init__(self, **settings: Any) -> None:
        self.http = httpx.AsyncClient(**settings)
        self._slots = asyncio.Semaphore(AT_ONCE)

    def begin(self, work: Any) -> Any:
        """Returns the coroutine or async iterator itself."""
        return work

    async def send(self, request: httpx.Request, *, stream: bool = False) -> httpx.Response:
        """Returns the answer, read whole unless it is a stream."""
        if stream:
            return await self.http.send(request, stream=True)
        async with self._slots:
            return await self.http.send(request)

    async def read(self, response: httpx.Response) -> None:
        """Reads a streamed answer whole."""
        await response.aread()

    async def chunks(self, response: httpx.Response) -> AsyncIterator[bytes]:
        """Yields a streamed answer's bytes as they come."""
        async for chunk in response.aiter_bytes():
            yield chunk

    async def end(self, response: httpx.Response) -> None:
        """Ends a streamed answer, read or not."""
        await response.aclose()

    async def close(self) -> None:
        """Closes the connections."""
        await self.http.aclose()

    async def sleep(self, seconds: float) -> None:
        """Waits."""
        await asyncio.sleep(seconds)

    async def compute(self, function: Callable[P, Returned], *args: P.args, **kwargs: P.kwargs) -> Returned:
        """Returns what a function returns that takes long."""
        return await asyncio.to_thread(function, *args, **kwargs)

    async def each(
        self, work: Callable[[Item, IsOver], Coroutine[Any, Any, None]], items: Iterable[Item], parallel: int
    ) -> None:
        """Does the work for each item, some at a time. Raises what one raised, when the others have ended, too."""
        slots = asyncio.Semaphore(parallel)

        async def one(item: Item) -> None:
            async with slots:
                await work(item, _never)

        try:
            async with asyncio.TaskGroup() as group:
                for item in items:
                    group.create_task(one(item))
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None

    @asynccontextmanager
    async def beside(self, work: Callable[[IsOver], Coroutine[Any, Any, None]]) -> AsyncIterator[Join]:
        """Has some work done beside what is in the context; yields a function that waits some seconds for its end."""
        task = asyncio.create_task(work(_never))

        async def join(timeout_s: float) -> None:
            await asyncio.wait({task}, timeout=timeout_s)

        try:
            yield join
        finally:
            task.cancel()
            await asyncio.wait({task})

    def queue(self) -> "asyncio.Queue[Any]":
        """Returns a queue from one work to another."""
        return asyncio.Queue()

    async def take(self, waiting: Any, timeout_s: float) -> list[Any]:
        """Returns what is in a queue, after waiting for the first of it."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                return [await waiting.get(), *(waiting.get_nowait() for _ in range(waiting.qsize()))]
        return []


F = TypeVar("F", bound=Sync | Async)


class Formed(Generic[F]):
    """Something whose operations are of the form F."""

    @property
    def _form(self) -> F:
        raise NotImplementedError


class Operation(Generic[Taker, P, Returned, Awaited]):
    """A method of both forms: blocking ones return `Returned`, the others `Awaited`.

    Of the class, as in `Jobs.get(self, job_id)`, it is the `async` function that it was made of, whatever the form.
    """

    def __init__(self, function: Callable[Concatenate[Taker, P], Awaited]) -> None:
        def method(taker: Any, /, *args: P.args, **kwargs: P.kwargs) -> Any:
            return taker._form.begin(function(taker, *args, **kwargs))

        self.__doc__ = function.__doc__
        self._function = function
        self._method = update_wrapper(method, function)

    def __call__(self, taker: Taker, /, *args: P.args, **kwargs: P.kwargs) -> Awaited:  # noqa: D102 (as the class says)
        return self._function(taker, *args, **kwargs)

    @overload
    def __get__(self, taker: None, owner: Any) -> "Operation[Taker, P, Returned, Awaited]": ...
    @overload
    def __get__(self, taker: Formed[Sync], owner: Any) -> Callable[P, Returned]: ...
    @overload
    def __get__(self, taker: Formed[Async], owner: Any) -> Callable[P, Awaited]: ...
    def __get__(self, taker: Any, owner: Any) -> Any:
        return self if taker is None else MethodType(self._method, taker)


def call(
    function: Callable[Concatenate[Taker, P], Coroutine[Any, Any, Item]],
) -> Operation[Taker, P, Item, Coroutine[Any, Any, Item]]:
    """Makes a method of an async function: blocking ones return what the others are awaited for."""
    return Operation(function)


def iterate(
    function: Callable[Concatenate[Taker, P], AsyncIterator[Item]],
) -> Operation[Taker, P, Iterator[Item], AsyncIterator[Item]]:
    """Makes a method of a function that returns an async iterator: blocking ones return a plain iterator."""
    return Operation(function)


def run(work: Coroutine[Any, Any, Item]) -> Item:
    """Returns what a coroutine of the blocking form returns."""
    try:
        work.send(None)
    except StopIteration as done:
        returned: Item = done.value
        return returned
    raise RuntimeError("A coroutine of the blocking form paused.")


def _iterate(items: AsyncGenerator[Item, None]) -> Iterator[Item]:
    async def advance() -> Item:
        return await anext(items)

    try:
        while True:
            try:
                item = run(advance())
            except StopAsyncIteration:
                return
            yield item
    finally:
        run(items.aclose())


def _never() -> bool:
    return False
