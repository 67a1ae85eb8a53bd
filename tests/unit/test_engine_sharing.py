"""Layers that share their weights: stock ALBERTs of a BERT's or RoBERTa's weights."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    PreTrainedConfig,
    RobertaConfig,
)

from core.models.facts import ModelFacts, read_facts
from core.models.safetensors_header import read_tensors
from tests.engine_bench import FAST, Bench, make_spec
from tests.unit.test_engine_models import SIZES
from worker.engine.sharing import share_layers
from worker.methods.students.shared_layers import SharedLayers

CONFIGS = [BertConfig(**SIZES), RobertaConfig(**SIZES, max_position_embeddings=66, pad_token_id=1)]
each = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)


def make(auto_class: Any, config: PreTrainedConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config.num_labels, config.initializer_range = 3, 0.3
    model = auto_class.from_config(config).eval()
    model.has_new_head = False
    return model


def answer(model: torch.nn.Module) -> torch.Tensor:
    ids_BT, mask_BT = torch.randint(4, 60, (3, 9), generator=torch.Generator().manual_seed(0)), torch.ones(3, 9)
    ids_BT[0, 5:], mask_BT[0, 5:] = model.config.pad_token_id, 0
    with torch.no_grad():
        logits = model(input_ids=ids_BT, attention_mask=mask_BT).logits
    return logits if logits.dim() == 2 else logits[mask_BT > 0]  # what is said at padding is nobody's answer


@each
@pytest.mark.parametrize("auto_class", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_one_layer_a_group_is_the_teacher(config: PreTrainedConfig, auto_class: Any, tmp_path: Path) -> None:
    teacher = make(auto_class, config)
    share_layers(teacher, 4, "average").save_pretrained(tmp_path)
    again, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(answer(again.eval()), answer(teacher), rtol=0, atol=0)


@each
def test_a_group_of_equal_layers_is_the_teacher_stored_once(config: PreTrainedConfig, tmp_path: Path) -> None:
    teacher = make(AutoModelForSequenceClassification, config)
    stack = teacher.base_model.encoder.layer
    for layer in (stack[1], stack[3]):
        layer.load_state_dict(stack[0 if layer is stack[1] else 2].state_dict())
    for rule in ("average", "first", "middle", "last"):
        student = share_layers(teacher, 2, rule)
        torch.testing.assert_close(answer(student.eval()), answer(teacher), rtol=0, atol=1e-5)
    student.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if "attention.query.weight" in name]  # noqa: SIM118 - no dict
    assert len(names) == 2
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert again.config.num_hidden_layers == 4
    torch.testing.assert_close(answer(again.eval()), answer(student), rtol=0, atol=0)


@pytest.mark.parametrize(("rule", "place"), [("first", 0), ("middle", 1), ("last", 3)])
def test_a_rule_names_the_layer_that_is_stored(rule: str, place: int) -> None:
    teacher = make(AutoModelForSequenceClassification, CONFIGS[0])
    layer = share_layers(teacher, 1, rule).albert.encoder.albert_layer_groups[0].albert_layers[0]
    wanted = teacher.bert.encoder.layer[place]
    torch.testing.assert_close(layer.ffn.weight, wanted.intermediate.dense.weight, rtol=0, atol=0)
    torch.testing.assert_close(layer.attention.LayerNorm.bias, wanted.attention.output.LayerNorm.bias, rtol=0, atol=0)


@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_its_size_is_known_before_it_is_made(num_groups: int, tmp_path: Path) -> None:
    teacher = make(AutoModelForSequenceClassification, CONFIGS[0])
    teacher.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    facts = read_facts(config, tensors=read_tensors(tmp_path / "model.safetensors"))
    made = share_layers(teacher, num_groups, "average")
    assert SharedLayers(num_groups=num_groups).count_parameters(facts) == made.num_parameters()


@pytest.mark.parametrize(
    ("teacher", "field", "words"),
    [
        (ModelFacts(model_type="bert", num_layers=6), "num_groups", "6 layers do not make 4 equal groups"),
        (ModelFacts(model_type="gpt2", num_layers=6), "kind", "no stock form that shares them"),
    ],
)
def test_what_cannot_be_shared_is_said_at_submit(teacher: ModelFacts, field: str, words: str) -> None:
    problem = SharedLayers(num_groups=4).check(teacher)[0]
    assert problem.field == field
    assert words in problem.message


def test_a_job_distils_back_what_sharing_costs(tmp_path: Path) -> None:
    stages = [
        {"kind": "finetune", **FAST},
        {"kind": "distill", **FAST},
        {"kind": "export"},
        {"kind": "evaluate", "latency_samples": 10},
    ]
    spec = make_spec(stages, student={"kind": "shared_layers", "num_groups": 1})
    done = Bench(tmp_path).lay().succeed_all(spec)
    assert done[1].last["summary"]["validation"]["accuracy"] > 0.9
    assert json.loads((done[2].outputs / "safetensors" / "config.json").read_text())["model_type"] == "albert"
    rows = json.loads((done[3].outputs / "report" / "report.json").read_text())["models"]
    assert {row["name"] for row in rows} >= {"teacher", "student", "onnx", "onnx_int8"}
