"""The objective: a weighted sum of losses over what teacher and labels say, with one denominator for a whole step."""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Annotated, Literal

import torch
from pydantic import TypeAdapter
from torch import Tensor

from core.losses import Reduction
from core.methods import Loss
from core.registry import OneOf
from worker.engine.context import StageContext
from worker.engine.data import Batch
from worker.engine.uncertainty import Uncertainty, find_uncertainty
from worker.kernels.divergences import widen
from worker.kernels.signals import Signal

LEAST_SHARE, MOST_SHARE = 0.01, 0.99
MIN_POINTS = 5
NORM_MEMORY = 0.9
MAX_BALANCE = 1e4
LOSS: TypeAdapter[Loss] = TypeAdapter(Annotated[Loss, OneOf()])


@dataclass(frozen=True)
class Term:
    """One weighted loss of the objective; without a weight, one that is balanced with the others."""

    name: str
    weight: float | None
    loss: Callable[[Tensor, Signal | None, Tensor], Tensor]
    is_of_labels: bool = False
    compares: Literal["probabilities", "values", "both"] = "both"

    def rests(self, batch: Batch, *, is_own: bool = False) -> bool:
        """Returns whether it has nothing to say of a batch: the student wrote it, or its task gives something else."""
        fits = self.compares == "both" or batch.gives_values in {None, self.compares == "values"}
        return not fits or (is_own and self.is_of_labels)


def name_losses(losses: Sequence[Loss]) -> dict[str, Loss]:
    """Returns the losses by their names in logs: the kind, and `<kind>_2` for a second one of a kind."""
    kinds = [loss.kind for loss in losses]
    counts = [kinds[: index + 1].count(kind) for index, kind in enumerate(kinds)]
    names = [kind if count == 1 else f"{kind}_{count}" for kind, count in zip(kinds, counts, strict=True)]
    return dict(zip(names, losses, strict=True))


def make_term(ctx: StageContext, name: str, loss: Loss) -> Term:
    """Returns a loss on logits as a term."""
    weight = None if loss.weight == "auto" else loss.weight
    return Term(name, weight, loss.build(ctx), loss.is_of_labels, loss.compares)


def label_objective(ctx: StageContext) -> "Objective":
    """Returns the loss on labels alone, as the task has it, or each of several tasks."""
    kinds = [task.label_loss for task in ctx.spec.task.parts().values() or [ctx.spec.task]]
    losses = [LOSS.validate_python({"kind": kind}) for kind in dict.fromkeys(kinds)]
    return Objective([make_term(ctx, loss.kind, loss) for loss in losses], uncertainty=find_uncertainty(ctx))


class Objective:
    """L = Σ_j w_j · Σ_i D_ij / M_i over the rows i of one optimiser step.

    M_i is the number of rows of the whole step, whatever the parts in which they are computed, or 1 for the plain sum.
    For `sequence_mean` it is the number of rows of i's text times that of texts, so that L is the mean over these of
    the means over their rows. Of a loss on the teacher's answers, rows of which it says nothing are in neither sum nor
    number.

    A term without a weight gets one with which the norm of its gradient by the logits is the mean of those of the
    weighted terms, both averaged over the steps so far. Terms that have had no gradient yet, as those that rest, do not
    count; without any that does it is 1. The weights of a step depend on the steps before it alone.

    Attributes:
        uncertainty: What is learned of several tasks: a step's gradient is multiplied with the weight of its task.
        norms: Of each term's gradient without its weight, as far as it is known; a run that goes on needs them.
    """

    def __init__(
        self, terms: Sequence[Term], reduction: Reduction = "mean", uncertainty: Uncertainty | None = None
    ) -> None:
        self.terms, self.reduction, self.uncertainty = terms, reduction, uncertainty
        self.norms: dict[str, float] = {}

    @property
    def names(self) -> list[str]:
        """The names of the numbers that a step has."""
        return ["total", *(name for term in self.terms for name in (term.name, f"gradient/{term.name}"))]

    def weights(self) -> dict[str, float]:
        """Returns each term's weight in the next step."""
        fixed = {term.name: term.weight for term in self.terms if term.weight}
        known = [weight * self.norms[name] for name, weight in fixed.items() if name in self.norms]
        return {term.name: self._weight(term, known) for term in self.terms}

    def _weight(self, term: Term, known: Sequence[float]) -> float:
        if term.weight is not None:
            return term.weight
        if not known or term.name not in self.norms:
            return 1.0
        return min(max(fmean(known) / self.norms[term.name], 1 / MAX_BALANCE), MAX_BALANCE)

    def resting(self, batch: Batch, *, is_own: bool = False) -> set[str]:
        """Returns the names of the terms that have nothing to say of a batch."""
        return {term.name for term in self.terms if term.rests(batch, is_own=is_own)}

    def hears_teacher(self, resting: Container[str]) -> bool:
        """Returns whether a term hears the teacher that does not rest."""
        return any(not term.is_of_labels and term.name not in resting for term in self.terms)

    def weigh(self, batch: Batch) -> Tensor:
        """Returns how much each row of a batch counts beside the others, weight_N on the processor."""
        return batch.weights if self.reduction == "sequence_mean" else torch.ones(len(batch.row_numbers))

    def scale(self, batch: Batch) -> float:
        """Returns the weight of a batch's task."""
        return self.uncertainty.weight(batch.task) if self.uncertainty else 1.0

    def learn(self, numbers: dict[str, float]) -> None:
        """Notes the norms of a whole step, of which `numbers` are the sums of the parts; a term that rests has none."""
        for name, weight in self.weights().items():
            if weight and numbers[f"gradient/{name}"]:
                norm = numbers[f"gradient/{name}"] ** 0.5 / weight
                self.norms[name] = norm + NORM_MEMORY * (self.norms.get(name, norm) - norm)

    def __call__(
        self,
        student_NC: Tensor,
        signal: Signal | None,
        labels_N: Tensor,
        num_rows: float | Tensor,
        *,
        heard: float = 1.0,
        resting: Container[str] = (),
        scale: float = 1.0,
    ) -> tuple[Tensor, dict[str, float]]:
        """Returns the gradient of a part's share of L by the logits, and what the part adds to the step's numbers.

        The numbers are `total`, each term's value without its weight, and under `gradient/<term>` the square of the
        norm of its weighted gradient. A part without rows adds zeros.

        Args:
            student_NC: The student's logits of the part; they are not changed.
            signal: What the teacher says of these rows; None if no term hears one.
            labels_N: Their classes.
            num_rows: Rows of the whole step, or num_rows_N of each row: it is one of so many.
            heard: The share of these of which the teacher says anything.
            resting: The names of the terms that have nothing to say of this part; they add zeros.
            scale: What the gradient is multiplied with; the numbers are not.
        """
        is_heard_N = None if signal is None else signal.is_heard
        logits_NC = widen(student_NC.detach()).requires_grad_()
        gradient_NC: Tensor | None = None
        numbers_J2, weights = [], self.weights()
        for term in self.terms:
            if term.name in resting:
                numbers_J2 += [logits_NC.new_zeros(())] * 2
                continue
            value_N, share = term.loss(logits_NC, signal, labels_N), 1.0
            if not term.is_of_labels:
                value_N = value_N if is_heard_N is None else value_N * is_heard_N.to(value_N.device)
                share = heard or 1.0
            value = (value_N if self.reduction == "sum" else value_N / (share * num_rows)).sum()
            [term_NC] = torch.autograd.grad(weights[term.name] * value, logits_NC)
            numbers_J2 += [value.detach(), torch.linalg.vector_norm(term_NC).square()]
            gradient_NC = term_NC if gradient_NC is None else gradient_NC.add_(term_NC)
        values = iter(torch.stack(numbers_J2).tolist() if numbers_J2 else ())  # one wait for the device
        numbers = {name: next(values) for term in self.terms for name in (term.name, f"gradient/{term.name}")}
        if gradient_NC is None:
            gradient_NC = torch.zeros_like(logits_NC, requires_grad=False)
        if scale != 1:
            gradient_NC = gradient_NC * scale
        return gradient_NC, {"total": sum(weight * numbers[name] for name, weight in weights.items()), **numbers}

    def shares(self, numbers: dict[str, float]) -> dict[str, float]:
        """Returns each term's share of the total."""
        return _normalised({name: w * numbers[name] for name, w in self.weights().items()}, numbers["total"])

    def gradient_shares(self, numbers: dict[str, float]) -> dict[str, float]:
        """Returns, under `gradient/<term>`, each term's share of the sum of the norms of gradients by the logits."""
        norms = {f"gradient/{term.name}": numbers[f"gradient/{term.name}"] ** 0.5 for term in self.terms}
        return _normalised(norms, sum(norms.values()))


def _normalised(values: dict[str, float], whole: float) -> dict[str, float]:
    return {name: value / whole if whole else 0.0 for name, value in values.items()}


@dataclass
class ShareWatch:
    """Notices a term whose share of the gradient, which is what trains, stays tiny or nearly all for a tenth of a run.

    The loss itself would not tell: a term may be large and flat, as the soft cross entropy with its constant is. Beside
    losses on layers it must do, as these have no gradient by the logits, with which the others' could be compared.
    """

    num_points: int
    counts: dict[str, int] = field(default_factory=dict)

    def see(self, shares: dict[str, float]) -> dict[str, float]:
        """Counts one more point of the log; returns the terms to warn of, each once, with their shares.

        Args:
            shares: Each term's share of the loss and, under `gradient/<term>`, of the gradient, if any has one.
        """
        patience, found = max(MIN_POINTS, self.num_points // 10), {}
        terms = {name: shares[f"gradient/{name}"] for name in shares if f"gradient/{name}" in shares} or shares
        for name, share in terms.items() if len(terms) > 1 else ():
            is_extreme = not LEAST_SHARE <= share <= MOST_SHARE
            self.counts[name] = self.counts.get(name, 0) + 1 if is_extreme else 0
            if self.counts[name] == patience:
                found[name] = share
        return found


def warn_of_share(ctx: StageContext, name: str, share: float, whole: Literal["gradient", "loss"]) -> None:
    """Adds the warning to the job's events."""
    what = "hardly counts" if share < LEAST_SHARE else "is nearly all that counts"
    message = f"The term {name} {what}: its share of the {whole} is {share:.2%}; change the weights of the terms."
    ctx.warn("loss_share", message, term=name, share=share)
