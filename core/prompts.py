"""Prompts: their marks for the texts of an example, and how long they may be."""

from core.methods import ModelFacts, Problem, Task

MARKS = {"text": "the text", "pair": "the second text, which the task names"}


def find_missing(prompt: str, task: Task) -> list[Problem]:
    """Returns which of an example's texts a prompt would leave out."""
    marks = ["text", *(name for name in task.columns() if name == "pair")]
    return [
        Problem("prompt", f"'{{{mark}}}', which stands for {MARKS[mark]}, is missing")
        for mark in marks
        if f"{{{mark}}}" not in prompt
    ]


def check_places(start: ModelFacts, prompt_tokens: int, new_tokens: int, role: str) -> list[Problem]:
    """Returns whether a model has fewer places than a prompt and what is written after it take."""
    places, wanted = start.num_positions, prompt_tokens + new_tokens
    if places is None or wanted <= places:
        return []
    why = f"it is {wanted} with prompt_tokens, and the {role} has places for {places} tokens; lower one of them"
    return [Problem("new_tokens", why)]
