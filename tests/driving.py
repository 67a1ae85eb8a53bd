"""Both forms of the client behind one face, so that one test says what both do."""

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from stillhouse import AsyncClient, Client
from stillhouse.forms import Async, Sync
from stillhouse.jobs import Job
from stillhouse.transport import Group

FORMS = {"sync": (Client, Sync), "async": (AsyncClient, Async)}


class Settled:
    """An object of the client; what its methods return to be awaited or iterated is done on an event loop."""

    def __init__(self, target: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._target = target
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._target, name)
        if not callable(found):
            return self._settle(found)
        return lambda *args, **kwargs: self._settle(found(*args, **kwargs))

    def _settle(self, made: Any) -> Any:
        if isinstance(made, AsyncIterator):
            return self._iterate(made)
        if isinstance(made, Coroutine):
            return self._settle(asyncio.run_coroutine_threadsafe(made, self._loop).result())
        return Settled(made, self._loop) if isinstance(made, Group | Job) else made

    def _iterate(self, items: Any) -> Iterator[Any]:
        async def advance() -> Any:
            return await anext(items, self)

        try:
            while (item := self._settle(advance())) is not self:
                yield item
        finally:
            self._settle(items.aclose())


@contextmanager
def looping() -> Iterator[asyncio.AbstractEventLoop]:
    """Yields an event loop that runs in a thread."""
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        try:
            yield loop
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()


@contextmanager
def opened(form: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
    """Yields a client of the form."""
    with looping() as loop:
        client = Settled(FORMS[form][0](*args, **kwargs), loop)
        try:
            yield client
        finally:
            client.close()
