"""Mixtures against numpy's means of scipy's probabilities."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import softmax
from scipy.stats import entropy
from torch import Tensor

from worker.kernels.heads import Head
from worker.kernels.mixtures import Mixture

WEIGHTS = (1.0, 2.0, 0.5)


def draw() -> Tensor:
    return 3 * torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))


def mix(logits_MNC: Tensor, *, by_entropy: bool) -> NDArray[Any]:
    p_MNC = softmax(logits_MNC.double().numpy(), axis=-1)
    weights_MN = np.array(WEIGHTS)[:, None] / (entropy(p_MNC, axis=-1) if by_entropy else np.ones(p_MNC.shape[:2]))
    return np.einsum("mn,mnc->nc", weights_MN / weights_MN.sum(axis=0), p_MNC)


def as_head(logits_NC: Tensor) -> Head:
    """Returns what makes these logits, of a layer that is to be trained."""
    hidden_ND, weight_DC = torch.linalg.qr(logits_NC)
    return Head(hidden_ND, torch.nn.Parameter(weight_DC.T.contiguous()))


@pytest.mark.parametrize("by_entropy", [False, True])
@pytest.mark.parametrize("heads", [(), (1,), (0, 1, 2)], ids=["logits", "one head", "heads"])
def test_probabilities_are_averaged(by_entropy: bool, heads: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.kernels.heads.CHUNK_ELEMENTS", 16)  # so that several chunks are added
    logits_MNC = draw()
    mixture = Mixture(by_entropy=by_entropy)
    for index, (logits_NC, weight) in enumerate(zip(logits_MNC, WEIGHTS, strict=True)):
        mixture.add(as_head(logits_NC) if index in heads else logits_NC, weight)
    found = mixture.logits()
    assert not found.requires_grad
    assert found.exp().numpy() == pytest.approx(mix(logits_MNC, by_entropy=by_entropy), rel=2e-5)
    for rows in (slice(2, 5), torch.tensor([5, 0])):
        assert torch.allclose(mixture.logits(rows), found[rows], atol=1e-6)
    assert torch.equal(mixture.logits(), found)


def test_a_model_is_left_out_of_rows_of_which_it_says_nothing() -> None:
    logits_MNC, mixture = draw(), Mixture(by_entropy=True)
    is_heard_MN = torch.ones(3, 6, dtype=torch.bool)
    is_heard_MN[1:, 2] = is_heard_MN[:, 4] = False
    for logits_NC, weight, is_heard_N in zip(logits_MNC, WEIGHTS, is_heard_MN, strict=True):
        mixture.add(logits_NC, weight, is_heard_N)
    found = mixture.logits()
    assert found[2].exp().numpy() == pytest.approx(softmax(logits_MNC[0, 2].numpy()), rel=1e-5)
    assert found[4].tolist() == [0.0] * 4
    others = [0, 1, 3, 5]
    assert found[others].exp().numpy() == pytest.approx(mix(logits_MNC, by_entropy=True)[others], rel=2e-5)


def test_a_model_that_is_certain_leaves_the_mean_finite() -> None:
    mixture = Mixture(by_entropy=True)
    for logits in ([[200.0, 0.0]], [[0.0, 0.1]], [[5.0, -torch.inf]]):
        mixture.add(torch.tensor(logits), 1.0)
    found = mixture.logits()
    assert found.isfinite().all()
    assert found.exp()[0, 0].item() > 0.99
