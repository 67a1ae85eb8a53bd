"""Layers that share their weights: stock ALBERTs of a BERT's or RoBERTa's weights."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    PreTrainedConfig,
    RobertaConfig,
)

from app.jobs.resolving import check_models
from core.jobs.spec import load_spec
from core.models.facts import ModelFacts, read_facts
from core.models.safetensors_header import read_tensors
from tests.engine_bench import FAST, Bench, make_spec
from tests.unit.test_engine_models import SIZES
from worker.engine.sharing import Narrow, share_layers
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


def embed(model: torch.nn.Module) -> NDArray[np.float64]:
    """Returns what a model's layers are given, of every word at each of 16 positions as either type."""
    first = model.config.pad_token_id + 1 if model.config.model_type == "roberta" else 0
    ids, places, kinds = torch.cartesian_prod(torch.arange(60), torch.arange(first, first + 16), torch.arange(2)).T
    with torch.no_grad():
        found = model.eval().base_model.embeddings(
            input_ids=ids[None], position_ids=places[None], token_type_ids=kinds[None]
        )
        if model.config.model_type == "albert":
            found = model.albert.encoder.embedding_hidden_mapping_in(found)
    return found[0].double().numpy()


def make_narrow(teacher: torch.nn.Module, size: int, *often: int, num_groups: int = 4) -> torch.nn.Module:
    """Returns a student with embeddings of that width; some words occur often, others never."""
    counts_V = np.zeros(60, dtype=np.int64)
    counts_V[[*often]] = 1000
    return share_layers(teacher, num_groups, "first", Narrow(size, counts_V))


def error_of(student: torch.nn.Module, expected: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(embed(student) - expected))


@each
def test_narrow_embeddings_give_nearly_what_the_teachers_do(config: PreTrainedConfig) -> None:
    """No table of E columns does better than the singular values say: a LayerNorm leaves E - 1 directions of it."""
    config = copy.deepcopy(config)
    config.max_position_embeddings = 18 if config.model_type == "roberta" else 16
    teacher = make(AutoModelForSequenceClassification, config)
    with torch.no_grad():  # words as they are: some directions tell more than others, and the LayerNorm has learned
        teacher.base_model.embeddings.word_embeddings.weight *= torch.linspace(1, 0.05, 32)
        teacher.base_model.embeddings.position_embeddings.weight *= 0.2
        teacher.base_model.embeddings.LayerNorm.weight.uniform_(0.5, 1.5)
        teacher.base_model.embeddings.LayerNorm.bias.normal_()
    expected = embed(teacher)
    lengths = np.linalg.svd(expected - expected.mean(axis=0), compute_uv=False)
    sizes = [2, 4, 8, 16, 24, 28, 31]
    errors = [error_of(make_narrow(teacher, size), expected) for size in sizes]
    for size, better, worse in zip(sizes[1:], errors[1:], errors, strict=False):
        assert better < worse
        assert np.linalg.norm(lengths[size - 1 :]) <= better < 1.6 * np.linalg.norm(lengths[size - 1 :])
    whole = make_narrow(teacher, 32)
    torch.testing.assert_close(answer(whole.eval()), answer(teacher), rtol=0, atol=0)
    rows = np.isin(np.repeat(np.arange(60), 32), [40, 50])  # of `embed`
    seen, unseen = (embed(make_narrow(teacher, 8, *often))[rows] - expected[rows] for often in ((40, 50), ()))
    assert np.linalg.norm(seen) < 0.5 * np.linalg.norm(unseen)


@each
def test_embeddings_that_need_few_directions_lose_nothing(config: PreTrainedConfig, tmp_path: Path) -> None:
    teacher = make(AutoModelForSequenceClassification, config)
    directions = torch.linalg.qr(torch.randn(32, 32)).Q[:, :6]
    with torch.no_grad():
        for table in ("word", "position", "token_type"):
            weight = teacher.base_model.embeddings.get_submodule(f"{table}_embeddings").weight
            weight.copy_(weight @ directions @ directions.T)
            weight -= weight.mean(dim=-1, keepdim=True)
    make_narrow(teacher, 7).save_pretrained(tmp_path)
    again, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert again.config.embedding_size == again.albert.embeddings.word_embeddings.weight.shape[1] == 7
    torch.testing.assert_close(answer(again.eval()), answer(teacher), rtol=0, atol=1e-3)
    assert error_of(make_narrow(teacher, 6), embed(teacher)) > 1


@each
@pytest.mark.parametrize(("num_groups", "size"), [(1, None), (2, 8), (4, None), (4, 31), (4, 32)])
def test_its_size_is_known_before_it_is_made(
    config: PreTrainedConfig, num_groups: int, size: int | None, tmp_path: Path
) -> None:
    teacher = make(AutoModelForSequenceClassification, config)
    teacher.save_pretrained(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    facts = read_facts(found, tensors=read_tensors(tmp_path / "model.safetensors"))
    made = make_narrow(teacher, size or 32, num_groups=num_groups)
    settings = SharedLayers(num_groups=num_groups, embedding_size=size)
    assert settings.check(facts) == []
    assert settings.count_parameters(facts) == made.num_parameters()


@pytest.mark.parametrize(
    ("teacher", "field", "words"),
    [
        (ModelFacts(model_type="bert", num_layers=6), "num_groups", "6 layers do not make 4 equal groups"),
        (ModelFacts(model_type="gpt2", num_layers=6), "kind", "no stock form that shares them"),
        (ModelFacts(model_type="bert", num_layers=4, hidden_size=32), "embedding_size", "choose at most as many"),
    ],
)
def test_what_cannot_be_shared_is_said_at_submit(teacher: ModelFacts, field: str, words: str) -> None:
    problem = SharedLayers(num_groups=4, embedding_size=33).check(teacher)[0]
    assert problem.field == field
    assert words in problem.message


SHARED = {"kind": "shared_layers", "num_groups": 3}
LAYERED: list[tuple[dict[str, Any], str]] = [
    ({"kind": "quantize"}, "kind"),
    ({"kind": "sparsify"}, "kind"),
    ({"kind": "prune", "num_layers": 3}, "kind"),
    ({"kind": "prune", "to": {"flops": 0.5}}, "kind"),
    ({"kind": "finetune", "of": "student", "adapter": {"kind": "lora"}}, "adapter"),
    ({"kind": "finetune", "of": "student", "adapter": {"kind": "ia3"}}, "adapter"),
    ({"kind": "distill", "sparsity": {}}, "sparsity"),
    ({"kind": "distill", "freeze": {}}, "freeze"),
    ({"kind": "distill", "layer_decay": 0.9}, "layer_decay"),
    ({"kind": "distill", "gradient_checkpointing": True}, "gradient_checkpointing"),
    ({"kind": "distill", "losses": [{"kind": "cross_entropy"}, {"kind": "hidden_mse"}]}, "losses.1"),
    ({"kind": "distill", "losses": [{"kind": "cross_entropy"}, {"kind": "value_relation"}]}, "losses.1"),
]


@pytest.mark.parametrize(("stage", "field"), LAYERED)
def test_what_needs_each_layer_alone_is_refused_at_submit(stage: dict[str, Any], field: str) -> None:
    spec = load_spec(make_spec([{"kind": "distill"}, stage], student=SHARED))
    [problem] = check_models(spec, {"teacher": ModelFacts(model_type="bert", num_layers=6)})
    assert problem["field"] == f"stages.1.{field}"
    assert "choose another kind of student" in problem["message"]


@pytest.mark.parametrize(("stage", "field"), LAYERED)
def test_so_it_is_of_a_student_that_comes_with_shared_layers(stage: dict[str, Any], field: str) -> None:
    spec = load_spec(make_spec([{"kind": "distill"}, stage], student={"kind": "pretrained", "model": "small"}))
    albert = ModelFacts(model_type="albert", num_layers=6)
    [problem] = check_models(spec, {"teacher": ModelFacts(model_type="bert", num_layers=6), "base": albert})
    assert problem["field"] == f"stages.1.{field}"
    assert "those of a 'pretrained' student have the same weights" in problem["message"]


def test_shared_layers_of_a_teacher_are_neither_compared_nor_searched() -> None:
    albert = ModelFacts(model_type="albert", num_layers=6)
    losses = [{"kind": "cross_entropy"}, {"kind": "hidden_mse"}]
    spec = load_spec(
        make_spec([{"kind": "distill", "losses": losses}], student={"kind": "pretrained", "model": "small"})
    )
    [problem] = check_models(spec, {"teacher": albert, "base": ModelFacts(model_type="bert", num_layers=6)})
    assert problem["field"] == "stages.0.losses"
    [problem] = check_models(
        load_spec(make_spec([{"kind": "search"}], student={"kind": "searched"})), {"teacher": albert}
    )
    assert problem["field"] == "student.kind"
    assert "as kind 'fresh'" in problem["message"]


WORKING = [stage for stage, field in LAYERED if stage["kind"] != "prune" and field != "gradient_checkpointing"]


@pytest.mark.parametrize("stage", WORKING)
def test_with_a_group_for_each_layer_it_works(stage: dict[str, Any], tmp_path: Path) -> None:
    short = {"epochs": 1, "batch_size": 64} if stage["kind"] in {"finetune", "distill"} else {"group": None}
    short = {} if stage["kind"] == "sparsify" else short
    bench = Bench(tmp_path).lay()
    spec = make_spec([stage | short], student=SHARED)
    assert check_models(load_spec(spec), {"teacher": ModelFacts(model_type="bert", num_layers=3)}) == []
    bench.succeed(spec)
    finished = bench.run(make_spec([stage | short], student=SHARED | {"num_groups": 1}), 0, "shared")
    assert finished.last["reason"] == "spec_invalid"


@pytest.mark.parametrize(
    "stage",
    [
        {"kind": "finetune", "of": "teacher", "layer_decay": 0.9, "freeze": {"layers": 1}},
        {"kind": "distill", "dropout": 0.1, "average": 0.9, "micro_batch_size": 8},
        {"kind": "finetune", "of": "student", "adapter": {"kind": "prompt"}},
        {"kind": "trim_vocabulary"},
    ],
)
def test_what_takes_layers_together_is_accepted(stage: dict[str, Any], tmp_path: Path) -> None:
    spec = make_spec([stage], student=SHARED | {"num_groups": 1})
    assert check_models(load_spec(spec), {"teacher": ModelFacts(model_type="bert", num_layers=6)}) == []
    Bench(tmp_path).lay().succeed(spec)


def test_a_job_distils_back_what_sharing_costs(tmp_path: Path) -> None:
    stages = [
        {"kind": "finetune", **FAST},
        {"kind": "distill", **FAST},
        {"kind": "export"},
        {"kind": "evaluate", "latency_samples": 10},
    ]
    spec = make_spec(stages, student={"kind": "shared_layers", "num_groups": 1, "embedding_size": 16})
    done = Bench(tmp_path).lay().succeed_all(spec)
    assert done[1].last["summary"]["validation"]["accuracy"] > 0.9
    config = json.loads((done[2].outputs / "safetensors" / "config.json").read_text())
    assert (config["model_type"], config["embedding_size"]) == ("albert", 16)
    rows = json.loads((done[3].outputs / "report" / "report.json").read_text())["models"]
    assert {row["name"] for row in rows} >= {"teacher", "student", "onnx", "onnx_int8"}
