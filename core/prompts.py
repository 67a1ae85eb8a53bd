"""Prompts that hold marks for the texts of an example."""

from core.methods import Problem, Task

MARKS = {"text": "the text", "pair": "the second text, which the task names"}


def find_missing(prompt: str, task: Task) -> list[Problem]:
    """Returns which of an example's texts a prompt would leave out."""
    marks = ["text", *(name for name in task.columns() if name == "pair")]
    return [
        Problem("prompt", f"'{{{mark}}}', which stands for {MARKS[mark]}, is missing")
        for mark in marks
        if f"{{{mark}}}" not in prompt
    ]
