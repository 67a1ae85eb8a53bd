"""Labels and texts from answers of an API; the supervisor, which has the key and the network, asks it for us."""

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from core.errors import StageFailed
from worker.engine.blocks import Written
from worker.engine.context import StageContext
from worker.engine.data import Examples, fill

if TYPE_CHECKING:
    from worker.methods.stages.generate import Generate
    from worker.methods.teachers.openai import OpenAI

LEAST = 1e-6  # probability of a label that nothing speaks for
SHOWN = 80


def speak_by_asking(ctx: StageContext, settings: "OpenAI") -> Callable[[Examples, int], Tensor]:
    """Returns what asks for the label of each text, and gives log p of all labels, zeros where no answer names one.

    Raises:
        StageFailed: `teacher_unavailable` when too many answers name no label, or whatever ended the asking.
    """
    words = [settings.words.get(label, label) for label in ctx.labels]
    _check_words(settings.words, words, ctx.labels)

    def speak(examples: Examples, max_length: int) -> Tensor:  # noqa: ARG001 - the API has a tokenizer of its own
        votes, prompts = settings.votes, examples.prompts(settings.label_prompt, labels=", ".join(words))
        answers = ctx.ask([make_label_request(settings, prompt, vote) for prompt in prompts for vote in range(votes)])
        grouped = [answers[start : start + votes] for start in range(0, len(answers), votes)]
        found = [read_labels(group, words, settings.smoothing) for group in grouped]
        unread = [group[0]["text"] for group, one in zip(grouped, found, strict=True) if one is None]
        if unread:
            tell_unread(ctx, settings, unread, len(prompts))
        nothing = torch.zeros(len(words))
        return torch.stack([nothing if one is None else one for one in found])

    return speak


def _check_words(given: dict[str, str], words: list[str], labels: list[str]) -> None:
    """Raises StageFailed before anything is paid, where a label has no word that an answer could be known by."""
    plain = [_plain(word) for word in words]
    if unknown := sorted(given.keys() - set(labels)):
        message = f"teacher.words has '{unknown[0]}', which is no label of the data."
        raise StageFailed("spec_invalid", message, suggestion=f"The labels are {', '.join(labels)[:500]}.")
    alike = [word for word, one in zip(words, plain, strict=True) if not one or plain.count(one) > 1]
    if alike:
        message = f"In an answer the labels {' and '.join(map(repr, alike[:2]))} cannot be told apart, or from nothing."
        raise StageFailed("spec_invalid", message, suggestion="Give each of them a word of its own in teacher.words.")


def tell_unread(ctx: StageContext, settings: "OpenAI", unread: list[str], num_texts: int) -> None:
    """Warns of texts whose answers name no label, of which the student hears nothing; fails if there are too many."""
    what = f"{len(unread)} of {num_texts} texts got an answer without a label, the first: '{unread[0][:SHOWN]}'."
    if len(unread) > settings.max_unreadable * num_texts:
        hint = "Tell the model in prompt to answer with a label alone, or set words to what it answers."
        raise StageFailed("teacher_unavailable", what, suggestion=hint)
    ctx.warn("answers_unreadable", what, num_unread=len(unread), num_texts=num_texts)


def write_by_asking(ctx: StageContext, settings: "OpenAI", prompts: Sequence[str], how: "Generate") -> list[Written]:
    """Returns what the API writes after each prompt."""
    asked = [fill(settings.prompt or "{text}", {"text": prompt}) for prompt in prompts]
    drawing = {"temperature": how.temperature, "max_tokens": how.new_tokens} | (
        {"seed": ctx.seed} if how.temperature else {}
    )
    answers = ctx.ask([make_request(settings, prompt, **drawing) for prompt in asked])
    # an answer that was kept before its end was told counts as whole
    return [Written(answer["text"].strip(), answer.get("is_cut", False)) for answer in answers]


def make_label_request(settings: "OpenAI", prompt: str, vote: int) -> dict[str, Any]:
    """Returns the body of the request for one label."""
    told: dict[str, Any] = {"max_tokens": settings.answer_tokens}
    if settings.top_logprobs and settings.endpoint == "completions":
        told |= {"logprobs": settings.top_logprobs}
    elif settings.top_logprobs:
        told |= {"logprobs": True, "top_logprobs": settings.top_logprobs}
    told |= {"temperature": 1.0, "seed": vote} if settings.votes > 1 else {"temperature": 0.0}
    return make_request(settings, prompt, **told)


def make_request(settings: "OpenAI", prompt: str, **fields: Any) -> dict[str, Any]:
    """Returns the body of a request for an answer to a prompt, with these fields besides."""
    system = [{"role": "system", "content": settings.system}] if settings.system else []
    chat = {"messages": [*system, {"role": "user", "content": prompt}]}
    body = {"model": settings.model} | (chat if settings.endpoint == "chat" else {"prompt": prompt})
    return {name: value for name, value in (body | fields | settings.options).items() if value is not None}


def read_labels(answers: Sequence[dict[str, Any]], words: Sequence[str], smoothing: float) -> Tensor | None:
    """Returns log p of the labels by one text's answers, `{"text", "top"}`; None if they name none."""
    plain = [_plain(word) for word in words]
    if len(answers) == 1 and answers[0].get("top"):
        found = read_probabilities(answers[0]["top"], plain)
        if found is not None:
            return found
    named = [name_label(answer["text"], plain) for answer in answers]
    counts = torch.tensor([float(named.count(index)) for index in range(len(words))])
    if not counts.any():
        return None
    return ((counts + smoothing) / (counts + smoothing).sum()).log()


def read_probabilities(top: dict[str, float], words: Sequence[str]) -> Tensor | None:
    """Returns log p of the labels by the likeliest first tokens, `{token: log p}`; None if they begin none.

    A token that begins several words counts for each with an equal share, one that goes on to a longer word (`her` for
    `he`) for none. Labels that none of the tokens begins share what all tokens leave of 1, but none has more than the
    least likely token told, of which there would be more.
    """
    p_C = torch.zeros(len(words), dtype=torch.float64)
    shown = {token: float(torch.tensor(log_p, dtype=torch.float64).exp()) for token, log_p in top.items()}
    for token, p in shown.items():
        start = _plain(token)
        hits = [index for index, word in enumerate(words) if start and (word.startswith(start) or _begins(word, start))]
        if hits:
            p_C[hits] += p / len(hits)
    if not p_C.any():
        return None
    unseen_C = p_C == 0
    left = max(0.0, 1.0 - sum(shown.values())) / max(1, int(unseen_C.sum()))
    p_C[unseen_C] = max(LEAST, min(left, min(shown.values())))
    return (p_C / p_C.sum()).log().float()


def name_label(text: str, words: Sequence[str]) -> int | None:
    """Returns the label that an answer names: the longest that it begins with, or the only one that it mentions."""
    answer = _plain(text)
    begun = [index for index, word in enumerate(words) if _begins(word, answer)]
    if begun:
        return max(begun, key=lambda index: len(words[index]))
    mentioned = [index for index, word in enumerate(words) if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", answer)]
    return mentioned[0] if len(mentioned) == 1 else None


def _begins(word: str, text: str) -> bool:
    """Returns whether a text begins with a word that ends there: with `he`, `he said` does, and `her` does not."""
    return re.match(rf"{re.escape(word)}(?!\w)", text) is not None


def _plain(text: str) -> str:
    return text.strip().strip("\"'`*.:,()[]").strip().casefold()
