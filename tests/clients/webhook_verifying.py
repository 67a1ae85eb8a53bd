"""What a receiver does with messages: prints as JSON what each library says of them. Needs nothing of this project.

    python webhook_verifying.py FILE

The file has `{"secret": …, "messages": [[headers, body], …]}`.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def list_libraries(secret: str) -> dict[str, Callable[[str, dict[str, str]], Any]]:
    """Returns what checks a message, of the libraries that are there."""
    found: dict[str, Callable[[str, dict[str, str]], Any]] = {}
    try:
        from standardwebhooks.webhooks import Webhook
    except ImportError:
        pass
    else:
        found["standardwebhooks"] = Webhook(secret).verify
    try:
        from openai import OpenAI
    except ImportError:
        pass
    else:
        webhooks = OpenAI(api_key="none").webhooks
        found["openai"] = lambda body, headers: webhooks.unwrap(body, headers, secret=secret).type
    return found


def said(check: Callable[[str, dict[str, str]], Any], body: str, headers: dict[str, str]) -> Any:
    """Returns what a library makes of a message, or the kind of its error."""
    try:
        return check(body, headers)
    except Exception as error:  # each library has errors of its own
        return type(error).__name__


def main(path: str) -> dict[str, list[Any]]:
    """Returns by library what it said of each message."""
    given = json.loads(Path(path).read_text())
    return {
        name: [said(check, body, headers) for headers, body in given["messages"]]
        for name, check in list_libraries(given["secret"]).items()
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(*sys.argv[1:])) + "\n")
