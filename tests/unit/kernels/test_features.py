"""Feature losses against scipy, torch's own losses and plain loops, in float64."""

import math

import numpy as np
import pytest
import scipy.special
import torch
import torch.nn.functional as F

from worker.kernels.features import attention_mse, cosine_distance, hidden_mse, patient_distance, relation_kl

B, T, D, HEADS = 3, 5, 8, 2


@pytest.fixture
def states() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student, teacher and a mask with padding on the right."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(B, T, D, generator=generator, dtype=torch.float64) for _ in range(2))
    mask_BT = torch.arange(T) < torch.tensor([5, 3, 1])[:, None]
    return student.requires_grad_(), teacher, mask_BT


def pairs_of(mask_BT: torch.Tensor) -> torch.Tensor:
    return mask_BT[:, :, None] & mask_BT[:, None, :]


def test_hidden_mse_is_torchs_on_the_tokens(states: tuple[torch.Tensor, ...]) -> None:
    student, teacher, mask_BT = states
    expected = F.mse_loss(student[mask_BT], teacher[mask_BT]) * mask_BT.sum()
    torch.testing.assert_close(hidden_mse(student, teacher, mask_BT), expected)


def test_cosine_distance_is_torchs_embedding_loss(states: tuple[torch.Tensor, ...]) -> None:
    student, teacher, mask_BT = states
    count = int(mask_BT.sum())
    loss = torch.nn.CosineEmbeddingLoss(reduction="sum")(
        student[mask_BT], teacher[mask_BT], torch.ones(count, dtype=torch.float64)
    )
    torch.testing.assert_close(cosine_distance(student, teacher, mask_BT), loss)


def test_patient_distance_is_twice_the_cosine_distance(states: tuple[torch.Tensor, ...]) -> None:
    student, teacher, mask_BT = states
    first = torch.zeros_like(mask_BT)
    first[:, 0] = True
    found = patient_distance(student[:, 0], teacher[:, 0])
    torch.testing.assert_close(found, 2 * cosine_distance(student, teacher, first))


def relation(a_TD: np.ndarray, b_TD: np.ndarray, head: int, width: int) -> np.ndarray:
    some = slice(head * width, (head + 1) * width)
    return scipy.special.softmax(a_TD[:, some] @ b_TD[:, some].T / math.sqrt(width), axis=-1)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_relations_are_compared_row_by_row(states: tuple[torch.Tensor, ...], heads: int) -> None:
    student, teacher, mask_BT = states
    wide_teacher = torch.cat([teacher, teacher.flip(-1)], dim=-1)  # the widths may differ, the heads may not
    expected = 0.0
    for index, length in enumerate(mask_BT.sum(dim=-1).tolist()):
        for head in range(heads):
            s, t = (x.detach().numpy()[index, :length] for x in (student, wide_teacher))
            p, q = relation(t, t, head, 2 * D // heads), relation(s, s, head, D // heads)
            expected += scipy.special.rel_entr(p, q).sum() / heads
    found = relation_kl((student, student), (wide_teacher, wide_teacher), pairs_of(mask_BT), heads)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_causal_pairs_give_causal_attention(states: tuple[torch.Tensor, ...]) -> None:
    student, teacher, _ = states
    keys = student.detach().roll(1, dims=1), teacher.roll(2, dims=1)
    causal_BTT = torch.ones(T, T, dtype=torch.bool).tril().expand(B, T, T)
    expected = 0.0
    for index in range(B):
        for row in range(T):
            for head in range(HEADS):
                some, seen = slice(head * D // HEADS, (head + 1) * D // HEADS), slice(0, row + 1)
                logits = [
                    (keys[i][index, seen, some] @ x.detach()[index, row, some] / math.sqrt(D / HEADS)).numpy()
                    for i, x in enumerate((student, teacher))
                ]
                q, p = (scipy.special.softmax(x) for x in logits)
                expected += scipy.special.rel_entr(p, q).sum() / HEADS
    found = relation_kl((student, keys[0]), (teacher, keys[1]), causal_BTT, HEADS)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_attention_mse_is_torchs_on_each_text(states: tuple[torch.Tensor, ...]) -> None:
    student, teacher, mask_BT = states
    expected = 0.0
    for index, length in enumerate(mask_BT.sum(dim=-1).tolist()):
        s, t = (
            x[index, :length].unflatten(-1, (HEADS, -1)).transpose(0, 1) / (D / HEADS) ** 0.25
            for x in (student, teacher)
        )
        expected += F.mse_loss(s @ s.transpose(1, 2), t @ t.transpose(1, 2)) * length
    found = attention_mse((student, student), (teacher, teacher), pairs_of(mask_BT), HEADS)
    torch.testing.assert_close(found, expected)


def losses(student: torch.Tensor, teacher: torch.Tensor, mask_BT: torch.Tensor) -> list[torch.Tensor]:
    pairs = pairs_of(mask_BT)
    return [
        hidden_mse(student, teacher, mask_BT),
        cosine_distance(student, teacher, mask_BT),
        patient_distance(student[:, 0], teacher[:, 0]),
        relation_kl((student, student), (teacher, teacher), pairs, HEADS),
        attention_mse((student, student), (teacher, teacher), pairs, HEADS),
    ]


def test_what_is_padding_changes_nothing(states: tuple[torch.Tensor, ...]) -> None:
    student, teacher, mask_BT = states
    noise = torch.where(mask_BT[..., None], 0.0, 1e3)
    for one, other in zip(
        losses(student, teacher, mask_BT), losses(student + noise, teacher - noise, mask_BT), strict=True
    ):
        torch.testing.assert_close(one, other)
    wider = [F.pad(x, (0, 0, 0, 3)) for x in (student, teacher)]
    for one, other in zip(losses(student, teacher, mask_BT), losses(*wider, F.pad(mask_BT, (0, 3))), strict=True):
        torch.testing.assert_close(one, other)


def test_the_same_states_are_no_distance_apart_and_the_teacher_has_no_gradient(
    states: tuple[torch.Tensor, ...],
) -> None:
    student, teacher, mask_BT = states
    for loss in losses(student, student, mask_BT):
        assert loss.item() == pytest.approx(0, abs=1e-12)
        [gradient] = torch.autograd.grad(loss, student, retain_graph=True)
        assert gradient.abs().max() < 1e-12
    teacher = teacher.clone().requires_grad_()
    for loss in losses(student, teacher, mask_BT):
        assert loss.item() > 0
        gradient, none = torch.autograd.grad(loss, (student, teacher), allow_unused=True, retain_graph=True)
        assert none is None
        assert gradient.isfinite().all()
        assert (gradient[~mask_BT] == 0).all()


def test_gradients_are_those_of_finite_differences(states: tuple[torch.Tensor, ...]) -> None:
    student, teacher, mask_BT = states
    for index in range(5):
        assert torch.autograd.gradcheck(lambda x, i=index: losses(x, teacher, mask_BT)[i], (student,))
