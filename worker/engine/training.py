"""The one training loop: any sum of losses, the best epoch kept."""

import logging
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from core.errors import StageFailed
from worker.engine import checkpoints
from worker.engine.context import StageContext
from worker.engine.data import Batch, Encoded, Examples, encode
from worker.engine.devices import autocast
from worker.engine.failures import CheckpointUnfit, StopRequested, is_out_of_memory
from worker.engine.inference import predict_logits
from worker.engine.loading import input_names, limit_length, save_model
from worker.engine.objective import Objective, ShareWatch, warn_of_share
from worker.engine.optimization import MAX_GRADIENT_NORM, TrainingSettings, make_optimizer, make_schedule, set_dropout
from worker.engine.scores import accuracy, macro_f1
from worker.kernels.heads import add_numbers
from worker.kernels.signals import DenseSignal

LOGGED_POINTS = 200
log = logging.getLogger(__name__)


@dataclass
class Trainer:
    """A model in training, with its data and settings.

    A teacher answers the whole split at once, so that no step runs it. After the first epoch a share of the tokens is
    masked, anew in every epoch, for teacher and student alike: the student then hears the teacher on more inputs than
    there are texts.

    Paper: Tang et al. 2019, "Distilling Task-Specific Knowledge from BERT into Simple Neural Networks", section 3.2
    (masking), with the noise of each epoch in place of a fixed, larger split.
    """

    ctx: StageContext
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    settings: TrainingSettings
    objective: Objective
    train_data: Encoded = field(init=False)
    validation_data: Encoded | None = field(init=False)
    teacher: PreTrainedModel | None = None
    mask_probability: float = 0.0
    _teacher_NC: Tensor | None = None
    _answered_epoch: int = -1
    watch: ShareWatch = field(init=False)
    _window: list[dict[str, float]] = field(default_factory=list)
    _best: dict[str, Any] = field(default_factory=dict)
    _best_state: dict[str, Tensor] | None = None
    _step: int = 0
    _validated_step: int = 0

    def __post_init__(self) -> None:
        limit_length(self.model, self.tokenizer, self.settings.max_length)
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.train_data = self._encode(self.ctx.get_split("train"))
        validation = self.ctx.find_split("validation")
        self.validation_data = self._encode(validation) if validation else None
        self.model.to(self.ctx.device)
        if self.settings.dropout is not None:
            set_dropout(self.model, self.settings.dropout)
        self.optimizer = make_optimizer(self.model, self.settings)
        self.steps_per_epoch = math.ceil(len(self.train_data) / self.settings.batch_size)
        self.num_steps = max(1, round(self.settings.epochs * self.steps_per_epoch))
        self.schedule = make_schedule(self.optimizer, self.num_steps, self.settings.warmup_ratio)
        self.log_every = max(1, self.num_steps // LOGGED_POINTS)
        self.watch = ShareWatch(self.num_steps // self.log_every)
        self._restore()

    def run(self) -> dict[str, Any]:
        """Trains, leaves the best epoch's weights in the model, and returns what is known of them.

        A run that was interrupted goes on from its checkpoint and ends with the same bytes as one that was not.

        Raises:
            StageFailed: `loss_not_finite` at the step whose loss or gradient is not finite.
            StopRequested: At the next step after the order; a checkpoint is handed over before.
        """
        if self._step == 0:
            self._warn_of_cut_texts()
        try:
            self._train()
        except StopRequested:
            self._save_checkpoint()
            raise
        if self._best_state is not None:
            self.model.load_state_dict(self._best_state)
        self.model.eval()
        return {
            "num_examples": len(self.train_data),
            "num_steps": self._step,
            "kept_epoch": self._best.get("epoch", math.ceil(self.num_steps / self.steps_per_epoch)),
            "validation": self._best.get("scores"),
        }

    def _train(self) -> None:
        self.ctx.progress(self._step, self.num_steps)
        while self._step < self.num_steps:
            self._validate_if_due()
            epoch, first = divmod(self._step, self.steps_per_epoch)
            seed, batch_size = [self.ctx.seed, epoch], self.settings.batch_size
            data = self._prepare(epoch)
            self.model.train()
            for batch in data.shuffled(batch_size, seed, first, self.ctx.device):
                if self._step == self.num_steps:
                    break
                numbers = self._update(batch)
                self._step += 1
                self._log(numbers)
                if self.ctx.wants_checkpoint():
                    self._save_checkpoint()
                self.ctx.progress(self._step, self.num_steps)
        self._validate_if_due()

    def _prepare(self, epoch: int) -> Encoded:
        """Returns the epoch's inputs, a pure function of seed and epoch, with the teacher's answers to them at hand."""
        data = self.train_data
        if self.teacher is None:
            return data
        mask_id = self.tokenizer.mask_token_id
        is_masked = epoch > 0 and self.mask_probability > 0 and mask_id is not None
        if is_masked:
            data = data.masked(mask_id, self.mask_probability, [self.ctx.seed, epoch, 1])
        if self._teacher_NC is None or (is_masked and self._answered_epoch != epoch):
            with autocast(self.ctx.device):  # a hint to train by, not an answer to a user
                self._teacher_NC = predict_logits(self.teacher, data, self.ctx.check_stop)
            self._answered_epoch = epoch
            log.info("the teacher answered %d texts for epoch %d", len(data), epoch + 1)
        return data

    def _save_checkpoint(self) -> None:
        tensors = {
            **checkpoints.add_prefix("model", self.model.state_dict()),
            **checkpoints.add_prefix("best", self._best_state or {}),
            **checkpoints.add_prefix("optimizer", checkpoints.optimizer_tensors(self.optimizer)),
            **checkpoints.add_prefix("random", checkpoints.random_tensors()),
            **({} if self._teacher_NC is None else {"teacher": self._teacher_NC}),
        }
        state = {
            "groups": self.optimizer.state_dict()["param_groups"],
            "schedule": self.schedule.state_dict(),
            "window": self._window,
            "watched": self.watch.counts,
            "norms": self.objective.norms,
            "best": self._best,
            "validated_step": self._validated_step,
            "answered_epoch": self._answered_epoch,
        }
        self.ctx.save_checkpoint(self._step, tensors, state)

    def _restore(self) -> None:
        try:
            found = self.ctx.find_checkpoint()
            if found is not None:
                self._go_on_from(*found)
        except Exception as error:  # names, shapes or types: whatever another engine wrote otherwise
            if is_out_of_memory(error):
                raise
            raise CheckpointUnfit(f"{type(error).__name__}: {error}") from error

    def _go_on_from(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.model.load_state_dict(checkpoints.select(tensors, "model"))
        checkpoints.restore_optimizer(self.optimizer, checkpoints.select(tensors, "optimizer"), state["groups"])
        self.schedule.load_state_dict(state["schedule"])
        self._teacher_NC, self._answered_epoch = tensors.get("teacher"), state["answered_epoch"]
        self._best_state = checkpoints.select(tensors, "best") or None
        self._best, self._window = state["best"], state["window"]
        self.watch.counts, self.objective.norms = state["watched"], state["norms"]
        self._step, self._validated_step = state["step"], state["validated_step"]
        checkpoints.restore_random(checkpoints.select(tensors, "random"))
        log.info("going on from step %d of %d", self._step, self.num_steps)

    def save(self, role: str) -> None:
        """Writes the model, its tokenizer and its labels as the stage's output in this role."""
        save_model(self.model, self.tokenizer, self.ctx.labels, self.ctx.output(role))

    def _encode(self, examples: Examples) -> Encoded:
        return encode(examples, self.tokenizer, input_names(self.model, self.tokenizer))

    def _warn_of_cut_texts(self) -> None:
        cut, total = self.train_data.num_cut, len(self.train_data)
        if cut > total // 100:
            limit = self.train_data.max_length
            message = f"{cut} of {total} training texts are longer than {limit} tokens and are cut."
            self.ctx.warn("texts_cut", message, num_cut=cut, num_examples=total, max_length=limit)

    def _update(self, batch: Batch) -> dict[str, float]:
        """Makes one step of the optimiser; its parts add up to what the whole batch would be at once."""
        num_rows = len(batch.rows_B)
        numbers: dict[str, float] = {}
        self.optimizer.zero_grad(set_to_none=True)
        for part in batch.parts(self.settings.micro_batch_size or num_rows):
            with autocast(self.ctx.device):
                logits_BC = self.model(**part.inputs).logits
            signal = None if self._teacher_NC is None else DenseSignal(self._teacher_NC[part.rows_B])
            gradient_BC, added = self.objective(logits_BC, signal, part.labels_B, num_rows)
            logits_BC.backward(gradient_BC.to(logits_BC.dtype))
            numbers = add_numbers(numbers, added)
        self._check_finite("loss", numbers["total"])
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
        self._check_finite("gradient", norm.item())
        self.objective.learn(numbers)
        self.optimizer.step()
        self.schedule.step()
        return numbers

    def _check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise StageFailed(
                "loss_not_finite",
                f"The {what} became {value} at step {self._step + 1} of {self.num_steps}.",
                suggestion=f"Lower learning_rate (now {self.settings.learning_rate:g}).",
            )

    def _log(self, numbers: dict[str, float]) -> None:
        """Reports the mean over a window of steps; the windows depend on the number of steps alone."""
        step = self._step
        self._window.append(numbers)
        if step % self.log_every and step != self.num_steps:
            return
        means = {name: sum(n[name] for n in self._window) / len(self._window) for name in numbers}
        self._window.clear()
        shares = self.objective.shares(means)
        for name, value in means.items():
            if not name.startswith("gradient/"):
                self.ctx.reporter.metric(f"loss/{name}", step, value)
        for term in self.objective.terms:
            if term.weight is None:
                self.ctx.reporter.metric(f"weight/{term.name}", step, self.objective.weights()[term.name])
        for name, share in shares.items():
            self.ctx.reporter.metric(f"share/{name}", step, share)
        for name, share in self.watch.see(shares).items():
            warn_of_share(self.ctx, name, share)
        self.ctx.reporter.metric("learning_rate", step, float(self.schedule.get_last_lr()[0]))

    def _validate_if_due(self) -> None:
        """Scores the model once after each epoch and after the last step."""
        step = self._step
        at_end = step % self.steps_per_epoch == 0 or step == self.num_steps
        if self.validation_data is None or step == self._validated_step or not at_end:
            return
        epoch = math.ceil(step / self.steps_per_epoch)
        scores = self.score_validation(self.model)
        for name, value in scores.items():
            self.ctx.reporter.metric(f"validation/{name}", step, value)
        log.info("epoch %d: %s", epoch, scores)
        best = self._best.get("scores")
        if best is None or (scores["accuracy"], -scores["loss"]) > (best["accuracy"], -best["loss"]):
            self._best = {"epoch": epoch, "scores": scores}
            self._best_state = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        self._validated_step = step

    def score_validation(self, model: PreTrainedModel) -> dict[str, float]:
        """Returns accuracy, macro-F1 and cross entropy of a model on the validation split, which must exist."""
        data = self.validation_data
        assert data is not None  # noqa: S101
        logits_NC = predict_logits(model, data, self.ctx.check_stop)
        predicted_N, labels_N = logits_NC.argmax(-1).numpy(), data.labels_N.numpy()
        return {
            "accuracy": accuracy(labels_N, predicted_N),
            "macro_f1": macro_f1(labels_N, predicted_N, len(self.ctx.labels)),
            "loss": torch.nn.functional.cross_entropy(logits_NC, data.labels_N).item(),
        }
