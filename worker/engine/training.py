"""The one training loop: any sum of losses, the best epoch kept."""

import logging
import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from core.errors import StageFailed
from core.training import Training
from worker.engine import checkpoints, ranks
from worker.engine.branches import branch
from worker.engine.context import StageContext
from worker.engine.data import Batch
from worker.engine.devices import attending, autocast
from worker.engine.embeddings import train_used_rows, whole_rows
from worker.engine.failures import CheckpointUnfit, StopRequested, is_out_of_memory
from worker.engine.features import Features
from worker.engine.freezing import Frozen
from worker.engine.objective import Objective, ShareWatch, warn_of_share
from worker.engine.optimization import Average, make_optimizer, make_schedule, set_dropout
from worker.engine.quantizing import NO_GRIDS, OnGrids, put_on_grids, settle, write_grids
from worker.engine.rollouts import Rollouts
from worker.engine.sharding import clip_gradients, join_layers, parts_like, whole_on_first
from worker.engine.tasks import Split
from worker.engine.teaching import Teaching
from worker.engine.zeros import Growth, Zeros, find_zeros, keep_zeros
from worker.kernels.heads import add_numbers, backward

if TYPE_CHECKING:
    from worker.engine.adapters import Adapted

LOGGED_POINTS = 200
log = logging.getLogger(__name__)


@dataclass
class Trainer:
    """A model in training, with its data and settings, and the teacher that it hears, if any."""

    ctx: StageContext
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    settings: Training
    objective: Objective
    teaching: Teaching | None = None
    features: Features | None = None
    rollouts: Rollouts | None = None
    on_grids: OnGrids = NO_GRIDS
    train_data: Split = field(init=False)
    validation_data: Split | None = field(init=False)
    watch: ShareWatch = field(init=False)
    beside: torch.nn.ModuleDict = field(init=False)
    zeros: Zeros = field(init=False)
    _window: list[dict[str, float]] = field(default_factory=list)
    _best: dict[str, Any] = field(default_factory=dict)
    _best_state: dict[str, Tensor] | None = None
    _step: int = 0
    _validated_step: int = 0

    def __post_init__(self) -> None:
        self.task = self.ctx.task
        self.train_data = self._encode(self.ctx.get_split("train"))
        validation = self.ctx.find_split("validation")
        self.validation_data = self._encode(validation) if validation else None
        if self.settings.branches(self.ctx.spec):
            branch(self.ctx, self.model)
        self.ctx.place(self.model)
        if self.settings.dropout is not None:
            set_dropout(self.model, self.settings.dropout)
        self.zeros = find_zeros(self.model, self.on_grids.zeros)
        self._check_fixed()
        put_on_grids(self.model, self.on_grids)
        adapter = self.settings.adapter
        if self.rollouts is None and (adapter is None or adapter.is_merged):  # any token may be written, or in a prompt
            used = np.flatnonzero(self.train_data.count_ids())
            train_used_rows(self.model, np.union1d(used, self.tokenizer.all_special_ids))
        self.steps_per_epoch = math.ceil(len(self.train_data) / self.settings.batch_size)
        self.num_steps = max(1, round(self.settings.epochs * self.steps_per_epoch))
        growing = self.settings.sparsity
        self.growth = Growth(self.model, growing, self.num_steps) if growing else None
        self.adapted = self._adapt() if self.settings.adapter else None
        self.num_trained = self.adapted.start() if self.adapted else 0
        self.optimizer = make_optimizer(self.model, self.settings, self.task.is_head)
        self.beside = self.features.projections.to(self.ctx.device) if self.features else torch.nn.ModuleDict()
        if self.objective.uncertainty:
            self.beside["uncertainty"] = self.objective.uncertainty.to(self.ctx.device)
        if len(self.beside):
            self.optimizer.add_param_group(
                {"params": [*self.beside.parameters()], "lr": self.settings.head_learning_rate, "weight_decay": 0.0}
            )
        self.schedule = make_schedule(self.optimizer, self.num_steps, self.settings)
        if self.settings.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.average = Average(self.model, self.settings.average) if self.settings.average else None
        self.log_every = max(1, self.num_steps // LOGGED_POINTS)
        self.watch = ShareWatch(self.num_steps // self.log_every)
        self.frozen = Frozen(self.model, self.settings.freeze, self.steps_per_epoch) if self.settings.freeze else None
        self._restore()

    def _check_fixed(self) -> None:
        """Raises StageFailed where weights are to stay zero, or on grids, and the settings would not leave them so."""
        settings, is_on_grids = self.settings, bool(self.on_grids.wanted)
        what = settings.changes_all() or (settings.kind if is_on_grids and settings.own() else None)
        if what and (is_on_grids or (self.zeros and settings.adapter)):  # growing zeros look for others themselves
            kept = "on grids of few values" if is_on_grids else "zero"
            message = f"Weights of the {settings.role} are to stay {kept}, and '{what}' would not leave them so."
            remedy = "Leave it out, or name a model that was neither quantised nor sparsified."
            raise StageFailed("spec_invalid", message, suggestion=remedy)

    def _adapt(self) -> "Adapted":
        from worker.engine.adapters import adapt  # a library that most trainings do without

        assert self.settings.adapter is not None  # noqa: S101 - asked for
        return adapt(self.ctx, self.model, self.settings.adapter)

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
            with self.ctx.reporter.phase("train"):
                self._train()
        except StopRequested:
            self._save_checkpoint()
            raise
        kept = self._best_state or (self.average.tensors if self.average else None)
        if kept is not None:
            self.model.load_state_dict(kept)
        whole_rows(self.model)
        join_layers(self.model)
        if self.adapted:
            self.adapted.save(self.ctx.output("adapter"))
            self.adapted.settle()
        zeros = {"zeros": self.growth.settle()} if self.growth else {}
        if self.on_grids.wanted:
            self.on_grids = self.on_grids._replace(grids=settle(self.model))
        if self.settings.gradient_checkpointing:
            self.model.gradient_checkpointing_disable()
        self.model.eval()
        return {
            "num_examples": len(self.train_data),
            "num_steps": self._step,
            "kept_epoch": self._best.get("epoch", math.ceil(self.num_steps / self.steps_per_epoch)),
            "validation": self._best.get("scores"),
            **({"num_trained": self.num_trained} if self.adapted else {}),
            **zeros,
        }

    def _train(self) -> None:
        self.ctx.progress(self._step, self.num_steps)
        while self._step < self.num_steps:
            self._validate_if_due()
            if self._has_stalled():
                return
            epoch, first = divmod(self._step, self.steps_per_epoch)
            seed, batch_size = [self.ctx.seed, epoch], self.settings.batch_size
            data = self.teaching.prepare(epoch, self.train_data) if self.teaching else self.train_data
            self.model.train()
            for batch in data.shuffled(batch_size, seed, first, self.ctx.device):
                if self._step == self.num_steps:
                    break
                own = self.rollouts.take_if_due(self._step, self.model) if self.rollouts else None
                numbers = self._update(own or batch, is_own=own is not None)
                self._step += 1
                self._log(numbers)
                if self.ctx.wants_checkpoint():
                    self._save_checkpoint()
                self.ctx.progress(self._step, self.num_steps)
        self._validate_if_due()

    def _has_stalled(self) -> bool:
        """Tells whether so many epochs as the settings allow were no better than the best one."""
        if self.settings.patience is None or not self._best:
            return False
        stalled = self._step // self.steps_per_epoch - self._best["epoch"]
        if stalled >= self.settings.patience:
            log.info("no better for %d epochs; stopping after step %d of %d", stalled, self._step, self.num_steps)
        return bool(stalled >= self.settings.patience)

    def _save_checkpoint(self) -> None:
        heard, heard_state = self.teaching.save() if self.teaching else ({}, {})
        written, written_state = self.rollouts.save() if self.rollouts else ({}, {})
        tensors = {
            **checkpoints.add_prefix("model", self.model.state_dict()),
            **checkpoints.add_prefix("best", self._best_state or {}),
            **checkpoints.add_prefix("average", self.average.tensors if self.average else {}),
            **checkpoints.add_prefix("optimizer", checkpoints.optimizer_tensors(self.optimizer)),
            **checkpoints.add_prefix("random", checkpoints.random_tensors()),
            **checkpoints.add_prefix("teacher", heard),
            **checkpoints.add_prefix("rollouts", written),
            **checkpoints.add_prefix("beside", self.beside.state_dict()),
        }
        state = {
            "groups": self.optimizer.state_dict()["param_groups"],
            "schedule": self.schedule.state_dict(),
            "window": self._window,
            "watched": self.watch.counts,
            "norms": self.objective.norms,
            "best": self._best,
            "validated_step": self._validated_step,
            "teacher": heard_state,
            "rollouts": written_state,
        }
        self.ctx.save_checkpoint(self._step, whole_on_first(tensors), state)

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
        own = self.model.state_dict()
        self.model.load_state_dict(parts_like(checkpoints.select(tensors, "model"), own))
        self.beside.load_state_dict(checkpoints.select(tensors, "beside"))
        checkpoints.restore_optimizer(self.optimizer, checkpoints.select(tensors, "optimizer"), state["groups"])
        self.schedule.load_state_dict(state["schedule"])
        if self.teaching:
            self.teaching.restore(checkpoints.select(tensors, "teacher"), state["teacher"])
        if self.rollouts:
            self.rollouts.restore(checkpoints.select(tensors, "rollouts"), state["rollouts"])
        self._best_state = parts_like(checkpoints.select(tensors, "best"), own) or None
        if self.average:
            self.average.tensors = parts_like(checkpoints.select(tensors, "average"), own)
        self._best, self._window = state["best"], state["window"]
        self.watch.counts, self.objective.norms = state["watched"], state["norms"]
        self._step, self._validated_step = state["step"], state["validated_step"]
        checkpoints.restore_random(checkpoints.select(tensors, "random"))
        log.info("going on from step %d of %d", self._step, self.num_steps)

    def save(self, role: str) -> None:
        """Writes the model, its tokenizer and its labels as the stage's output in this role, in the first process."""
        if ranks.number():
            return
        self.task.save_model(self.model, self.tokenizer, self.ctx.output(role))
        if self.on_grids.wanted:
            write_grids(self.ctx.output(role), self.on_grids)

    def _encode(self, path: Path) -> Split:
        with self.ctx.reporter.phase(f"encode {path.stem}"):
            split: Split = self.task.encode(path, self.model, self.tokenizer, self.settings.max_length)
        return split

    def _warn_of_cut_texts(self) -> None:
        cut, total = self.train_data.num_cut, len(self.train_data)
        if cut > total // 100:
            limit = self.train_data.max_length
            message = f"{cut} of {total} training texts are longer than {limit} tokens and are cut."
            self.ctx.warn("texts_cut", message, num_cut=cut, num_examples=total, max_length=limit)

    def _update(self, batch: Batch, *, is_own: bool) -> dict[str, float]:
        """Makes one step of the optimiser; its parts add up to what the whole batch would be at once.

        Labels of a batch that the student wrote itself are not to be learned. What rests has no number.
        """
        if self.frozen:
            self.frozen.apply(self._step)
        if self.growth:
            self.growth.apply(self._step)
        scale = self.objective.scale(batch)
        resting = self.objective.resting(batch, is_own=is_own)
        teaching = self.teaching if self.features or self.objective.hears_teacher(resting) else None
        weight_N, is_heard_N = self.objective.weigh(batch), teaching.find_heard(batch) if teaching else None
        weight = weight_N.sum()
        heard = 1.0 if is_heard_N is None else float(weight_N[is_heard_N].sum() / weight)
        objective = partial(self.objective, heard=heard, resting=resting, scale=scale)
        ranks.seed_step(self.ctx.seed, self._step)
        self.ctx.share_done, self.ctx.is_own_text = self._step / max(1, self.num_steps - 1), is_own
        numbers = dict.fromkeys(self._names, 0.0)
        self.optimizer.zero_grad(set_to_none=True)
        for part in batch.parts(self.settings.micro_batch_size or len(batch.rows), ranks.number(), ranks.count()):
            signal = teaching.answer(part) if teaching else None
            with attending(self.ctx.device, part.inputs["input_ids"].shape[1]):
                with autocast(self.ctx.device):
                    answer = self.task.answer(self.model, part)
                beside, values = self.features.compare(part, batch) if self.features else (None, {})
                others = () if beside is None else (scale * beside,)
                num_rows_N = (weight / self.objective.weigh(part)).to(self.ctx.device)
                added = backward(answer, objective, signal, part.row_labels, num_rows_N, others) | values
            added["total"] += 0.0 if beside is None else beside.item()
            numbers = add_numbers(numbers, added)
        trained = [*self.model.parameters(), *self.beside.parameters()]
        numbers = ranks.add_up_numbers(numbers, self.ctx.device)
        ranks.add_up_gradients(trained)
        self.ctx.agree()
        if self.growth:
            self.growth.hear()
        self._check_finite("loss", numbers["total"])
        self._check_finite("gradient", clip_gradients(trained, self.settings.max_gradient_norm))
        self.objective.learn(numbers)
        if self.objective.uncertainty:
            self.objective.uncertainty.learn(batch.task, numbers["total"])
        self.optimizer.step()
        keep_zeros(self.zeros)
        if self.growth:
            self.growth.hold()
        self.schedule.step()
        if self.average:
            self.average.update()
        return {name: number for name, number in numbers.items() if name.removeprefix("gradient/") not in resting}

    @property
    def _names(self) -> list[str]:
        """The names of the numbers that a step may have."""
        return [*self.objective.names, *(self.features.names if self.features else ())]

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
        found = {name: [n[name] for n in self._window if name in n] for name in self._names}
        means = {name: sum(values) / len(self._window) for name, values in found.items()}
        self._window.clear()
        others = self.features.shares(means) if self.features else self.objective.gradient_shares(means)
        known = self.objective.shares(means) | others
        shares = {name: share for name, share in known.items() if found[name.removeprefix("gradient/")]}
        for name, values in found.items():
            if values and not name.startswith("gradient/"):
                self.ctx.reporter.metric(f"loss/{name}", step, sum(values) / len(values))
        for term in self.objective.terms:
            if term.weight is None:
                self.ctx.reporter.metric(f"weight/{term.name}", step, self.objective.weights()[term.name])
        if self.objective.uncertainty:
            for name, value in self.objective.uncertainty.log_variances().items():
                self.ctx.reporter.metric(f"log_variance/{name}", step, value)
        for name, share in shares.items():
            self.ctx.reporter.metric(f"share/{name}", step, share)
        for name, share in self.watch.see(shares).items():
            warn_of_share(self.ctx, name, share, "loss" if self.features else "gradient")
        if self.growth:
            self.ctx.reporter.metric("zeros", step, self.growth.share)
        self.ctx.reporter.metric("learning_rate", step, float(self.schedule.get_last_lr()[0]))

    def _validate_if_due(self) -> None:
        """Scores the model once after each epoch and after the last step."""
        step = self._step
        at_end = step % self.steps_per_epoch == 0 or step == self.num_steps
        if self.validation_data is None or step == self._validated_step or not at_end:
            return
        epoch = math.ceil(step / self.steps_per_epoch)
        scores = self.score_validation()
        for name, value in scores.items():
            self.ctx.reporter.metric(f"validation/{name}", step, value)
        log.info("epoch %d: %s", epoch, scores)
        best, is_whole = self._best.get("scores"), self.growth is None or self.growth.is_done(step)
        if is_whole and (best is None or self.task.rank(scores) > self.task.rank(best)):
            self._best = {"epoch": epoch, "scores": scores}
            state = self.average.tensors if self.average else self.model.state_dict()
            self._best_state = {name: tensor.detach().clone() for name, tensor in state.items()}
        self._validated_step = step
        if self.rollouts:
            self.rollouts.note(scores["loss"])
            self.ctx.reporter.metric("on_policy/share", step, self.rollouts.share)

    def score_validation(self) -> dict[str, float]:
        """Returns how well the model, or its average, does on the validation split, which must exist."""
        with self.average.applied() if self.average else nullcontext():
            return self.task.score(self.model, self.validation_data, self.ctx.check_stop)
