"""Logs of API and workers: lines of text, or of JSON with the ids of what they are about, its span among them."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime

from core import tracing
from core.settings import get_settings

TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
UVICORN = ("uvicorn", "uvicorn.error", "uvicorn.access")
_ids: ContextVar[dict[str, str]] = ContextVar("ids", default={})  # noqa: B039 (never changed, only replaced)


@contextmanager
def about(**ids: str) -> Iterator[None]:
    """Has every line that is logged within this tell these ids, such as `job_id`."""
    token = _ids.set(_ids.get() | ids)
    try:
        yield
    finally:
        _ids.reset(token)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, ids, what the call adds as `data`, and a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line."""
        told = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_ids.get(),
            **tracing.get_ids(),
            **getattr(record, "data", {}),
        }
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False, default=str)


def configure() -> None:
    """Sets the format of all that is logged in this process, by STILLHOUSE_LOG_FORMAT."""
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells addresses, which may hold what is secret
    if get_settings().log_format == "text":
        logging.basicConfig(level=logging.INFO, format=TEXT)
        return
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for name in UVICORN:  # which brings handlers of its own
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    logging.getLogger("uvicorn.access").disabled = True  # the gate tells the same, with ids and without the query
