"""What the jobs have in common whose teacher is behind an API."""

from typing import Any

from cryptography.fernet import Fernet

from tests.e2e.stack import Stack

SETTINGS = {"STILLHOUSE_SECRET_KEY": Fernet.generate_key().decode(), "STILLHOUSE_TEACHER_HOSTS": "127.0.0.1"}
ROWS = {"train": 180, "validation": 45, "test": 60}  # of the data set `toy`
DISTILL = {
    "kind": "distill",
    "epochs": 20,
    "learning_rate": 2e-3,
    "head_learning_rate": 1e-2,
    "batch_size": 16,
    "losses": [{"kind": "forward_kl", "temperature": 1.0}],
}


def submit(stack: Stack, url: str, stages: list[dict[str, Any]] | None = None, **teacher: Any) -> str:
    described = {"kind": "openai", "base_url": url, "model": "big", "secret": "teacher-key", "tries": 3}
    return stack.submit(
        teacher=described | teacher,
        student={"kind": "pretrained", "model": "small"},
        stages=stages or [{"kind": "answer"}],
    )
