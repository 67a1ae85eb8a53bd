"""The Celery app object and hints.

A message never names a job: it says "look at the table". So a lost, repeated or forged message is harmless.
"""

import logging
import threading
from contextlib import suppress
from functools import cache
from queue import Full, Queue
from typing import TYPE_CHECKING

from core.settings import get_settings

if TYPE_CHECKING:
    from celery import Celery

QUEUES = ("cpu", "gpu")
TASK_RUN = "stillhouse.run"
log = logging.getLogger(__name__)


@cache
def get_celery() -> "Celery":
    """Returns the Celery app, with the settings that keep hints harmless and cheap."""
    import kombu
    from celery import Celery  # a tenth of a second that only those who send or take hints need

    app = Celery("stillhouse", broker=get_settings().redis_url)
    app.conf.update(
        task_acks_late=False,  # the database lease protects the work, not the message
        task_reject_on_worker_lost=False,
        task_ignore_result=True,
        task_queues=[kombu.Queue(name) for name in QUEUES],
        task_default_queue="cpu",
        task_create_missing_queues=False,
        task_serializer="json",
        accept_content=["json"],
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_concurrency=1,
        worker_enable_remote_control=False,
        worker_soft_shutdown_timeout=0,
        worker_hijack_root_logger=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "global_keyprefix": "stillhouse:",
            "visibility_timeout": 3600,
            "socket_keepalive": True,
            "socket_connect_timeout": 2,
            "socket_timeout": 10,
            "health_check_interval": 25,
            "retry_on_timeout": True,
            "max_retries": 0,  # of a hint's connection: the next hint tries again
        },
    )
    return app


def prepare() -> None:
    """Imports what a hint needs, the client of the broker too, without asking the broker for anything."""
    get_celery().connection_for_write().transport  # noqa: B018 (it is made when it is asked for)


def hint(queue: str) -> None:
    """Tells an idle worker of `queue` to look at the table, soon and at best: nobody waits for the broker.

    A thread sends the hints one by one. A broker that hangs keeps it for a while; what does not fit into its list
    meanwhile is dropped.
    """
    _start_sender()
    with suppress(Full):
        _waiting.put_nowait(queue)


_waiting: Queue[str] = Queue(maxsize=1000)


@cache
def _start_sender() -> None:
    threading.Thread(target=_send_all, name="hints", daemon=True).start()


def _send_all() -> None:
    while True:
        queue = _waiting.get()
        try:
            get_celery().send_task(TASK_RUN, queue=queue, kwargs={"queue": queue}, retry=False, expires=3600)
        except Exception as error:  # the broker's client raises many types, and none may end the thread
            log.warning("hint not sent: %s", type(error).__name__)
