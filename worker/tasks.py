"""The one task, and the loops that make a worker independent of the broker."""

import logging
import threading
from collections.abc import Callable

from core.db import DatabaseAway
from core.queue import TASK_RUN, get_celery
from core.settings import get_settings
from core.upkeep.collecting import collect_when_due
from core.webhooks.sending import send_due
from worker.reconciler import tick
from worker.supervisor import Supervisor

log = logging.getLogger(__name__)
supervisor = Supervisor()


@get_celery().task(name=TASK_RUN)
def run(queue: str) -> None:  # noqa: ARG001 - the message says where to look, the settings say what this worker may take
    """Looks at the table and runs what it finds."""
    supervisor.run_available()


def start_loops() -> None:
    """Starts polling, reconciling, sending and collecting, each in a thread of its own."""
    settings = get_settings()
    _start("poll", supervisor.run_available, settings.poll_s)
    _start("reconcile", tick, settings.reconcile_s)
    _start("send", send_all, settings.poll_s)
    _start("collect", collect_when_due, settings.collect_every_s)


def send_all() -> None:
    """Sends webhooks until none is due."""
    while send_due() and not supervisor.draining.is_set():
        pass


def _start(name: str, action: Callable[[], object], pause_s: float) -> None:
    def loop() -> None:
        while not supervisor.draining.is_set():
            try:
                action()
            except DatabaseAway as error:
                log.warning("%s: the database does not answer (%s)", name, type(error).__name__)
            except Exception:
                log.exception("%s failed; it goes on", name)
            supervisor.draining.wait(pause_s)

    threading.Thread(target=loop, name=name, daemon=True).start()
