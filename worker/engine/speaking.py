"""Teachers that answer texts with a score for each label."""

import math
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from core.errors import StageFailed
from worker.engine import ranks
from worker.engine.context import StageContext
from worker.engine.data import Examples
from worker.engine.devices import autocast
from worker.engine.inference import predict_logits
from worker.engine.loading import count_positions, input_names, limit_length, load_language_model, refuse_new_head
from worker.engine.next_tokens import predict_next
from worker.engine.sharding import is_sharded
from worker.kernels.heads import Head
from worker.kernels.mixtures import Mixture
from worker.kernels.signals import find_heard

if TYPE_CHECKING:
    from worker.engine.classification import Classification
    from worker.methods.teachers.ensemble import Ensemble
    from worker.methods.teachers.label_space import LabelSpace

Speak = Callable[[Examples, int], Tensor]
READ_TOKENS = 4096  # in one batch


def speak_as_classifier(ctx: StageContext) -> Speak:
    """Returns what gives the teacher's logits for examples, each cut at so many tokens."""
    return _speak_with(ctx, ctx.load_teacher(), ctx.load_tokenizer("teacher"))


def speak_as_ensemble(ctx: StageContext, settings: "Ensemble") -> Speak:
    """Returns what gives the common answer of several models to examples, each cut at so many tokens.

    Raises:
        StageFailed: `teacher_unavailable` for a model without a head for the job's labels.
    """
    speakers = [speak_as_one(ctx, role) for role in settings.sources()]
    weights = [member.weight for member in settings.members]

    def speak(examples: Examples, max_length: int) -> Tensor:
        if ctx.spec.task.gives_values:
            values_MN1 = torch.stack([one(examples, max_length) for one in speakers])
            return average_values(values_MN1, torch.tensor(weights, dtype=torch.float64))
        mixture = Mixture(by_entropy=settings.weighting == "entropy")
        for one, weight in zip(speakers, weights, strict=True):
            logits_NC = one(examples, max_length)
            mixture.add(logits_NC, weight, is_heard_N=find_heard(logits_NC))
        return mixture.logits()

    return speak


def speak_as_one(ctx: StageContext, role: str) -> Speak:
    """Returns what gives the logits of a model that is not trained in the job, for examples cut at so many tokens.

    Raises:
        StageFailed: `teacher_unavailable` if it has no head for the labels.
    """
    model = ctx.place(ctx.load_model(role)).eval()
    refuse_new_head(model, role.replace("_", " "), ctx.labels)
    return _speak_with(ctx, model, ctx.load_tokenizer(role))


def _speak_with(ctx: StageContext, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Speak:
    def speak(examples: Examples, max_length: int) -> Tensor:
        limit_length(model, tokenizer, max_length)
        data = cast("Classification", ctx.task).tokenise(examples, tokenizer, input_names(model, tokenizer))
        return predict_logits(model, data, ctx.check_stop)

    return speak


def average_values(values_MN1: Tensor, weights_M: Tensor) -> Tensor:
    """Returns the weighted mean over models, values_N1."""
    return torch.tensordot(weights_M / weights_M.sum(), values_MN1.double(), dims=1).float()


def speak_by_scoring(ctx: StageContext, settings: "LabelSpace") -> Speak:
    """Returns what scores the words of every label after the prompt with each example in it.

    Raises:
        StageFailed: `dataset_invalid` when `words` names a label that the data lack.
    """
    unknown = sorted(settings.words.keys() - set(ctx.labels))
    if unknown:
        message = f"teacher.words names the label '{unknown[0]}', which the training split lacks."
        raise StageFailed("dataset_invalid", message, suggestion=f"Known: {', '.join(ctx.labels[:20])}.")
    model = ctx.place(load_language_model(ctx.input("teacher"))).eval()
    words = [settings.words.get(label, f" {label}") for label in ctx.labels]
    tokenizer = ctx.load_tokenizer("teacher")
    scorer = Scorer(model, tokenizer, words, average=settings.average)

    def score(examples: Examples, max_length: int) -> Tensor:
        with autocast(ctx.device):
            return scorer.score(cut(examples, tokenizer, max_length).prompts(settings.prompt), ctx.check_stop)

    @cache
    def bias(max_length: int) -> Tensor:
        free = Examples(settings.content_free, [], settings.content_free)
        log_p_NC = score(free, max_length).log_softmax(dim=-1)
        return log_p_NC.logsumexp(dim=0) - math.log(len(log_p_NC))

    def speak(examples: Examples, max_length: int) -> Tensor:
        scores_NC = score(examples, max_length)
        return scores_NC - bias(max_length) if settings.content_free else scores_NC

    return speak


def cut(examples: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Examples:
    """Returns the examples with each text cut at so many tokens."""

    def shorten(texts: list[str]) -> list[str]:
        if not texts:
            return []
        read = tokenizer(
            texts, add_special_tokens=False, truncation=True, max_length=max_length, return_offsets_mapping=True
        )
        pairs = zip(texts, read["offset_mapping"], strict=True)
        return [text[: offsets[-1][1]] if offsets else text for text, offsets in pairs]

    return examples._replace(texts=shorten(examples.texts), pairs=examples.pairs and shorten(examples.pairs))


class Read(NamedTuple):
    """Tokens that are read for row `row`, and which ones are asked for after some of them.

    `asked` is `{position: {class: token}}`.
    """

    row: int
    ids: list[int]
    asked: dict[int, dict[int, int]]


class Scorer:
    """Scores words as the continuation of a prompt."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        words: list[str],
        *,
        average: bool = False,
    ) -> None:
        self._model, self._tokenizer, self._words, self._average = model, tokenizer, words, average
        self._limit = count_positions(model) or sys.maxsize

    def score(self, prompts: list[str], between: Callable[[], None]) -> Tensor:
        """Returns log p(words_c | prompt), or its mean over the tokens, scores_NC in float32.

        Processes that work together read a share each.

        Args:
            prompts: What is read before the words.
            between: Called after each batch; may raise to stop.
        """
        reads = [read for row, prompt in enumerate(prompts) for read in self._list_reads(row, prompt)]
        reads.sort(key=lambda read: -len(read.ids))
        if reads and len(reads[0].ids) > self._limit:
            message = (
                f"Prompt, text and words have {len(reads[0].ids)} tokens; the teacher has places for {self._limit}."
            )
            raise StageFailed("dataset_invalid", message, suggestion="Lower max_length of the answer stage.")
        scores_NC = torch.zeros(len(prompts), len(self._words))
        num_tokens_NC = torch.zeros_like(scores_NC)
        for batch, is_mine in ranks.turns(_batches(reads), in_step=is_sharded(self._model)):
            for row, wanted, log_p_V in self._read(batch):
                classes, tokens = list(wanted), list(wanted.values())
                if is_mine:
                    scores_NC[row, classes] += log_p_V[tokens]
                    num_tokens_NC[row, classes] += 1
            between()
        device = self._model.device
        scores_NC, num_tokens_NC = (ranks.add_up(x.to(device)).cpu() for x in (scores_NC, num_tokens_NC))
        return scores_NC / num_tokens_NC if self._average else scores_NC

    def _list_reads(self, row: int, prompt: str) -> Iterator[Read]:
        """Yields what must be read to score every label's words: one sequence where each is a single token.

        The words are tokenised with the prompt before them, as the model has learned to read them.
        """
        wholes = self._tokenizer([prompt + words for words in self._words])["input_ids"]
        context = self._tokenizer(prompt)["input_ids"]
        parts = [self._split(context, whole) for whole in wholes]
        if all(len(tail) == 1 and head == parts[0][0] for head, tail in parts):
            head = parts[0][0]
            yield Read(row, head, {len(head) - 1: {index: tail[0] for index, (_, tail) in enumerate(parts)}})
            return
        for index, (head, tail) in enumerate(parts):
            asked = {len(head) - 1 + place: {index: token} for place, token in enumerate(tail)}
            yield Read(row, head + tail[:-1], asked)

    def _read(self, batch: list[Read]) -> Iterator[tuple[int, dict[int, int], Tensor]]:
        """Yields for each place that is asked about its row, `{class: token}`, and log p of all tokens there."""
        ids_BT = np.zeros((len(batch), max(len(read.ids) for read in batch)), dtype=np.int64)
        is_row_BT = np.zeros_like(ids_BT, dtype=bool)
        for index, read in enumerate(batch):
            ids_BT[index, : len(read.ids)] = read.ids  # filled up on the right, where causal attention does not look
            is_row_BT[index, list(read.asked)] = True
        device = self._model.device
        with torch.no_grad():
            inputs = {"input_ids": torch.from_numpy(ids_BT).to(device)}
            answer = predict_next(self._model, inputs, torch.from_numpy(is_row_BT).to(device))
            logits_NV = answer.logits() if isinstance(answer, Head) else answer.float()
            log_p_NV = F.log_softmax(logits_NV, dim=-1).cpu()
        places = [(read.row, read.asked[place]) for read in batch for place in sorted(read.asked)]
        for (row, wanted), log_p_V in zip(places, log_p_NV, strict=True):
            yield row, wanted, log_p_V

    def _split(self, context: list[int], whole: list[int]) -> tuple[list[int], list[int]]:
        """Returns what is read before the words, and the words' tokens: from where the two readings part.

        A tokenizer may join the prompt's last characters with the words' first ones, or end a text with a token of its
        own. Something must be read before the first token that is scored.
        """
        pairs = zip(context, whole, strict=False)
        place = next((index for index, (first, second) in enumerate(pairs) if first != second), len(context))
        start = [] if place else [self._tokenizer.bos_token_id or self._tokenizer.eos_token_id or 0]
        return start + whole[:place], whole[place:]


def _batches(reads: list[Read]) -> Iterator[list[Read]]:
    """Yields the reads, the longest first, in batches of at most so many tokens or of one."""
    start = 0
    while start < len(reads):
        size = max(1, READ_TOKENS // len(reads[start].ids))
        yield reads[start : start + size]
        start += size
