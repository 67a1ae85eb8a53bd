"""What `celery -A worker.celery_app worker` loads."""

from typing import Any

from celery.signals import setup_logging, worker_init, worker_shutdown, worker_shutting_down

import worker.tasks
from core import tracing
from core.logs import configure
from core.queue import get_celery
from worker.child import get_fork_server

app = get_celery()


@setup_logging.connect
def configure_logging(**_: Any) -> None:
    """Sets one log format for Celery and for us."""
    configure()


@worker_init.connect
def start(**_: Any) -> None:
    """Starts the loops before the broker is asked, so that a worker works without one."""
    configure()  # Celery asks for it only later, and until then what a loop logs would be lost
    tracing.configure("stillhouse-worker")
    worker.tasks.start_loops()


@worker_shutting_down.connect
def drain(**_: Any) -> None:
    """Asks the running stage to stop and its job to be handed back."""
    worker.tasks.supervisor.draining.set()


@worker_shutdown.connect
def finish(**_: Any) -> None:
    """Waits until the job is handed back, ends what forks the stages, and has the last spans sent."""
    worker.tasks.supervisor.wait_idle()
    get_fork_server().close()
    tracing.flush(tracing.LAST_FLUSH_S)
