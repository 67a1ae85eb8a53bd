"""How attention is computed in training, by the length of the texts."""

import torch
import torch.nn.functional as F

from worker.engine.devices import attending

CPU = torch.device("cpu")


def gradients(num_tokens: int, seen: list[bool]) -> list[torch.Tensor]:
    """Returns the gradients by queries, keys and values of two texts, the second of which is half as long."""
    torch.manual_seed(0)
    parts = [torch.randn(2, 3, num_tokens, 8, requires_grad=True) for _ in range(3)]
    is_there_BT = torch.arange(num_tokens) < torch.tensor([[num_tokens], [num_tokens // 2]])
    with attending(CPU, num_tokens):
        seen.append(torch.backends.cuda.flash_sdp_enabled())
        F.scaled_dot_product_attention(*parts, attn_mask=is_there_BT[:, None, None]).square().sum().backward()
    return [part.grad for part in parts if part.grad is not None]


def test_short_texts_are_attended_to_by_plain_products() -> None:
    seen: list[bool] = []
    found = gradients(16, seen)
    torch.manual_seed(0)
    parts = [torch.randn(2, 3, 16, 8, dtype=torch.float32) for _ in range(3)]
    query, key, value = (part.double().requires_grad_() for part in parts)
    scores = query @ key.transpose(2, 3) / 8**0.5
    scores[1, ..., 8:] = -torch.inf
    (scores.softmax(-1) @ value).square().sum().backward()
    for own, expected in zip(found, (query, key, value), strict=True):
        torch.testing.assert_close(own.double(), expected.grad, rtol=1e-4, atol=1e-6)
    gradients(512, seen)
    assert seen == [False, True]
    assert torch.backends.cuda.flash_sdp_enabled()
