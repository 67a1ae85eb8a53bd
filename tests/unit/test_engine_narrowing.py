"""Narrower copies: what they keep, that stock `transformers` loads them, and that they compute what is kept."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification as Classifier
from transformers import (
    BloomConfig,
    ConvBertConfig,
    CTRLConfig,
    DebertaConfig,
    DebertaV2Config,
    ElectraConfig,
    EsmConfig,
    FalconConfig,
    FNetConfig,
    GPTBigCodeConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    LongformerConfig,
    MixtralConfig,
    MobileBertConfig,
    MPNetConfig,
    MptConfig,
    NystromformerConfig,
    OPTConfig,
    PersimmonConfig,
    Phi3Config,
    PreTrainedConfig,
)
from transformers.pytorch_utils import Conv1D

from core.errors import StageFailed
from core.models.facts import ModelFacts, read_facts
from core.models.safetensors_header import read_tensors
from tests import pico
from tests.engine_bench import FAST, Bench, make_spec
from tests.unit.test_engine_models import CONFIGS, SIZES, make
from worker.engine.data import Batch
from worker.engine.loading import find_layers, load_classifier
from worker.engine.narrowing import _find_part, narrow
from worker.methods.students.teacher_layers import TeacherLayers
from worker.methods.tasks.text_classification import TextClassification

GROUPED = LlamaConfig(
    **SIZES | {"num_attention_heads": 4, "num_hidden_layers": 2}, num_key_value_heads=2, pad_token_id=0
)
POOLED = DebertaV2Config(**SIZES)  # with a pooler whose width is named apart
OPT = OPTConfig(
    vocab_size=60, hidden_size=32, ffn_dim=48, num_attention_heads=2, num_hidden_layers=4, word_embed_proj_dim=32
)
NEO = GPTNeoConfig(
    vocab_size=60, hidden_size=32, num_heads=2, num_layers=4, attention_types=[[["global"], 4]], pad_token_id=0
)
CTRL = CTRLConfig(vocab_size=60, n_embd=32, dff=48, n_layer=4, n_head=2, pad_token_id=0)
KNOWN = [*CONFIGS, GROUPED, POOLED, OPT, NEO, CTRL]
UNFIT: list[tuple[PreTrainedConfig, dict[str, int]]] = [
    (GPTNeoXConfig(**SIZES, pad_token_id=0), {"hidden_size": 16}),  # of each head in turn its query, key and value
    (BloomConfig(vocab_size=60, hidden_size=32, n_layer=4, n_head=2, pad_token_id=0), {"intermediate_size": 64}),
    (DebertaConfig(**SIZES, pos_att_type=["c2p"], relative_attention=True), {"intermediate_size": 24}),
    *[
        (kind(**SIZES, **more, pad_token_id=0), {width: 16})
        for kind, more in {
            FalconConfig: {},
            FNetConfig: {},
            LongformerConfig: {"attention_window": 4},
            MixtralConfig: {"num_key_value_heads": 2},
            MobileBertConfig: {"embedding_size": 32},
            PersimmonConfig: {},
            Phi3Config: {"num_key_value_heads": 2},
        }.items()
        for width in ("hidden_size", "intermediate_size")
    ],
    (GPTBigCodeConfig(vocab_size=60, n_embd=32, n_layer=4, n_head=2, pad_token_id=0), {"hidden_size": 16}),
    (MptConfig(vocab_size=60, d_model=32, n_layers=4, n_heads=2, pad_token_id=0), {"hidden_size": 16}),
    *[
        (kind(**SIZES, pad_token_id=0), {"hidden_size": 16})
        for kind in (ConvBertConfig, EsmConfig, MPNetConfig, NystromformerConfig)
    ],
    (ElectraConfig(**SIZES, embedding_size=16), {"hidden_size": 16}),  # from 16 to 32 leads a map, to 16 none
]
IDS_BT = torch.arange(4, 40).reshape(3, 12)
each = pytest.mark.parametrize("config", KNOWN, ids=lambda config: config.model_type)


class Sample:
    """Some texts of one length with their classes."""

    def shuffled(self, *_: object) -> Iterator[Batch]:
        inputs = {"input_ids": IDS_BT, "attention_mask": torch.ones_like(IDS_BT)}
        yield Batch(inputs, torch.tensor([0, 1, 2]), torch.arange(3))


def context() -> Any:
    """A task of three texts."""
    task = SimpleNamespace(
        sample=lambda *_: Sample(), answer=lambda model, batch: batch.row_logits(model(**batch.inputs)[0])
    )
    return SimpleNamespace(
        task=task,
        spec=SimpleNamespace(task=TextClassification()),
        seed=0,
        device=torch.device("cpu"),
        find_split=lambda _: Path("validation.jsonl"),
        check_stop=lambda: None,
    )


def cut(
    model: Any,
    hidden_size: int | None,
    intermediate_size: int | None,
    by: str = "activation",
    num_heads: int | None = None,
) -> Any:
    sizes = {"hidden_size": hidden_size, "num_heads": num_heads, "intermediate_size": intermediate_size}
    return narrow(context(), model, None, TeacherLayers(keep=[0], **sizes, importance={"kind": by}))  # type: ignore[arg-type]


def parts_of(model: torch.nn.Module) -> list[Any]:
    stack, _ = find_layers(model)
    return [_find_part(layer, model.config) for layer in model.get_submodule(stack)]


def weight_of(module: torch.nn.Module) -> torch.Tensor:
    """Returns a linear map's weight with a row for each of its inputs."""
    return module.weight if isinstance(module, Conv1D) else module.weight.T


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS_BT, attention_mask=torch.ones_like(IDS_BT)).logits


@each
def test_neurons_that_say_nothing_go_first_and_nothing_changes(config: PreTrainedConfig) -> None:
    model = make(config)
    width = weight_of(parts_of(model)[0].down).shape[0]
    silent = [torch.randperm(width)[: width // 4] for _ in parts_of(model)]
    with torch.no_grad():
        for part, places in zip(parts_of(model), silent, strict=True):
            weight_of(part.down)[places] = 0
    student = cut(model, None, width - width // 4)
    torch.testing.assert_close(logits(student), logits(model))
    assert all(weight_of(part.down).shape[0] == width - width // 4 for part in parts_of(student))


@each
def test_half_as_wide_loads_again_and_as_wide_is_the_same(config: PreTrainedConfig, tmp_path: Path) -> None:
    model = make(config)
    student = cut(model, 16, None)
    found = student.config
    assert (found.hidden_size, found.num_attention_heads) == (16, config.num_attention_heads // 2)
    student.save_pretrained(tmp_path)
    again, info = Classifier.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    torch.testing.assert_close(logits(again), logits(student))
    whole = cut(model, 32, None)
    torch.testing.assert_close(logits(whole), logits(model))


@pytest.mark.parametrize("config", [GROUPED, CONFIGS[0]], ids=lambda config: config.model_type)
def test_heads_that_say_nothing_go_first(config: PreTrainedConfig) -> None:
    """The half of the heads that says something is kept, with its weights, along the states that are kept."""
    model = make(config)
    for part in parts_of(model):
        values = part.projections[2]
        half = weight_of(values).shape[1] // 2
        with torch.no_grad():
            weight_of(values)[:, :half] = 0
            if values.bias is not None:
                values.bias[:half] = 0
    student = cut(model, 16, None)
    for old, new in zip(parts_of(model), parts_of(student), strict=True):
        kept = weight_of(old.out)[-weight_of(old.out).shape[0] // 2 :]
        columns = [column for column in kept.T if any(torch.equal(column, other) for other in weight_of(new.out).T)]
        assert len(columns) == 16


def test_what_cannot_be_narrowed_is_told() -> None:
    bert = CONFIGS[0]
    with pytest.raises(StageFailed, match="cannot have 20 states"):
        cut(make(bert), 20, None)
    with pytest.raises(StageFailed, match="and 99 neurons"):
        cut(make(bert), None, 99)
    facts = ModelFacts(model_type="bert", num_layers=4, hidden_size=32, num_heads=2)
    for width, why in ((64, "cannot be wider"), (20, "16 wide; choose a multiple")):
        [problem] = TeacherLayers(keep=[0], hidden_size=width).check(facts)
        assert (problem.field, why in problem.message) == ("hidden_size", True)
    assert TeacherLayers(keep=[0], hidden_size=16).count_parameters(facts) is None


@pytest.mark.parametrize(("config", "asked"), UNFIT, ids=lambda value: getattr(value, "model_type", None))
def test_what_the_kind_of_model_rules_out_is_refused_at_submit(config: PreTrainedConfig, asked: dict[str, int]) -> None:
    [problem] = TeacherLayers(keep=[0], **asked).check(read_facts(config.to_dict()))
    assert [problem.field] == [*asked]
    with pytest.raises(StageFailed, match="are not built as narrowing knows them"):
        cut(make(config), asked.get("hidden_size"), asked.get("intermediate_size"))
    assert TeacherLayers(keep=[0]).check(read_facts(config.to_dict())) == []


def test_embeddings_narrower_than_the_states_stay_as_they_are() -> None:
    config = ElectraConfig(**SIZES, embedding_size=24)
    assert TeacherLayers(keep=[0], hidden_size=16).check(read_facts(config.to_dict())) == []
    student = cut(make(config), 16, None)
    assert (student.config.embedding_size, student.config.hidden_size) == (24, 16)


@pytest.mark.parametrize("width", [48, 96])
def test_neurons_that_cannot_be_told_from_states_are_refused_at_submit(width: int, tmp_path: Path) -> None:
    folder = pico.write_model(tmp_path / "model", width=width)  # of 48 neurons
    config = json.loads((folder / "config.json").read_text())
    facts = read_facts(config, tensors=read_tensors(folder / "model.safetensors"))
    [problem] = TeacherLayers(keep=[0], intermediate_size=24).check(facts)
    assert problem.field == "intermediate_size"
    assert f"{width} states and 48 neurons" in problem.message
    with pytest.raises(StageFailed, match="are not built as narrowing knows them"):
        cut(load_classifier(folder, ["a", "b"]), None, 24)
    assert TeacherLayers(keep=[0]).check(facts) == []


def test_a_narrower_student_learns(tmp_path: Path) -> None:
    bench = Bench(tmp_path).lay()
    student = {"kind": "teacher_layers", "keep": [0, 2], "hidden_size": 16, "intermediate_size": 24}
    stages = [{"kind": "finetune", **FAST}, {"kind": "distill", **FAST, "epochs": 12}]
    _, distil = bench.succeed_all(make_spec(stages, student=student))
    made = Classifier.from_pretrained(distil.outputs / "student")
    assert (made.config.hidden_size, made.config.intermediate_size, made.config.num_hidden_layers) == (16, 24, 2)
    assert distil.last["summary"]["validation"]["accuracy"] > 0.9
    assert "of 32 states are kept" in distil.log
