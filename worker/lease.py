"""The heartbeat of one claim, in a thread of its own."""

import logging
import threading
import time

from core.db import DatabaseAway, session_scope
from core.errors import LeaseLost
from core.jobs.ownership import Claim, heartbeat
from core.settings import get_settings

log = logging.getLogger(__name__)


class Lease:
    """Keeps a claim alive; used in a `with` block.

    `lost` is set when somebody else owns the job, or when no heartbeat was confirmed for a whole lease: then another
    worker may have taken over, and this one must stop its child.
    """

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self.lost = threading.Event()
        self._done = threading.Event()
        self._confirmed = time.monotonic()
        self._thread = threading.Thread(target=self._beat, name=f"lease-{claim.job_id}", daemon=True)

    def __enter__(self) -> "Lease":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _beat(self) -> None:
        settings = get_settings()
        while not self._done.wait(settings.heartbeat_s):
            try:
                with session_scope() as session:
                    heartbeat(session, self.claim)
                self._confirmed = time.monotonic()
            except LeaseLost:
                self.lost.set()
                return
            except Exception as error:  # whatever it is, only a confirmed heartbeat keeps the claim
                away = isinstance(error, DatabaseAway)
                log.warning("heartbeat of %s not confirmed: %r", self.claim.job_id, error, exc_info=not away)
                if time.monotonic() - self._confirmed > settings.lease_s:
                    self.lost.set()
                    return
