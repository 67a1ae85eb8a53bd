"""How attention is computed in training, by the length of the texts, and what other runtimes leave as it was."""

import multiprocessing
import sys
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import helper

from worker.engine.devices import attending, keeping_denormals
from worker.engine.runtimes import open_session

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


def flushes() -> bool:
    return (torch.tensor(1e-40) * 1.0).item() == 0.0


@pytest.mark.parametrize("is_flushing", [True, False])
def test_other_runtimes_keep_denormals_and_leave_ours_as_they_were(is_flushing: bool) -> None:
    before = flushes()
    torch.set_flush_denormal(is_flushing)
    try:
        with keeping_denormals():
            assert not flushes()
        assert flushes() == is_flushing
    finally:
        torch.set_flush_denormal(before)


def open_first_session(folder: Path) -> None:
    """Ends the process with 0 if denormals are flushed after the first session of onnxruntime as they were before."""
    torch.set_flush_denormal(True)
    open_session(folder, 1)
    sys.exit(0 if flushes() else 1)


def test_the_first_session_of_a_process_changes_nothing_of_ours(tmp_path: Path) -> None:
    value = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "logits")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["logits"])], "g", value[:1], value[1:])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "model.onnx"
    )
    child = multiprocessing.get_context("spawn").Process(target=open_first_session, args=(tmp_path,))
    child.start()
    child.join()
    assert child.exitcode == 0
