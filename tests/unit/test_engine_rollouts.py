"""Steps on texts that the student writes itself: how they are written and read, and whole stages of them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from core.errors import SpecInvalid
from tests import pico
from tests.engine_bench import Bench, make_spec
from worker.engine.blocks import read_prompts
from worker.engine.loading import load_tokenizer
from worker.engine.rollouts import Rollouts, make_batch
from worker.methods.stages.distill import OnPolicy

TASK = {"kind": "causal_lm", "block_tokens": 32}
STUDENT = {"kind": "teacher_layers", "keep": [0, 2]}
LEARN = {"kind": "finetune", "epochs": 15, "learning_rate": 5e-3, "batch_size": 4}
POLICY = {"share": 0.5, "new_tokens": 8, "prompt_tokens": 4, "buffer_steps": 4}
DISTILL = {
    "kind": "distill",
    "epochs": 6,
    "learning_rate": 3e-3,
    "batch_size": 4,
    "losses": [{"kind": "cross_entropy"}, {"kind": "reverse_kl", "temperature": 1.0}],
}
PROMPTS = [np.array(ids, dtype=np.int32) for ids in ([5, 6, 7], [9], [11, 3, 4, 8, 10])]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder = pico.write_language_model(tmp_path_factory.mktemp("model"))
    return AutoModelForCausalLM.from_pretrained(folder).eval(), load_tokenizer(folder)


def make(tokenizer: PreTrainedTokenizerBase, batch_size: int = 3, **settings: Any) -> Rollouts:
    ctx: Any = SimpleNamespace(seed=3, check_stop=lambda: None)
    return Rollouts(ctx, PROMPTS, tokenizer, OnPolicy(**{"share": 1.0, "new_tokens": 8, **settings}), batch_size)


def test_a_row_is_a_token_that_was_written() -> None:
    batch = make_batch([(np.array([5, 6, 7, 8]), 2), (np.array([9, 1]), 1)], 0, torch.device("cpu"))
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7], [9, 1, 0]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.row_labels.tolist() == [7, 8, 1]
    assert batch.is_row.tolist() == [[False, True, True], [True, False, False]]


def test_texts_go_on_as_the_model_alone_would_after_each_prompt(model: Any) -> None:
    """Nearly at temperature 0, whatever prompts of other lengths are written beside it."""
    network, tokenizer = model
    rollouts = make(tokenizer, buffer_steps=1, new_tokens=6, temperature=1e-3)
    texts = rollouts._write(network)
    assert sorted(length for _, length in texts) == [1, 3, 5]
    for ids, length in texts:
        alone = network.generate(
            torch.tensor(ids[None, :length]), do_sample=False, max_new_tokens=6, pad_token_id=0, eos_token_id=0
        )[0]
        assert ids.tolist() == alone.tolist()


def test_what_is_written_is_a_function_of_seed_and_weights_and_survives_a_checkpoint(model: Any) -> None:
    network, tokenizer = model
    one, other = make(tokenizer, 2), make(tokenizer, 2)
    torch.manual_seed(1)
    first = [one.take_if_due(step, network) for step in range(3)]
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = [other.take_if_due(step, network) for step in range(2)]
    assert torch.equal(torch.get_rng_state(), state)  # nothing else of the run is disturbed
    restored = make(tokenizer, 2)
    restored.restore(*other.save())
    again.append(restored.take_if_due(2, network))
    for a, b in zip(first, again, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a.inputs["input_ids"], b.inputs["input_ids"])
        assert torch.equal(a.rows, b.rows)


def test_a_share_of_the_steps_is_due(model: Any) -> None:
    network, tokenizer = model
    rollouts = make(tokenizer, 1, share=0.25, new_tokens=1, buffer_steps=64)
    taken = [rollouts.take_if_due(step, network) is not None for step in range(400)]
    assert 70 < sum(taken) < 130


def test_a_share_rises_after_each_epoch_that_was_worse(model: Any) -> None:
    rollouts = make(model[1], share={"start": 0.0, "step": 0.4})
    shares = []
    for loss in (2.0, 1.5, 1.6, 1.4, 1.5, 1.7):
        rollouts.note(loss)
        shares.append(rollouts.share)
    assert shares == pytest.approx([0, 0, 0.4, 0.4, 0.8, 1])
    assert make(model[1], share={"start": 0.0, "step": 0.4}).take_if_due(0, model[0]) is None
    restored = make(model[1], share={"start": 0.0, "step": 0.4})
    restored.restore(*rollouts.save())
    restored.note(1.8)
    assert restored.share == 1


def test_prompts_are_ends_of_prompts_or_beginnings_of_texts(tmp_path: Path, model: Any) -> None:
    _, tokenizer = model
    path = tmp_path / "train.jsonl"
    path.write_text('{"q": "please my the parcel is", "a": "late"}\n{"q": "refund", "a": "paid back"}\n')
    ends = read_prompts(path, {"text": "a", "prompt": "q"}, tokenizer, 2)
    assert [tokenizer.decode(ids) for ids in ends] == ["parcel is", "refund"]
    starts = read_prompts(path, {"text": "q"}, tokenizer, 2)
    assert [tokenizer.decode(ids) for ids in starts] == ["please my", "refund"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("bench")).lay_language()
    bench.adopt(bench.succeed(make_spec([LEARN], task=TASK), labels=[]), 0, "finetune")
    return bench


def test_a_student_learns_from_its_own_texts_alone(bench: Bench) -> None:
    stage = DISTILL | {"on_policy": POLICY | {"share": 1.0}}
    finished = bench.succeed(make_spec([stage], task=TASK, student=STUDENT), 0, "own", labels=[])
    losses = [value for _, value in finished.series("loss/reverse_kl")]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    assert not finished.series("loss/cross_entropy")


def test_a_student_writes_no_token_that_its_teacher_lacks(bench: Bench, tmp_path: Path) -> None:
    """At random weights nearly every token that it would draw is one of those that fill up its logits."""
    bench = bench.copy(tmp_path / "bench")
    pico.write_language_model(bench.inputs / "base", num_layers=1, num_padding=1000)
    stage = DISTILL | {"on_policy": POLICY | {"share": 1.0}, "epochs": 1}
    spec = make_spec([stage], task=TASK, student={"kind": "pretrained", "model": "base"})
    finished = bench.succeed(spec, 0, "wide", labels=[])
    assert finished.series("loss/reverse_kl")


def test_a_stopped_stage_ends_with_the_same_bytes(bench: Bench, tmp_path: Path) -> None:
    bench = bench.copy(tmp_path / "bench")
    spec = make_spec([DISTILL | {"on_policy": POLICY}], task=TASK, student=STUDENT)
    whole = bench.succeed(spec, 0, "undisturbed", labels=[])
    order = bench.write_order(spec, 0, "stopped", labels=[], checkpoint_s=0)
    found, _ = bench.interrupt(order, 3, "stop")
    again = bench.succeed(spec, 0, "again", labels=[], checkpoint=str(found[-1]))
    assert "going on from step" in again.log
    weights = [finished.outputs / "student" / "model.safetensors" for finished in (whole, again)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert 0 < len(whole.series("loss/cross_entropy")) < len(whole.series("loss/total"))  # some steps are of each kind


def test_given_and_own_texts_are_told_apart(bench: Bench) -> None:
    """The divergence of own texts alone is hundreds of times as heavy here, so that its steps stand out."""
    loss = {"kind": "contrastive", "own_weight": 1.998, "alpha": {"by": "gap", "typical": 0.1}}
    policy = POLICY | {"share": {"start": 0.3, "step": 0.1}}
    stage = DISTILL | {"losses": [loss], "on_policy": policy, "epochs": 1}
    finished = bench.succeed(make_spec([stage], task=TASK, student=STUDENT), 0, "contrastive", labels=[])
    losses = sorted(value for _, value in finished.series("loss/contrastive"))
    assert losses[-1] > 100 * losses[0]
    assert finished.series("on_policy/share") == [(len(losses), 0.3)]


def test_specs_that_cannot_be(bench: Bench) -> None:
    with pytest.raises(SpecInvalid, match="a text_classification writes no texts"):
        make_spec([{"kind": "distill", "on_policy": POLICY}])
    with pytest.raises(SpecInvalid, match="no loss hears the teacher"):
        make_spec([DISTILL | {"on_policy": POLICY, "losses": [{"kind": "cross_entropy"}]}], task=TASK)
    with pytest.raises(SpecInvalid, match=r"'contrastive' compares given texts .* set on_policy"):
        make_spec([DISTILL | {"losses": [{"kind": "contrastive"}]}], task=TASK)
    rising = DISTILL | {"on_policy": POLICY | {"share": {"step": 0.1}}}
    with pytest.raises(SpecInvalid, match=r"set data.validation, or give a number"):
        make_spec([rising], task=TASK, data={"train": "toy/train"})
    stage = DISTILL | {"on_policy": POLICY | {"new_tokens": 100}}
    error = bench.run(make_spec([stage], task=TASK, student=STUDENT), 0, "long", labels=[]).last
    assert error["reason"] == "spec_invalid"
    assert "104 together; the model has places for 64" in error["message"]
