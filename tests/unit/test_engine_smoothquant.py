"""Inputs that are made easier to round: the scales by hand, the model unchanged, and what 8 bits then lose."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import AlbertConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from core.errors import SpecInvalid
from core.jobs.spec import load_spec
from core.models.facts import ModelFacts
from tests.engine_bench import Bench, make_spec
from tests.unit.test_engine_awq import ENDS, GPT2, IDS, LLAMA, make_loud, show
from tests.unit.test_engine_models import CONFIGS, SIZES, make
from worker.engine.folding import move_scales
from worker.engine.matrices import find_matrices
from worker.kernels.smoothquant import smooth
from worker.methods.quantization.smoothquant import Smoothquant

TASK, STUDENT = {"kind": "causal_lm", "block_tokens": 32}, {"kind": "teacher_layers", "keep": [0, 1]}
SMOOTHED = {"kind": "quantize", "bits": 8, "group": None, "method": {"kind": "smoothquant"}}
LOUD, LOUDER, SMALLER = [3, 17], 60, 20


def test_scales_are_those_of_the_formula() -> None:
    largest_I = torch.tensor([16.0, 1.0, 4.0])
    weights = [torch.tensor([[0.25, -1.0, 0.5], [0.1, 0.5, -4.0]]), torch.tensor([[-0.125, 0.25, 1.0]])]
    assert smooth(largest_I, weights, 0.5).tolist() == pytest.approx([8.0, 1.0, 1.0])  # √(16 / ¼), √(1 / 1), √(4 / 4)
    assert smooth(largest_I, weights, 1.0).tolist() == pytest.approx([16.0, 1.0, 4.0])
    assert smooth(largest_I, weights, 0.0).tolist() == pytest.approx([4.0, 1.0, 0.25])
    assert smooth(torch.zeros(3), weights, 0.5).min() > 0  # an input that is never there


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=lambda config: config.model_type)
def test_the_model_says_the_same(config: Any) -> None:
    model, scale = make_loud(config).double().eval(), Smoothquant().build_scaling(None)
    before = copy.deepcopy(model)
    for layer in find_matrices(model):
        show(model, layer)
        heard = {matrix.name: matrix.largest_I.clone() for matrix in layer}
        assert move_scales(model, layer, lambda hearing: scale(hearing, [])) > 1
        for matrix in layer:
            is_scaled = not torch.equal(heard[matrix.name], matrix.largest_I)
            assert is_scaled == matrix.name.removesuffix(".weight").endswith(tuple(ENDS[config.model_type])), (
                matrix.name
            )
    wanted, found = (one(input_ids=IDS).logits for one in (before, model))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10 * wanted.abs().max().item())


def plant(folder: Path, architecture: str) -> Path:
    """Writes a model some of whose states come out of every norm 60 times as loud, and count 3 times as much."""
    if architecture == "llama":
        tokenizer = AutoTokenizer.from_pretrained(folder)
        sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
        config = LlamaConfig(**sizes, num_hidden_layers=3, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    after = {
        "ln_1": ["attn.c_attn"],
        "ln_2": ["mlp.c_fc"],
        "input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
            layer, _, norm = name.removesuffix(".weight").rpartition(".")
            for part in after.get(norm, ()) if name.endswith("weight") else ():
                weight = model.get_submodule(f"{layer}.{part}").weight
                (weight if architecture == "gpt2" else weight.T)[LOUD] /= SMALLER
        for name, parameter in model.named_parameters():
            if name.rsplit(".", 2)[-2] in after:
                parameter[LOUD] *= LOUDER
    model.save_pretrained(folder)
    return folder


def say(folder: Path, ids_BT: torch.Tensor) -> np.ndarray:
    """Returns a graph's logits, by nothing but onnxruntime."""
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    known = {
        "input_ids": ids_BT.numpy(),
        "attention_mask": np.ones(ids_BT.shape, np.int64),
        "position_ids": np.arange(ids_BT.shape[1])[None].repeat(len(ids_BT), 0),
    }
    past = {
        node.name: np.zeros((len(ids_BT), node.shape[1], 0, node.shape[3]), np.float32)
        for node in session.get_inputs()
        if node.name not in known
    }
    return session.run(["logits"], known | past)[0]


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_eight_bits_lose_less_of_a_model_with_loud_states(architecture: str, tmp_path: Path) -> None:
    bench = Bench(tmp_path / "first").lay_language()
    folder, losses = plant(bench.inputs / "teacher", architecture), {}
    ids_BT = torch.randint(2, 30, (8, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(folder)(ids_BT).logits.numpy()
    for kind in ("rtn", "smoothquant"):
        stages = [
            SMOOTHED | {"method": {"kind": kind}},
            {"kind": "export", "formats": [{"kind": "onnx_int8", "min_agreement": 0.01}]},
        ]
        work, student = bench.copy(tmp_path / kind), STUDENT | {"keep": [0, 1, 2]}
        work.succeed_all(make_spec(stages, task=TASK, student=student), labels=[])
        losses[kind] = float(np.square(say(work.inputs / "onnx_int8", ids_BT) - wanted).mean() / wanted.var())
    assert losses["smoothquant"] < 0.05 * losses["rtn"]


def test_other_grids_are_refused_at_submit() -> None:
    stages = [SMOOTHED | {"bits": 4, "group": 64}, {"kind": "export"}]
    with pytest.raises(SpecInvalid) as caught:
        make_spec(stages, task=TASK, student=STUDENT)
    assert {detail["field"]: detail["message"] for detail in caught.value.details} == {
        "stages.0.bits": "with 'smoothquant' it can only be 8; set it to that",
        "stages.0.group": "with 'smoothquant' it can only be null; set it to that",
    }


ALBERT = AlbertConfig(**SIZES, embedding_size=32, num_hidden_groups=4)


@pytest.mark.parametrize("config", [*CONFIGS, LLAMA, ALBERT], ids=lambda config: config.model_type)
def test_models_none_of_whose_norms_takes_scales_are_refused_at_submit(config: Any) -> None:
    """Those are known by trial: the model must say the same."""
    model = make(config)
    with torch.no_grad():
        layers = find_matrices(model)
        taken = sum(move_scales(model, one, lambda some: torch.full_like(some[0].size_I, 2.0)) for one in layers)
    spec = load_spec(make_spec([SMOOTHED]))
    problems = spec.stages[0].check_model(spec, ModelFacts(model_type=config.model_type))
    assert [problem.field for problem in problems] == ([] if taken else ["method"])


def test_a_model_whose_norms_feed_more_is_refused(tmp_path: Path) -> None:
    """The norms of a BERT come after the sum, and go on into the next one."""
    failed = Bench(tmp_path).lay().run(make_spec([SMOOTHED]))
    assert (failed.last["type"], failed.last["reason"]) == ("error", "spec_invalid")
    assert "In a 'bert' every norm feeds more than matrices" in failed.last["message"]
    assert "choose the method 'rtn'" in failed.last["suggestion"]
