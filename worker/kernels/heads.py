"""The last layer and the loss together, so that the logits of all rows never exist at once."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from worker.kernels.divergences import widen
from worker.kernels.precision import halves, has_fast_bf16, tf32
from worker.kernels.signals import DenseSignal, Pair, Rows, Signal

CHUNK_ELEMENTS = 2**24  # of logits, 64 MB: enough rows for a processor's matrix product to run at full speed
GPU_CHUNK_ELEMENTS = 2**26  # of logits, 256 MB: enough for a GPU's
BLOCK_ELEMENTS = 2**19  # of logits, 2 MB: what a loss makes of them stays in a processor's cache

Objective = Callable[[Tensor, Signal | None, Tensor, float | Tensor], tuple[Tensor, dict[str, float]]]


@dataclass(slots=True, eq=False)
class Head:
    """What a model's last layer turns into logits, and that layer."""

    hidden_ND: Tensor
    weight_CD: Tensor
    bias_C: Tensor | None = None
    _factor: Tensor | None = field(default=None, init=False, repr=False)

    def __iter__(self) -> Iterator[Tensor | None]:
        return iter((self.hidden_ND, self.weight_CD, self.bias_C))

    def logits(self, rows: Rows = slice(None)) -> Tensor:
        """Returns the logits of some rows, without a gradient, in float32 at least.

        Rounded to bfloat16 they turn a tenth or more of a divergence's gradient into noise, once the student is close
        to its teacher. A GPU multiplies bfloat16 ten times as fast as float32, and adds up in float32: there each
        factor is the sum of two of bfloat16, so that 16 of its 24 bits count. The product of the two rests is left out.
        """
        hidden_ND = widen(self.hidden_ND[rows].detach())
        is_split = hidden_ND.is_cuda and hidden_ND.dtype == torch.float32 and has_fast_bf16("cuda")
        if self._factor is None:
            self._factor = widen(self.weight_CD.detach())
            if is_split:
                self._factor = torch.cat(halves(self._factor), dim=1)
        if is_split:
            first_ND, rest_ND = halves(hidden_ND)
            first_CD = self._factor[:, : first_ND.shape[1]]
            logits_NC = torch.mm(torch.cat([first_ND, first_ND], dim=1), self._factor.T, out_dtype=torch.float32)
            logits_NC += torch.mm(rest_ND, first_CD.T, out_dtype=torch.float32)
        else:
            logits_NC = hidden_ND @ self._factor.T
        return logits_NC if self.bias_C is None else logits_NC + widen(self.bias_C.detach())


def rows_at_once(like: Tensor, num_classes: int) -> int:
    """Returns of how many rows the logits are made at once, where the tensor is."""
    return max(1, (GPU_CHUNK_ELEMENTS if like.is_cuda else CHUNK_ELEMENTS) // num_classes)


@dataclass(frozen=True, slots=True)
class HeadSignal(Signal):
    """A teacher whose logits are made when they are asked for."""

    head: Head

    def take(self, rows: Rows) -> DenseSignal:
        """Returns the logits of some of the rows."""
        return DenseSignal(self.head.logits(rows))

    def compare(self, student_NC: Tensor, temperature: float) -> Pair:
        """Returns log softmax(u/T) and log softmax(z/T) of all the rows."""
        return self.take(slice(None)).compare(student_NC, temperature)


@dataclass(frozen=True, slots=True)
class AcrossSignal(Signal):
    """A teacher who chooses among other classes, and is heard in some rows; in the others the student stands for it.

    Attributes:
        answer: The teacher's logits, or what makes them, of the rows in which it is heard.
        index_N: For each of the student's rows the one of these, -1 where there is none.
    """

    answer: Head | Tensor
    index_N: Tensor

    @property
    def is_heard(self) -> Tensor:
        """Which of the student's rows have one."""
        return self.index_N >= 0

    def take(self, rows: Rows) -> "AcrossSignal":
        """Returns what it says of some of the rows."""
        return AcrossSignal(self.answer, self.index_N[rows])

    def compare(self, student_NC: Tensor, temperature: float) -> Pair:
        """Returns log softmax(u/T) and log softmax(z/T), the shorter one filled up with classes of no probability."""
        index_M = self.index_N[self.is_heard].to(student_NC.device)
        teacher_MC = self.answer.logits(index_M) if isinstance(self.answer, Head) else widen(self.answer[index_M])
        log_q_NC = F.log_softmax(widen(student_NC) / temperature, dim=-1)
        width = max(teacher_MC.shape[-1], log_q_NC.shape[-1])
        log_p_NC = _fill_up(log_q_NC.detach(), width)
        log_p_NC[self.is_heard.to(student_NC.device)] = _fill_up(
            F.log_softmax(teacher_MC.detach() / temperature, dim=-1).to(log_p_NC), width
        )
        return log_p_NC, _fill_up(log_q_NC, width)


def _fill_up(log_p_NC: Tensor, width: int) -> Tensor:
    return F.pad(log_p_NC, (0, width - log_p_NC.shape[-1]), value=-torch.inf)


def add_numbers(total: dict[str, float], part: dict[str, float]) -> dict[str, float]:
    """Returns the numbers of several parts of a step together."""
    return {name: total.get(name, 0.0) + value for name, value in part.items()}


def backward(
    answer: Head | Tensor,
    objective: Objective,
    signal: Signal | None,
    labels_N: Tensor,
    num_rows: float | Tensor,
    beside: Sequence[Tensor] = (),
) -> dict[str, float]:
    """Goes backwards from the objective through the student's logits, or what makes them; returns its numbers.

    Args:
        answer: Logits logits_NC of the rows, or the head that makes them.
        objective: Gives `(gradient_NC, numbers)` for `(logits_NC, signal, labels_N, num_rows)`, both sums over rows.
        signal: What the teacher says of the rows.
        labels_N: Their classes.
        num_rows: Rows of the whole optimiser step, or num_rows_N of each row: it is one of so many.
        beside: Other losses of the same forward pass.
    """
    if isinstance(answer, Head):
        return backward_through_head(answer, objective, signal, labels_N, num_rows, beside=beside)
    gradient_NC, numbers = objective(answer, signal and signal.take(slice(None)), labels_N, num_rows)
    torch.autograd.backward([answer, *beside], [gradient_NC.to(answer.dtype), *map(torch.ones_like, beside)])
    return numbers


def backward_through_head(
    head: Head,
    objective: Objective,
    signal: Signal | None,
    labels_N: Tensor,
    num_rows: float | Tensor,
    chunk_rows: int | None = None,
    beside: Sequence[Tensor] = (),
) -> dict[str, float]:
    """Goes backwards from the objective through the student's head and what made its hidden states.

    The loss comes last, so its gradient is known as soon as its logits are. They are made some rows at a time, and only
    gradients of the size of the hidden states and of the layer are kept. The result does not depend on the chunks but
    for rounding.

    Args:
        head: Of the student.
        objective: Gives `(gradient_NC, numbers)` for `(logits_NC, signal, labels_N, num_rows)`, both sums over rows.
        signal: What the teacher says of the rows.
        labels_N: Their classes.
        num_rows: Rows of the whole optimiser step, or num_rows_N of each row: it is one of so many.
        chunk_rows: Rows at a time; None chooses them by the size of their logits.
        beside: Other losses of the same forward pass.

    Returns:
        The objective's numbers.
    """
    chunk = chunk_rows or rows_at_once(head.weight_CD, len(head.weight_CD))
    frozen = Head(*(None if x is None else widen(x.detach()) for x in head))  # type: ignore[arg-type]
    gradients = Head(*(None if x is None else torch.zeros_like(x) for x in frozen))  # type: ignore[arg-type]
    is_rounded = frozen.weight_CD.dtype == torch.float32 and has_fast_bf16(frozen.weight_CD.device.type)
    rounded_CD = frozen.weight_CD.bfloat16() if is_rounded else frozen.weight_CD  # as the rest of the way back is
    sums: dict[str, float] = {}
    for start in range(0, max(1, len(frozen.hidden_ND)), chunk):
        rows = slice(start, start + chunk)
        heard = None if signal is None else signal.take(rows)
        by_logits_NC, numbers = _by_logits(frozen.logits(rows), objective, heard, labels_N[rows], _take(num_rows, rows))
        gradients.hidden_ND[rows] = by_logits_NC.to(rounded_CD.dtype) @ rounded_CD
        with tf32():
            gradients.weight_CD.addmm_(by_logits_NC.T, frozen.hidden_ND[rows])
        if gradients.bias_C is not None:
            gradients.bias_C.add_(by_logits_NC.sum(dim=0))
        sums = add_numbers(sums, numbers)
    pairs = [(x, g) for x, g in zip(head, gradients, strict=True) if x is not None and g is not None]
    trained = [(x, g.to(x.dtype)) for x, g in pairs if x.requires_grad]
    trained += [(loss, torch.ones_like(loss)) for loss in beside]
    torch.autograd.backward([x for x, _ in trained], [g for _, g in trained])
    return sums


def _take(num_rows: float | Tensor, rows: slice) -> float | Tensor:
    return num_rows[rows] if isinstance(num_rows, Tensor) else num_rows


def _by_logits(
    logits_NC: Tensor, objective: Objective, signal: Signal | None, labels_N: Tensor, num_rows: float | Tensor
) -> tuple[Tensor, dict[str, float]]:
    """Returns the objective's gradient and numbers; the gradient takes the place of the logits.

    A processor does it few rows at a time: the dozen tensors that a loss makes of the logits would else each go through
    memory, which takes longer than to compute them.
    """
    num_logits, width = logits_NC.shape
    block = max(1, BLOCK_ELEMENTS // width if logits_NC.device.type == "cpu" else num_logits)
    sums: dict[str, float] = {}
    for start in range(0, max(1, num_logits), block):
        rows = slice(start, start + block)
        heard = None if signal is None else signal.take(rows)
        gradient_NC, numbers = objective(logits_NC[rows], heard, labels_N[rows], _take(num_rows, rows))
        logits_NC[rows] = gradient_NC
        sums = add_numbers(sums, numbers)
    return logits_NC, sums
