"""What is read and not to be learned, prompts and whole batches of them: no gradient, whatever the loss."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from core.losses import FeatureLoss
from core.registry import list_methods
from tests import pico
from tests.engine_bench import Bench, make_spec
from worker.engine import checkpoints
from worker.engine.blocks import Blocks, read_stream
from worker.engine.data import Batch
from worker.engine.loading import load_tokenizer
from worker.engine.next_tokens import predict_next
from worker.engine.objective import Objective, Term
from worker.kernels.heads import HeadSignal, backward

LOSSES = {kind: loss for kind, loss in list_methods("losses").items() if not issubclass(loss, FeatureLoss)}
every_loss = pytest.mark.parametrize("kind", sorted(LOSSES))
CPU = torch.device("cpu")


def make(seed: int) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=8, initializer_range=0.5)
    model = GPT2LMHeadModel(config).double().eval()
    model.has_plain_head = True  # so that nothing is tried on it
    return model


def go_back(kind: str, student: GPT2LMHeadModel, batch: Batch) -> dict[str, float]:
    """Returns the numbers of a step with one loss."""
    objective = Objective([Term(kind, 1.0, LOSSES[kind]().build(SimpleNamespace(is_own_text=False)))])
    with torch.no_grad():
        signal = HeadSignal(predict_next(make(1), batch.inputs, batch.is_row))
    answer = predict_next(student, batch.inputs, batch.is_row)
    return backward(answer, objective, signal, batch.row_labels, int(batch.is_row.sum()))


def test_a_token_is_learned_from_those_before_it() -> None:
    """Once, as stock transformers shifts the labels [-100, 5, 2]; not shifted, or twice, it is another loss."""
    student, stock = make(0), make(0)
    ids_S, labels = np.array([7, 5, 2], dtype=np.int32), torch.tensor([[-100, 5, 2]])
    numbers = go_back("cross_entropy", student, Blocks(ids_S, labels[0].numpy() >= 0, 4).batch(np.array([0]), CPU))
    told = stock(input_ids=torch.from_numpy(ids_S)[None].long(), labels=labels)
    told.loss.backward()
    assert numbers["total"] == pytest.approx(told.loss.item())
    expected = {name: parameter.grad for name, parameter in stock.named_parameters()}
    torch.testing.assert_close({name: parameter.grad for name, parameter in student.named_parameters()}, expected)
    for shift in (0, 2):
        other = F.cross_entropy(told.logits[0, : 3 - shift], labels[0, shift:])
        assert other.item() != pytest.approx(numbers["total"], rel=0.01)


@every_loss
def test_prompts_and_filler_have_no_gradient(kind: str) -> None:
    """Three blocks: prompt alone, prompts on both sides of what is learned, and a last one that is filled up."""
    is_learned_S = np.array([0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 1], dtype=bool)
    blocks = Blocks(np.random.default_rng(0).integers(9, size=12, dtype=np.int32), is_learned_S, 4)
    batch, student, seen = blocks.batch(np.arange(3), CPU), make(0), []

    def note(_: Any, __: Any, output: Any) -> None:
        output.last_hidden_state.retain_grad()
        seen.append(output.last_hidden_state)

    student.transformer.register_forward_hook(note)
    go_back(kind, student, batch)
    [hidden_BTD] = seen
    assert batch.is_row.tolist() == [[False] * 4, [False, True, True, False], [False, False, True, False]]
    assert not hidden_BTD.grad[~batch.is_row].any()
    assert hidden_BTD.grad[batch.is_row].any(dim=-1).all()


@every_loss
def test_a_batch_of_prompts_alone_is_a_zero_with_a_gradient(kind: str) -> None:
    student = make(0)
    blocks = Blocks(np.arange(9, dtype=np.int32), np.zeros(9, dtype=bool), 4)
    numbers = go_back(kind, student, blocks.batch(np.arange(2), CPU))
    assert set(numbers.values()) == {0.0}
    for parameter in student.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


TASK = {"kind": "causal_lm", "prompt": "prompt", "block_tokens": 8}
LEARN = {"epochs": 6, "batch_size": 2, "micro_batch_size": 1, "learning_rate": 1e-2, "weight_decay": 0.0}
KL = {"kind": "forward_kl", "temperature": 1.0}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Five prompts of four blocks each, with a text of less than a block, and a teacher who knows nothing of them."""
    bench = Bench(tmp_path_factory.mktemp("bench")).lay_language()
    path = bench.inputs / "data" / "train.jsonl"
    words = " ".join(json.loads(line)["text"] for line in path.read_text().splitlines()).split()
    pieces = [words[start : start + 39] for start in range(0, 195, 39)]
    rows = [{"prompt": " ".join(piece[:33]), "text": " ".join(piece[33:])} for piece in pieces]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (bench.inputs / "data" / "validation.jsonl").unlink()
    return bench


@pytest.mark.parametrize(("how", "heard"), [("online", KL), ("kept", KL), ("across tokens", {"kind": "uld"})])
def test_steps_without_anything_to_learn_change_nothing_and_training_goes_on(
    how: str, heard: dict[str, Any], bench: Bench, tmp_path: Path
) -> None:
    bench = bench.copy(tmp_path / "bench")
    folder, path = bench.inputs / "base", bench.inputs / "data" / "train.jsonl"
    pico.write_language_model(folder, num_layers=1, is_reversed=how == "across tokens")
    stages = [{"kind": "distill", **LEARN, "losses": [{"kind": "cross_entropy"}, heard]}]
    if how == "kept":
        stages.insert(0, {"kind": "answer", "top_k": 100})
    spec = make_spec(stages, task=TASK, student={"kind": "pretrained", "model": "base"}, seed=4)
    for ordinal in range(len(stages)):
        finished = bench.succeed(spec, ordinal, labels=[], checkpoint_s=0)
        bench.adopt(finished, ordinal, stages[ordinal]["kind"])
    blocks = Blocks(*read_stream(path, {"prompt": "prompt", "text": "text"}, load_tokenizer(folder)), 8)
    seeds = [[spec["seed"] * 1009 + len(stages) - 1, epoch] for epoch in range(LEARN["epochs"])]
    batches = [batch for seed in seeds for batch in blocks.shuffled(LEARN["batch_size"], seed, 0, CPU)]
    has_rows = [bool(batch.is_row.any()) for batch in batches]
    names = ("total", "cross_entropy", heard["kind"])
    series = {name: [value for _, value in finished.series(f"loss/{name}")] for name in names}
    for values in series.values():  # of which one that is not finite would not be there
        assert [value > 0 for value in values] == has_rows
    first = has_rows.index(True)
    assert first > 0
    kept, _ = checkpoints.read(bench.root / f"stage-{len(stages) - 1}" / "checkpoints" / "1.safetensors")
    start = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(checkpoints.select(kept, "model"), start.state_dict(), rtol=0, atol=0)
    labels_BT = torch.where(batches[first].is_row, batches[first].labels, -100)
    with torch.no_grad():
        logits_BTV = start(**batches[first].inputs).logits
    expected = F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten()).item()
    assert series["cross_entropy"][first] == pytest.approx(expected, rel=0.02)
    learned = np.array(series["total"])[has_rows]
    assert learned[-6:].mean() < 0.9 * learned[:6].mean()
    assert all(tensor.isfinite().all() for tensor in load_file(bench.inputs / "student" / "model.safetensors").values())
