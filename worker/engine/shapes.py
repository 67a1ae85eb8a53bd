"""The sizes that a student may have, and which of them to try next."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from core.models.widths import Widths
from worker.engine.loading import find_layers
from worker.engine.students import read_widths

INNER_SHARES, STATE_SHARES = (1.0, 0.75, 0.5, 0.375, 0.25), (1.0, 0.5)
HALVING_COSTS = np.array([0.012, 0.006, 0.03])  # as `fit_costs` has them, of classifiers; a guess to begin with
WRITING_COSTS = np.array([0.3, 0.15, 0.4])  # of language models
NOISE = 0.006  # of the logarithm of what is kept, on a thousand texts
LEAST_KEPT = 1e-3


class Shape(NamedTuple):
    """The sizes of a student."""

    num_layers: int
    intermediate_size: int
    hidden_size: int

    def contains(self, other: "Shape") -> bool:
        """Returns whether it is at least as large in every direction."""
        return all(own >= others for own, others in zip(self, other, strict=True))

    def halvings(self, whole: "Shape") -> NDArray[np.float64]:
        """Returns how often the whole was halved in each direction."""
        return np.log2(np.array(whole) / np.array(self))


def list_shapes(teacher: PreTrainedModel) -> list[Shape]:
    """Returns the shapes that the teacher can be cut down to."""
    whole = shape_of(teacher)
    shapes = (
        Shape(num_layers, int(whole.intermediate_size * inner), int(whole.hidden_size * states))
        for num_layers in range(1, whole.num_layers + 1)
        for inner in INNER_SHARES
        for states in STATE_SHARES
    )
    return [shape for shape in shapes if min(shape) > 0 and narrowed_to(teacher, shape) is not None]


def choose(
    whole: Shape,
    shapes: dict[Shape, int],
    tried: dict[Shape, dict[str, Any]],
    refused: Iterable[Shape],
    least: float,
    guess_3: NDArray[np.float64],
) -> Shape | None:
    """Returns the shape to try next, or None where nothing is left that is worth it.

    It is the smallest that is predicted to keep enough and smaller than the best so far; while none does, the one that
    is predicted to keep most. What is smaller in all directions than one that kept too little is left out, unless that
    one missed by no more than the noise: its lack may be a few texts of the split.

    Args:
        whole: The teacher's.
        shapes: Their parameters.
        tried: The points of those that were trained.
        refused: Those that are too large or too slow; so is what contains them.
        least: Share that must be kept.
        guess_3: What a halving costs, before any was tried.
    """
    failed = [shape for shape, point in tried.items() if point["retained"] < least * math.exp(-NOISE)]
    met = [shapes[shape] for shape, point in tried.items() if point["meets"]]
    costs_3 = fit_costs(whole, tried, guess_3)
    left = {
        shape: float(shape.halvings(whole) @ costs_3)
        for shape in shapes
        if shape not in tried
        and not any(shape.contains(other) for other in refused)
        and not any(other.contains(shape) for other in failed)
        and shapes[shape] < min(met, default=math.inf)
    }
    hopeful = [shape for shape, cost in left.items() if math.exp(-cost) >= least]
    if hopeful:
        return min(hopeful, key=lambda shape: shapes[shape])
    return None if met or not left else min(left, key=lambda shape: (left[shape], shapes[shape]))


def fit_costs(whole: Shape, tried: dict[Shape, dict[str, Any]], guess_3: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns what a halving costs in each direction, costs_3: the mean of a Gaussian posterior, at least 0.

    The logarithm of what is kept falls linearly with the halvings, each of which keeps a share of what was left; the
    prior is a guess that is as uncertain as it is large.
    """
    x_N3 = np.array([shape.halvings(whole) for shape in tried]).reshape(-1, 3)
    lost_N = np.array([-math.log(max(point["retained"], LEAST_KEPT)) for point in tried.values()])
    weight_3 = 1 / guess_3**2
    precision_33 = x_N3.T @ x_N3 / NOISE**2 + np.diag(weight_3)
    costs_3 = np.linalg.solve(precision_33, x_N3.T @ lost_N / NOISE**2 + weight_3 * guess_3)
    return np.maximum(costs_3, 0)


def shape_of(model: PreTrainedModel) -> Shape:
    """Returns the sizes of a model."""
    widths = read_widths(model.config)
    return Shape(find_layers(model)[1], widths.inner, widths.states)


def narrowed_to(teacher: PreTrainedModel, shape: Shape) -> Widths | None:
    """Returns the widths of a shape; None where the teacher cannot have them."""
    return read_widths(teacher.config).narrowed(shape.hidden_size, shape.intermediate_size)
