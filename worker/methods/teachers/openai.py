"""A teacher behind an OpenAI-compatible API."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, JsonValue

from core.methods import Api, Problem, Teacher
from core.prompts import find_missing

if TYPE_CHECKING:
    from torch import Tensor

    from core.jobs.spec import JobSpec
    from worker.engine.context import StageContext
    from worker.engine.data import Examples

HOW = {"secret", "concurrency", "timeout_s", "tries"}  # settings that change no answer
LABEL_PROMPT = "Classify the text. Answer with one of these labels and nothing else: {labels}\n\nText: {text}\n\nLabel:"
BUDGETS = {"max_requests", "max_tokens", "max_cost", "prompt_price", "completion_price"}


class OpenAI(Teacher):
    """A model behind an OpenAI-compatible API, which is asked for the label of each text, or to write texts.

    A language model's teacher writes what follows each prompt (stage `generate`), whatever its tokens are. Of labels,
    where the API tells the likeliest tokens of an answer, each has the probability of those that begin its word; where
    it does not, the label that the answer names is taken, or with `top_logprobs: 0` those of `votes` answers are
    counted. Of a text whose answers name none the student hears nothing, and learns its own label at most; losses that
    hear the teacher do without it. Each answer is paid for once: it is kept for the tenant by the content of its
    request, so that neither a crash nor a second job asks again.

    Paper: Gilardi, Alizadeh, Kubli 2023, "ChatGPT outperforms crowd workers for text-annotation tasks" (labels by an
    API); Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network" (their probabilities as targets).
    """

    kind: Literal["openai"] = "openai"
    base_url: str = Field(
        "https://api.openai.com/v1",
        max_length=2000,
        description="Address of the API, up to what comes before `/chat/completions`.",
    )
    model: str = Field(description="The model's name at the API.", max_length=200, examples=["gpt-4o-mini"])
    secret: str | None = Field(
        None, max_length=96, description="Name of the stored secret that holds the API's key; none, if it needs none."
    )
    endpoint: Literal["chat", "completions"] = Field(
        "chat", description="`chat` sends `prompt` as a user's message, `completions` as the text to be gone on with."
    )
    system: str | None = Field(None, max_length=20_000, description="System message of a chat.")
    prompt: str | None = Field(
        None,
        max_length=100_000,
        description="What is asked; `{text}` stands for the text, `{pair}` for a second one, `{labels}` for all words. "
        f"Null is for a label {LABEL_PROMPT!r}, and of a language model's teacher the prompt as it is.",
    )
    words: dict[str, str] = Field(
        {}, max_length=10_000, description="What the answer is to say for a label, if that is not its name."
    )
    top_logprobs: int = Field(
        20, ge=0, le=20, description="Tokens whose probability is asked for; 0 counts answers instead."
    )
    votes: int = Field(1, ge=1, le=64, description="Answers for each text; more than one need `top_logprobs: 0`.")
    smoothing: float = Field(
        0.1, gt=0, le=10, description="Added to each label's count of votes, so that none is impossible."
    )
    answer_tokens: int = Field(16, ge=1, le=4096, description="Longest answer in tokens.")
    options: dict[str, JsonValue] = Field(
        {}, max_length=32, description="Further fields of each request, or others in place of ours; null removes one."
    )
    max_unreadable: float = Field(
        0.5, ge=0, le=1, description="The stage fails if a larger share of the texts gets an answer without a label."
    )
    concurrency: int = Field(8, ge=1, le=64, description="Requests at the same time.")
    timeout_s: float = Field(60.0, gt=0, le=600, description="How long one answer may take.")
    tries: int = Field(
        6, ge=1, le=20, description="Attempts at one answer: after 429, a server's error or half an answer, it waits."
    )
    max_requests: int | None = Field(
        None, ge=1, description="The job pays for so many answers, whether they can be read or not, then fails."
    )
    max_tokens: int | None = Field(None, ge=1, description="The same for tokens, of prompts and answers together.")
    max_cost: float | None = Field(None, gt=0, description="The same for money, by the two prices.")
    prompt_price: float = Field(0.0, ge=0, description="Price of a million tokens of prompts.")
    completion_price: float = Field(0.0, ge=0, description="Price of a million tokens of answers.")

    def check(self, spec: "JobSpec") -> list[Problem]:
        """Returns what is wrong with the task, the address, the prompt or the budget."""
        problems = []
        if spec.task.kind not in {"text_classification", "causal_lm"}:
            problems.append(Problem("kind", f"'openai' gives labels or texts, and a {spec.task.kind} needs neither"))
        if not is_address(self.base_url):
            problems.append(Problem("base_url", "this is no http(s) address such as 'https://api.openai.com/v1'"))
        if self.votes > 1 and self.top_logprobs:
            why = "votes are counted where no probabilities are asked for; set top_logprobs to 0, or leave votes out"
            problems.append(Problem("votes", why))
        if self.system is not None and self.endpoint != "chat":
            problems.append(Problem("system", "a completion has none; write it into the prompt, or use 'chat'"))
        asked = self.prompt if spec.task.kind == "causal_lm" else self.label_prompt
        problems += [] if asked is None else find_missing(asked, spec.task)
        if self.max_cost is not None and not self.prompt_price + self.completion_price:
            problems.append(Problem("max_cost", "costs need prompt_price and completion_price; both are 0"))
        return problems

    @property
    def label_prompt(self) -> str:
        """What is asked for a label."""
        return self.prompt or LABEL_PROMPT

    def api(self) -> Api:
        """Returns the API's address and the name of its key."""
        return Api(self.base_url, self.secret)

    def content(self) -> dict[str, Any]:
        """Returns the settings on which the answers depend."""
        return self.model_dump(mode="json", exclude=HOW | BUDGETS)

    def build(self, ctx: "StageContext") -> "Callable[[Examples, int], Tensor]":
        """Returns what asks for the labels of texts."""
        from worker.engine.asking import speak_by_asking

        return speak_by_asking(ctx, self)


def is_address(url: str) -> bool:
    """Returns whether a URL is an http(s) address without user, query and fragment."""
    try:
        address = urlsplit(url)
        _ = address.port  # raises ValueError for one that cannot be
    except ValueError:
        return False
    is_plain = not (address.query or address.fragment or address.username or re.search(r"[\s\x00-\x1f]", url))
    return address.scheme in {"http", "https"} and bool(address.hostname) and is_plain
