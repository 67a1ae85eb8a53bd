"""Columns of logits that no token has, of the teacher, the student, or both: they change nothing."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from core.losses import FeatureLoss
from core.registry import list_methods
from tests import pico
from tests.engine_bench import Bench, make_spec
from worker.engine import devices
from worker.engine.measuring import CPU
from worker.engine.objective import Objective, make_term, name_losses
from worker.engine.students import load_student, load_student_tokenizer
from worker.kernels.heads import backward

TASK = {"kind": "causal_lm", "block_tokens": 32}
KINDS = [
    kind
    for kind, loss in list_methods("losses").items()
    if not issubclass(loss, FeatureLoss)
    and loss.compares == "probabilities"
    and not (loss.needs_logits or loss.needs_own_texts)
]
NUM_PADDING = 7


class Step(NamedTuple):
    """The numbers of a step, the gradients by the student's parameters, and how many tokens there are."""

    numbers: dict[str, float]
    gradients: dict[str, Tensor]
    num_tokens: int


def pad(folder: Path) -> None:
    """Gives a model random columns that are often the likeliest."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    num_tokens = model.config.vocab_size
    model.resize_token_embeddings(num_tokens + NUM_PADDING, mean_resizing=False)
    model.get_input_embeddings().weight.data[num_tokens:].normal_(std=0.5)
    model.save_pretrained(folder)


def take_step(root: Path, padded: tuple[str, ...], *, is_kept: bool = False) -> Step:
    """Goes backwards from the losses over the first block of the training split."""
    bench = Bench(root).lay_language()
    pico.write_language_model(bench.inputs / "base", num_layers=1)
    num_tokens = AutoModelForCausalLM.from_pretrained(bench.inputs / "base").config.vocab_size
    torch.manual_seed(0)
    for role in padded:
        pad(bench.inputs / role)
    losses = [{"kind": kind, **({} if kind == "cross_entropy" else {"temperature": 1.0})} for kind in KINDS]
    stages: list[dict[str, Any]] = [{"kind": "answer", "top_k": 1000}] if is_kept else []
    spec = make_spec(
        [*stages, {"kind": "distill", "losses": losses}], task=TASK, student={"kind": "pretrained", "model": "base"}
    )
    if is_kept:
        with bench.surround(spec, 0, labels=[]) as ctx:
            ctx.order.stage.build(ctx)()
        shutil.copytree(root / "stage-0" / "out" / "answers", bench.inputs / "answers")
    with bench.surround(spec, len(stages), labels=[]) as ctx:
        settings: Any = ctx.order.stage
        student, tokenizer = load_student(ctx), load_student_tokenizer(ctx)
        teaching = ctx.task.teach(student, tokenizer, settings)
        data = teaching.prepare(0, ctx.task.encode(ctx.get_split("train"), student, tokenizer, 0))
        batch = next(iter(data.in_order(CPU)))
        objective = Objective([make_term(ctx, name, loss) for name, loss in name_losses(settings.losses).items()])
        labels_N = batch.row_labels
        answer, signal = ctx.task.answer(student, batch), teaching.answer(batch)
        numbers = backward(answer, objective, signal, labels_N, len(labels_N))
    return Step(numbers, {name: p.grad for name, p in student.named_parameters() if p.grad is not None}, num_tokens)


@pytest.fixture(scope="module", autouse=True)
def _in_float32() -> Iterator[None]:
    """As products in bf16 are rounded otherwise where they have other sizes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "has_fast_bf16", lambda _: False)
        yield


@pytest.fixture(scope="module")
def plain(_in_float32: None, tmp_path_factory: pytest.TempPathFactory) -> Step:
    return take_step(tmp_path_factory.mktemp("plain"), ())


@pytest.mark.parametrize("is_kept", [False, True], ids=["online", "kept"])
@pytest.mark.parametrize("padded", [("base",), ("teacher",), ("teacher", "base")], ids="-".join)
def test_columns_that_no_token_has_change_neither_losses_nor_gradients(
    plain: Step, padded: tuple[str, ...], is_kept: bool, tmp_path: Path
) -> None:
    found = take_step(tmp_path, padded, is_kept=is_kept)
    assert found.numbers == pytest.approx(plain.numbers, rel=1e-5)
    for name, expected in plain.gradients.items():
        gradient = found.gradients[name]
        if name.endswith("wte.weight"):
            assert not gradient[plain.num_tokens :].any()
            gradient = gradient[: plain.num_tokens]
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)
