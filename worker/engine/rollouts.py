"""Texts that the student writes itself, some steps ahead of their use."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from worker.engine.context import StageContext
from worker.engine.data import Batch
from worker.engine.generating import go_on

if TYPE_CHECKING:
    from worker.methods.stages.distill import OnPolicy

WRITTEN_AT_ONCE = 64
NOTHING = -1  # where a text has ended
Text = tuple[NDArray[np.int32], int]  # its tokens, and how many of them are the prompt


class Rollouts:
    """A store of texts by the student, filled for several steps at once.

    Which steps use it, after which prompts is written, and what is drawn, are pure functions of the seed and of the
    weights at the time of writing. Only the first `num_tokens` are written, where the teacher knows no others.
    """

    def __init__(
        self,
        ctx: StageContext,
        prompts: list[NDArray[np.int32]],
        tokenizer: PreTrainedTokenizerBase,
        settings: "OnPolicy",
        batch_size: int,
        num_tokens: int | None = None,
    ) -> None:
        self._ctx, self._prompts, self._settings, self._batch_size = ctx, prompts, settings, batch_size
        self._tokenizer, self._num_tokens = tokenizer, num_tokens
        self._texts: list[Text] = []
        self._round = 0
        self.share = settings.share if isinstance(settings.share, float) else settings.share.start
        self._last_loss: float | None = None

    def take_if_due(self, step: int, model: PreTrainedModel) -> Batch | None:
        """Returns the next texts, if a step is to learn from the student's own; each token it wrote is a row."""
        if np.random.default_rng([self._ctx.seed, step, 2]).random() >= self.share:
            return None
        if not self._texts:
            self._texts = self._write(model)
            self._round += 1
        taken, self._texts = self._texts[: self._batch_size], self._texts[self._batch_size :]
        return make_batch(taken, self._tokenizer.pad_token_id or 0, model.device)

    def note(self, validation_loss: float) -> None:
        """Lets a share that rises do so where the loss did."""
        rising, last = self._settings.share, self._last_loss
        self._last_loss = validation_loss
        if not isinstance(rising, float) and last is not None and validation_loss > last:
            self.share = min(1.0, self.share + rising.step)

    def _write(self, model: PreTrainedModel) -> list[Text]:
        dice = np.random.default_rng([self._ctx.seed, self._round, 3])
        num_texts, num_prompts = self._settings.buffer_steps * self._batch_size, len(self._prompts)
        order = np.concatenate([dice.permutation(num_prompts) for _ in range(-(-num_texts // num_prompts))])
        texts: list[Text] = []
        was_training = model.training
        model.eval()
        for start in range(0, num_texts, WRITTEN_AT_ONCE):
            some = [self._prompts[index] for index in order[start : min(start + WRITTEN_AT_ONCE, num_texts)]]
            with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
                torch.manual_seed(int(dice.integers(2**31)))  # a stop in between leaves nothing drawn
                how = self._settings.new_tokens, self._settings.temperature, self._num_tokens
                written = go_on(model, self._tokenizer, some, *how)
            texts += [(np.concatenate(pair), len(pair[0])) for pair in zip(some, written, strict=True)]
            self._ctx.check_stop()
        model.train(was_training)
        return texts

    def save(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns the texts that are written and not used yet."""
        state: dict[str, Any] = {"round": self._round, "share": self.share, "last_loss": self._last_loss}
        if not self._texts:
            return {}, state
        width = max(len(ids) for ids, _ in self._texts)
        padded = [np.pad(ids, (0, width - len(ids)), constant_values=NOTHING) for ids, _ in self._texts]
        lengths = [length for _, length in self._texts]
        return {"texts": torch.from_numpy(np.stack(padded))}, state | {"prompts": lengths}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Takes over what `save` returned."""
        self._round, self.share, self._last_loss = state["round"], state["share"], state["last_loss"]
        padded: list[NDArray[np.int32]] = [*tensors["texts"].numpy()] if "texts" in tensors else []
        lengths = state.get("prompts", [])
        self._texts = [(ids[ids != NOTHING], length) for ids, length in zip(padded, lengths, strict=True)]


def make_batch(texts: list[Text], pad: int, device: torch.device) -> Batch:
    """Returns texts filled up on the right; the label of a token is the next one, a row each token after the prompt."""
    width = max(len(ids) for ids, _ in texts)
    ids_BT = torch.full((len(texts), width), pad)
    is_row_BT = torch.zeros((len(texts), width - 1), dtype=torch.bool)
    mask_BT = torch.zeros_like(ids_BT)
    for row, (ids, prompt) in enumerate(texts):
        ids_BT[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
        mask_BT[row, : len(ids)] = 1
        is_row_BT[row, prompt - 1 : len(ids) - 1] = True
    rows_BT = torch.where(is_row_BT, torch.arange(is_row_BT.numel()).reshape(is_row_BT.shape), NOTHING)
    inputs = {"input_ids": ids_BT[:, :-1].to(device), "attention_mask": mask_BT[:, :-1].to(device)}
    return Batch(inputs, ids_BT[:, 1:].to(device), rows_BT)
