"""How large a student will be, told from its teacher's files, against the student that the engine then makes of it."""

import copy
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BertForPreTraining,
    BertModel,
    ElectraConfig,
    ElectraForPreTraining,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    XLMRobertaConfig,
)

from core.errors import StageFailed
from core.models.facts import ModelFacts, read_facts
from core.models.safetensors_header import Tensor, read_tensors
from core.models.widths import KNOWN, OWN_HEADS
from tests import pico
from tests.unit.test_engine_models import CONFIGS, SIZES, make
from tests.unit.test_engine_narrowing import GROUPED, cut, logits, parts_of, weight_of
from worker.engine.matrices import find_matrices
from worker.engine.students import keep_layers, make_fresh
from worker.methods.students.fresh import Fresh
from worker.methods.students.teacher_layers import Choice, TeacherLayers

HEADS = SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
LIKE_LLAMA = (
    "ministral3 smollm3 gemma gemma2 gemma3_text cohere2 granite olmo arcee ernie4_5 exaone4 seed_oss stablelm nemotron"
).split()
ALIKE = {"hidden_size": 32, "vocab_size": 64, "max_position_embeddings": 32, "intermediate_size": 64}
DECODERS = [
    LlamaConfig(**SIZES, num_key_value_heads=2, pad_token_id=0),
    GROUPED,
    LlamaConfig(**HEADS | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    LlamaConfig(**HEADS, head_dim=16),
    MistralConfig(**HEADS),
    Qwen2Config(**HEADS),
    Qwen3Config(**HEADS, head_dim=12),
    *(CONFIG_MAPPING[kind](**HEADS | {"bos_token_id": 1, "eos_token_id": 2}) for kind in LIKE_LLAMA),
]
GPT2 = next(config for config in CONFIGS if config.model_type == "gpt2")
ALL: list[tuple[PreTrainedConfig, Any]] = [
    *[(config, None) for config in [*CONFIGS, *DECODERS] if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING],
    *[(config, AutoModelForCausalLM) for config in [GPT2, *DECODERS]],
    *[(config, AutoModelForMaskedLM) for config in CONFIGS if config is not GPT2],
    (XLMRobertaConfig(**SIZES), None),
    (BertConfig(**SIZES | ALIKE), None),  # as many positions as states, as many words as neurons
    (BertConfig(**SIZES | ALIKE), AutoModelForMaskedLM),
    (BertConfig(**SIZES), BertForPreTraining),
    (BertConfig(**SIZES), BertModel),
    (ElectraConfig(**SIZES, embedding_size=32), ElectraForPreTraining),
]
NAMES = [f"{config.model_type}-{model.__name__ if model else 'classifier'}" for config, model in ALL]
FRESH = [
    Fresh(),
    Fresh(num_layers=1),
    Fresh(num_layers=7, hidden_size=16),
    Fresh(hidden_size=24, num_heads=3),
    Fresh(num_layers=2, hidden_size=48, num_heads=4, intermediate_size=20),
    Fresh(intermediate_size=32),
]
NARROWER = [(16, None), (None, 24), (16, 16), (32, 48)]


def build(config: PreTrainedConfig, model: Any) -> Any:
    if model is None:
        return make(config)
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    made = model.from_config(config) if hasattr(model, "from_config") else model(config)
    made.has_new_head = False
    return made.eval()


def facts_of(folder: Path) -> ModelFacts:
    config = json.loads((folder / "config.json").read_text())
    return read_facts(config, tensors=read_tensors(folder / "model.safetensors"))


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("config", "model"), ALL, ids=NAMES)
def test_the_told_number_is_that_of_the_student(config: PreTrainedConfig, model: Any, tmp_path: Path) -> None:
    teacher = build(config, model)
    teacher.save_pretrained(tmp_path)
    facts = ModelFacts(**json.loads(facts_of(tmp_path).model_dump_json()))  # as the database gives them back
    for sizes in FRESH:
        assert sizes.count_parameters(facts) == count(make_fresh(teacher, sizes)), sizes
    keep = [0, config.num_hidden_layers - 1]
    for hidden_size, intermediate_size in NARROWER:
        asked = {"hidden_size": hidden_size, "intermediate_size": intermediate_size}
        told = [
            TeacherLayers(keep=kept, **asked).count_parameters(facts)
            for kept in (keep, Choice(count=2, by="importance"))
        ]
        made = cut(keep_layers(teacher, keep), hidden_size, intermediate_size)
        assert told == [count(made)] * 2, asked


@pytest.mark.parametrize("config", [*CONFIGS, *DECODERS], ids=lambda config: config.model_type)
def test_heads_go_alone_where_the_config_can_say_so(config: PreTrainedConfig, tmp_path: Path) -> None:
    """Of each layer other groups of heads say nothing; without these the model says what it said."""
    model = build(config, AutoModelForCausalLM if config in [GPT2, *DECODERS] else AutoModelForMaskedLM)
    half = config.num_attention_heads // 2
    for number, part in enumerate(parts_of(model)):
        into = weight_of(part.out)
        with torch.no_grad():
            (into[: len(into) // 2] if number % 2 else into[len(into) // 2 :]).zero_()
    model.save_pretrained(tmp_path / "whole")
    asked, facts = TeacherLayers(keep=[*range(config.num_hidden_layers)], num_heads=half), facts_of(tmp_path / "whole")
    if config.model_type not in OWN_HEADS:
        [problem] = asked.check(facts)
        assert (problem.field, "not known to have a width of a head" in problem.message) == ("num_heads", True)
        with pytest.raises(StageFailed, match="no width of a head of its own"):
            cut(model, None, None, num_heads=half)
        return
    assert asked.check(facts) == []
    student = cut(model, None, None, num_heads=half)
    assert student.config.num_attention_heads == half
    assert asked.count_parameters(facts) == count(student) < count(model)
    torch.testing.assert_close(logits(student), logits(model))
    student.save_pretrained(tmp_path / "made")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "made", output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    torch.testing.assert_close(logits(again), logits(student))


@pytest.mark.parametrize(
    ("config", "num_heads", "words"),
    [
        (GROUPED, 8, "has 4 heads; choose at most as many"),
        (GROUPED, 1, "2 heads share keys; choose a multiple"),
        (LlamaConfig(**HEADS | {"num_key_value_heads": 4}), 3, "there are 32; choose a divisor"),
    ],
)
def test_heads_that_cannot_be_are_refused_at_submit(
    config: PreTrainedConfig, num_heads: int, words: str, tmp_path: Path
) -> None:
    model = build(config, AutoModelForCausalLM)
    model.save_pretrained(tmp_path)
    [problem] = TeacherLayers(keep=[0], num_heads=num_heads).check(facts_of(tmp_path))
    assert (problem.field, words in problem.message) == ("num_heads", True)


OTHERS = [config for config in CONFIGS if config.model_type in {"deberta", "deberta-v2", "mpnet"}]


@pytest.mark.parametrize(
    ("config", "model"),
    [*ALL, *((config, None) for config in OTHERS)],
    ids=[*NAMES, *(config.model_type for config in OTHERS)],
)
def test_a_config_alone_tells_how_wide_the_matrices_are(config: PreTrainedConfig, model: Any, tmp_path: Path) -> None:
    made = build(config, model)
    made.save_pretrained(tmp_path)
    told = read_facts(json.loads((tmp_path / "config.json").read_text())).widths
    inputs = {matrix.weight_OI.shape[1] for matrices in find_matrices(made) for matrix in matrices}
    if told is None:  # it does not say how wide a head is
        assert config.model_type in KNOWN
        assert KNOWN[config.model_type] is KNOWN["llama"]
        return
    assert inputs <= {told.states, told.inner, told.num_heads * told.head}
    assert facts_of(tmp_path).widths == told


def test_every_kind_that_is_said_to_be_known_is_tried() -> None:
    assert {config.model_type for config, _ in ALL} == set(KNOWN)


def test_what_is_kept_of_the_shapes_is_small(tmp_path: Path) -> None:
    sizes = []
    for num_layers in (3, 12):
        pico.write_language_model(tmp_path / str(num_layers), num_layers)
        made = facts_of(tmp_path / str(num_layers)).composition
        assert made is not None
        sizes.append(len(made.model_dump_json()))
    assert sizes[0] == sizes[1] < 400


def test_what_the_names_do_not_tell_is_not_guessed(tmp_path: Path) -> None:
    make(ElectraConfig(**SIZES, embedding_size=16)).save_pretrained(tmp_path / "electra")  # narrower than the states
    assert facts_of(tmp_path / "electra").composition is None
    make(CONFIGS[0]).save_pretrained(tmp_path / "bert")
    config = json.loads((tmp_path / "bert/config.json").read_text())
    tensors = read_tensors(tmp_path / "bert/model.safetensors")
    assert read_facts(config, tensors=tensors).composition
    [place] = [i for i, tensor in enumerate(tensors) if tensor.name.endswith("layer.1.intermediate.dense.weight")]
    others = [*tensors[:place], *tensors[place + 1 :]]
    for wrong in (
        [*others, tensors[place]._replace(shape=(40, 32))],  # fewer neurons than other layers
        [*others, tensors[place]._replace(shape=(48 * 32,))],
        [*tensors, Tensor("bert.encoder.layer.0.attention.adapter.weight", "F32", (32,))],
        [*tensors, Tensor("cls.predictions.weight", "F32", (60,))],
        [*tensors, Tensor("bert.encoder.layer.5.output.dense.bias", "F32", (32,))],
        others,  # a layer that is not as the others
        [*tensors, Tensor("cls.predictions.decoder.weight", "F32", (60, 32))],  # the embeddings once more
        [tensor._replace(name=tensor.name.replace(".layer.", ".block.")) for tensor in tensors],
        [tensor._replace(shape=(0,) * len(tensor.shape)) for tensor in tensors],
        [],
    ):
        assert read_facts(config, tensors=wrong).composition is None
    for key, value in (
        ("hidden_size", 64),
        ("num_attention_heads", 3),
        ("num_attention_heads", 0),
        ("num_attention_heads", -2),
    ):
        assert read_facts(config | {key: value}, tensors=tensors).composition is None
    bare = read_facts(config, num_parameters=1_000)
    assert Fresh(num_layers=2).count_parameters(bare) is None
    assert TeacherLayers(keep=[0], hidden_size=16).count_parameters(bare) is None


def test_wider_and_deeper_is_larger(tmp_path: Path) -> None:
    """One layer tells nothing of the second, as a first one may lack a norm."""
    facts = facts_of(pico.write_model(tmp_path / "one", 1))
    assert Fresh(num_layers=1).count_parameters(facts) == facts.num_parameters
    assert Fresh(num_layers=2).count_parameters(facts) is None
    facts = facts_of(pico.write_model(tmp_path / "three", 3))
    told = [Fresh(num_layers=n, hidden_size=16 * n).count_parameters(facts) for n in (1, 2, 3)]
    assert all(less is not None and more is not None and less < more for less, more in pairwise(told))


def test_heads_that_do_not_divide_a_new_width_are_refused_at_submit() -> None:
    """Twelve heads of 32 states become three of 33 and a third in 100 states, which no BERT can have."""
    facts = ModelFacts(model_type="bert", num_layers=6, hidden_size=384, num_heads=12)
    [problem] = Fresh(hidden_size=100).check(facts)
    assert problem.field == "hidden_size"
    assert "3 heads" in problem.message
    teacher = BertModel(BertConfig(hidden_size=384, num_hidden_layers=1, vocab_size=9, intermediate_size=96))
    with pytest.raises(StageFailed):
        make_fresh(teacher, Fresh(hidden_size=100))
    for fine in (Fresh(hidden_size=96), Fresh(hidden_size=100, num_heads=4), Fresh(hidden_size=16), Fresh()):
        assert fine.check(facts) == []
        teacher.has_new_head = True
        make_fresh(teacher, fine)
