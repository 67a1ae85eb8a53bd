"""Where the server is and with which key: arguments, then the environment, then a local stack that runs."""

import json
import os
from pathlib import Path
from typing import Any

from stillhouse.errors import NotConfigured
from stillhouse.folders import default_data_dir
from stillhouse.processes import is_alive


def find_stack(data_dir: Path) -> dict[str, Any] | None:
    """Returns the description of the local stack that runs on the data folder, or None."""
    try:
        found = json.loads((data_dir / "stack.json").read_text())
        return found if isinstance(found, dict) and is_alive(int(found["pid"])) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def resolve(url: str | None, api_key: str | None) -> tuple[str, str]:
    """Returns the server's address and the API key. Raises NotConfigured, saying what to set."""
    url = url or os.environ.get("STILLHOUSE_URL")
    api_key = api_key or os.environ.get("STILLHOUSE_API_KEY")
    if not url or not api_key:
        stack = find_stack(default_data_dir())
        if stack is not None and url in (None, "", stack["url"]):
            url = str(stack["url"])
            api_key = api_key or _read_key(Path(str(stack["key_file"])))
    if not url:
        raise NotConfigured(
            "No server is known: set STILLHOUSE_URL and STILLHOUSE_API_KEY, or start one here with `stillhouse up`."
        )
    if not api_key:
        raise NotConfigured(f"No API key for {url}: set STILLHOUSE_API_KEY.")
    return url.rstrip("/"), api_key


def _read_key(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError as error:
        raise NotConfigured(f"Cannot read the local stack's key in {path}: {error.strerror}.") from error
