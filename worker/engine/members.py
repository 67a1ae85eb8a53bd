"""Several language models that answer as one teacher."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from core.errors import StageFailed
from core.models.vocabulary import VocabularyDiffers, count_common
from worker.engine.blocks import Blocks
from worker.engine.data import Batch, check_tokens
from worker.engine.loading import count_positions
from worker.kernels.heads import Head
from worker.kernels.mixtures import Mixture

if TYPE_CHECKING:
    from worker.engine.context import StageContext
    from worker.methods.teachers.ensemble import Ensemble

SAME_TOKENS = "Name models that have the student's tokens; their probabilities are added token by token."


class Members(torch.nn.Module):
    """The models of an ensemble, where one model is asked for.

    Attributes:
        config: As of a model, the number of tokens and of positions that all of them have.
    """

    def __init__(self, models: dict[str, PreTrainedModel], num_tokens: dict[str, int], settings: "Ensemble") -> None:
        """Takes the models and how many tokens each has, by role."""
        super().__init__()
        self.models = torch.nn.ModuleDict(models)
        self._num_tokens, self._settings = num_tokens, settings
        longest = min(filter(None, map(count_positions, models.values())), default=None)
        self.config = SimpleNamespace(vocab_size=min(num_tokens.values()), max_position_embeddings=longest)

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return next(self.parameters()).device

    def answer(self, batch: Batch, answer: Callable[[PreTrainedModel, Batch], Head | torch.Tensor]) -> Mixture:
        """Returns the common answer to the rows of a batch; `answer` gives that of one model."""
        mixture = Mixture(by_entropy=self._settings.weighting == "entropy")
        for model, member in zip(self.models.values(), self._settings.members, strict=True):
            mixture.add(answer(cast("PreTrainedModel", model), batch), member.weight)
        return mixture

    def check(self, splits: dict[str, Blocks], tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises StageFailed if a split has a token that one of the models lacks."""
        role = min(self._num_tokens, key=lambda role: self._num_tokens[role])
        for split, data in splits.items():
            check_tokens(data.count_ids(), self.config.vocab_size, tokenizer, split, _call(role), SAME_TOKENS)


def load_members(ctx: "StageContext") -> tuple[PreTrainedModel | Members, PreTrainedTokenizerBase]:
    """Returns the teacher on the device, one language model or several as one, and the tokenizer that reads for it.

    Raises:
        StageFailed: `vocab_incompatible` if a model of an ensemble has other tokens than the first one.
    """
    if ctx.spec.teacher.is_model:
        return ctx.load_teacher(), ctx.load_tokenizer("teacher")
    settings = cast("Ensemble", ctx.spec.teacher)
    first, *others = settings.sources()
    tokenizers = {role: ctx.load_tokenizer(role) for role in (first, *others)}
    for role in others:
        names = f"the {_call(first)}'s tokenizer", f"the {_call(role)}'s"
        try:
            count_common(tokenizers[first].get_vocab(), tokenizers[role].get_vocab(), names)
        except VocabularyDiffers as error:
            message = f"The {_call(role)} has other tokens than the {_call(first)}: {error}."
            raise StageFailed("vocab_incompatible", message, suggestion=SAME_TOKENS) from error
    models = {role: ctx.place(ctx.load_model(role)) for role in tokenizers}
    num_tokens = {role: count_tokens(model, tokenizers[role]) for role, model in models.items()}
    return Members(models, num_tokens, settings).eval(), tokenizers[first]


def count_tokens(model: PreTrainedModel | Members, tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns how many ids, from 0 on, have both a token and a logit."""
    return int(min(model.config.vocab_size, max(tokenizer.get_vocab().values()) + 1))


def _call(role: str) -> str:
    return role.replace("_", " ")
