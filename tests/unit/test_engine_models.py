"""Loading, cutting and optimising models of several architectures."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import (
    AlbertConfig,
    AutoModelForTokenClassification,
    BertConfig,
    BloomConfig,
    DistilBertConfig,
    ElectraConfig,
    FalconConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    PreTrainedConfig,
    RobertaConfig,
    get_cosine_schedule_with_warmup,
)
from transformers import AutoModelForSequenceClassification as Classifier

from core.errors import StageFailed
from core.models.facts import ModelFacts, read_facts
from core.models.safetensors_header import read_tensors
from tests import pico
from worker.engine.data import Examples, encode
from worker.engine.loading import find_layers, is_head, limit_length, load_classifier, load_tokenizer, save_classifier
from worker.engine.optimization import Average, make_optimizer, make_schedule, open_pooler, set_dropout
from worker.engine.students import choose_layers, keep_layers, make_fresh
from worker.methods.stages.finetune import Finetune
from worker.methods.students.fresh import Fresh
from worker.methods.students.pretrained import Pretrained
from worker.methods.students.teacher_layers import Choice, TeacherLayers

SIZES = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 4}
CONFIGS: list[PreTrainedConfig] = [
    BertConfig(**SIZES),
    RobertaConfig(**SIZES, max_position_embeddings=66, pad_token_id=1),
    DistilBertConfig(vocab_size=60, dim=32, hidden_dim=48, n_heads=2, n_layers=4),
    ElectraConfig(**SIZES, embedding_size=32),
    ModernBertConfig(
        **SIZES,
        global_attn_every_n_layers=3,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        cls_token_id=2,
        sep_token_id=3,
    ),
    GPT2Config(vocab_size=60, n_embd=32, n_layer=4, n_head=2, pad_token_id=0, bos_token_id=2, eos_token_id=3),
]
LLAMA = LlamaConfig(**SIZES, num_key_value_heads=2, pad_token_id=0)
LABELS = ["a", "b", "c"]


def make(config: PreTrainedConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config.num_labels = 3
    model = Classifier.from_config(config).eval()
    model.has_new_head = False
    return model


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_kept_layers_load_again_and_compute_as_the_teachers_do(config: PreTrainedConfig, tmp_path: Path) -> None:
    teacher = make(config)
    student = keep_layers(teacher, [0, 2, 3]).eval()
    student.save_pretrained(tmp_path)
    again, info = Classifier.from_pretrained(tmp_path, output_loading_info=True)
    assert again.config.num_hidden_layers == 3
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    inputs = {"input_ids": torch.randint(4, 60, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    if config.model_type == "gpt2":
        inputs["use_cache"] = False  # the cache counts layers by their old numbers
    with torch.no_grad():
        expected = _skip_layer(teacher, 1)(**inputs).logits
        torch.testing.assert_close(again.eval()(**inputs).logits, expected)
        torch.testing.assert_close(
            keep_layers(make(config), [0, 1, 2, 3]).eval()(**inputs).logits, make(config)(**inputs).logits
        )


def _skip_layer(model: torch.nn.Module, index: int) -> torch.nn.Module:
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == model.config.num_hidden_layers:
            del module[index]
            if hasattr(model.config, "layer_types") and model.config.layer_types:
                del model.config.layer_types[index]
    model.config.num_hidden_layers -= 1
    return model


@pytest.mark.parametrize(("num_groups", "keep"), [(1, [0, 1]), (1, [0, 1, 2, 3]), (4, [0, 1]), (4, [0, 1, 2, 3])])
def test_shared_layers_cannot_be_kept_apart(num_groups: int, keep: list[int], tmp_path: Path) -> None:
    model = make(AlbertConfig(**SIZES, embedding_size=16, num_hidden_groups=num_groups))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    facts = read_facts(config, tensors=read_tensors(tmp_path / "model.safetensors"))
    found = TeacherLayers(keep=keep).check(facts) + TeacherLayers(keep=Choice(count=len(keep))).check(facts)
    if (num_groups, len(keep)) == (4, 4):
        assert found == []
        assert keep_layers(model, keep).config.num_hidden_groups == 4
        return
    assert [problem.field for problem in found] == ["keep", "keep"]
    assert "layers of an 'albert' share their weights" in found[0].message
    if num_groups == 1:
        with pytest.raises(StageFailed, match="albert") as caught:
            keep_layers(model, keep)
        assert caught.value.reason == "spec_invalid"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = pico.write_model(tmp_path / "model")
    save_classifier(load_classifier(folder, LABELS), load_tokenizer(folder), LABELS, folder)
    return folder


def test_a_head_over_the_same_labels_is_put_in_their_order(saved: Path) -> None:
    first, second = load_classifier(saved, LABELS), load_classifier(saved, ["c", "a", "b"])
    assert not first.has_new_head
    assert not second.has_new_head
    torch.testing.assert_close(second.classifier.weight, first.classifier.weight[[2, 0, 1]])
    assert second.config.id2label == {0: "c", 1: "a", 2: "b"}


@pytest.mark.parametrize("labels", [["a", "b", "x"], ["a", "b"], ["a", "b", "c", "d"]])
def test_a_head_over_other_labels_is_new(saved: Path, labels: list[str]) -> None:
    model = load_classifier(saved, labels)
    assert model.has_new_head
    assert model.classifier.out_features == len(labels)
    old = load_classifier(saved, LABELS).classifier.weight
    assert not torch.equal(model.classifier.weight[:2], old[:2])
    assert list(model.config.label2id) == labels


def test_a_head_over_the_same_labels_for_words_is_not_one_for_texts(saved: Path) -> None:
    for saved_as, read_as in (
        (AutoModelForTokenClassification, Classifier),
        (Classifier, AutoModelForTokenClassification),
    ):
        model = saved_as.from_pretrained(saved)
        model.save_pretrained(saved)
        assert not load_classifier(saved, LABELS, saved_as).has_new_head
        other = load_classifier(saved, LABELS, read_as)
        assert other.has_new_head
        assert not torch.equal(other.classifier.weight, model.classifier.weight)


def test_a_folder_without_a_head_gets_one(tmp_path: Path) -> None:
    assert load_classifier(pico.write_model(tmp_path / "model"), LABELS).has_new_head


def test_weights_that_do_not_fit_are_told(saved: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(saved / "model.safetensors")
    save_file({f"x.{name}": tensor for name, tensor in weights.items()}, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(StageFailed, match="tensors of the model are missing") as caught:
        load_classifier(saved, LABELS)
    assert caught.value.reason == "teacher_unavailable"
    (saved / "model.safetensors").unlink()
    with pytest.raises(StageFailed, match="cannot be loaded") as caught:
        load_classifier(saved, LABELS)
    assert caught.value.reason == "teacher_unavailable"


def test_the_longest_input_is_what_the_positions_allow(saved: Path) -> None:
    for asked, found in ((16, 16), (500, 64)):
        tokenizer = load_tokenizer(saved)
        limit_length(load_classifier(saved, LABELS), tokenizer, asked)
        assert tokenizer.model_max_length == found
    tokenizer = load_tokenizer(saved)
    tokenizer.model_max_length = 10**30
    limit_length(make(CONFIGS[1]), tokenizer, 500)
    assert tokenizer.model_max_length == 64  # 66 positions, two of them never used


def test_a_tokenizer_that_names_no_limit_has_the_models(saved: Path) -> None:
    path = saved / "tokenizer_config.json"
    named = json.loads(path.read_text())
    del named["model_max_length"]
    path.write_text(json.dumps(named))
    tokenizer = load_tokenizer(saved)
    assert tokenizer.model_max_length == 64
    examples = Examples(["red " * 500], [0], None)
    assert encode(examples, tokenizer, ["input_ids"], torch.tensor([0])).num_cut == 1
    (saved / "config.json").unlink()
    assert encode(examples, load_tokenizer(saved), ["input_ids"], torch.tensor([0])).num_cut == 0


def test_a_decoder_whose_config_names_no_padding_has_the_tokenizers(tmp_path: Path) -> None:
    folder = pico.write_language_model(tmp_path / "model")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": None}))
    model, tokenizer = load_classifier(folder, LABELS).eval(), load_tokenizer(folder)
    assert model.config.pad_token_id == tokenizer.pad_token_id is not None
    ids = tokenizer("all and", add_special_tokens=False)["input_ids"]
    padded = torch.tensor([ids + [tokenizer.pad_token_id] * 3, ids[:1] * (len(ids) + 3)])
    torch.testing.assert_close(model(padded).logits[:1], model(torch.tensor([ids])).logits)


SETTINGS = Finetune(learning_rate=1e-4, head_learning_rate=1e-2, weight_decay=0.01)


def test_head_and_encoder_have_their_rates_and_norms_do_not_decay() -> None:
    model = make(CONFIGS[0])
    rates, names = {}, {id(parameter): name for name, parameter in model.named_parameters()}
    for group in make_optimizer(model, SETTINGS, is_head).param_groups:
        for parameter in group["params"]:
            name = names.pop(id(parameter))
            rates[name] = group["lr"]
            assert group["weight_decay"] == (0.01 if parameter.ndim >= 2 else 0)
    assert not names
    assert {name for name, rate in rates.items() if rate == 1e-2} == {
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    }
    assert is_head(model, "classifier.weight")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_every_architecture_has_a_head(config: PreTrainedConfig) -> None:
    model = make(config)
    heads = [is_head(model, name) for name, _ in model.named_parameters()]
    assert any(heads)
    assert not all(heads)


def rates_of(schedule: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    rates = []
    for _ in range(21):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def make_rates(kind: str) -> list[float]:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    return rates_of(make_schedule(optimizer, 20, Finetune(schedule=kind, warmup_ratio=0.2)), optimizer)


def test_the_rate_rises_and_falls_linearly() -> None:
    rates = make_rates("linear")
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[19] == pytest.approx(1 / 16)
    assert rates[20] == 0


def test_the_rate_falls_along_a_cosine_or_stays() -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    stock = rates_of(get_cosine_schedule_with_warmup(optimizer, 4, 20), optimizer)
    assert make_rates("cosine")[4:] == pytest.approx(stock[4:])
    assert make_rates("constant")[3:] == [1.0] * 18


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_rates_fall_from_layer_to_layer(config: PreTrainedConfig) -> None:
    model = make(config)
    stack, num_layers = find_layers(model)
    optimizer = make_optimizer(model, Finetune(layer_decay=0.5, learning_rate=0.1, head_learning_rate=0.2), is_head)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        rate = rates[id(parameter)]
        if is_head(model, name):
            assert rate == 0.2
        elif name.startswith(f"{stack}."):
            number = int(name.removeprefix(f"{stack}.").partition(".")[0])
            assert rate == pytest.approx(0.1 * 0.5 ** (num_layers - 1 - number))
        elif parameter is model.get_input_embeddings().weight:
            assert rate == pytest.approx(0.1 * 0.5**num_layers)


def test_the_average_is_that_of_torch() -> None:
    torch.manual_seed(0)
    model = make(CONFIGS[0])
    average = Average(model, 0.9)
    stock = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    stock.update_parameters(model)  # its first one copies
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update()
        stock.update_parameters(model)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with average.applied():
        for name, tensor in stock.module.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], tensor)
    for name, tensor in own.items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=0)


def test_dropout_is_set_everywhere_but_in_the_config() -> None:
    for config in (CONFIGS[0], CONFIGS[4]):
        model = make(config)
        model.train()
        set_dropout(model, 0.0)
        inputs = {"input_ids": torch.randint(4, 60, (2, 9))}
        torch.testing.assert_close(model(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)
    assert CONFIGS[0].hidden_dropout_prob == 0.1


def test_an_open_pooler_passes_the_first_token_on() -> None:
    model = make(CONFIGS[0])
    assert open_pooler(model)
    with torch.no_grad():
        output = model.bert(input_ids=torch.randint(4, 60, (2, 9)))
    torch.testing.assert_close(output.pooler_output, torch.tanh(output.last_hidden_state[:, 0]))
    assert not open_pooler(make(CONFIGS[2]))


@pytest.mark.parametrize("config", [*CONFIGS, LLAMA], ids=lambda config: config.model_type)
def test_a_fresh_model_has_the_sizes_and_loads_again(config: PreTrainedConfig, tmp_path: Path) -> None:
    teacher = make(config)
    for sizes, width, heads, layers in (
        (Fresh(num_layers=2, hidden_size=16), 16, 1, 2),
        (Fresh(num_layers=6, hidden_size=48, num_heads=4, intermediate_size=20), 48, 4, 6),
    ):
        student = make_fresh(teacher, sizes).eval()
        student.config.name_or_path = ""
        found = student.config
        assert (found.hidden_size, found.num_attention_heads, found.num_hidden_layers) == (width, heads, layers)
        assert find_layers(student)[1] == layers
        student.save_pretrained(tmp_path / str(width))
        again, info = Classifier.from_pretrained(tmp_path / str(width), output_loading_info=True)
        assert not info["missing_keys"] | info["unexpected_keys"]
        ids_BT = torch.arange(4, 12)[None]
        with torch.no_grad():
            torch.testing.assert_close(again.eval()(ids_BT).logits, student(ids_BT).logits)


def test_sizes_that_cannot_be_are_told() -> None:
    with pytest.raises(StageFailed, match="A 'bert' cannot have 2 heads and a width of 17"):
        make_fresh(make(CONFIGS[0]), Fresh(hidden_size=17, num_heads=2))
    bloom = make(BloomConfig(vocab_size=60, hidden_size=32, n_layer=2, n_head=2, pad_token_id=0))
    with pytest.raises(StageFailed, match="A 'bloom' has feed-forward layers of a width that follows"):
        make_fresh(bloom, Fresh(intermediate_size=64))
    [problem] = Fresh(intermediate_size=64).check(ModelFacts(model_type="bloom"))
    assert problem.field == "intermediate_size"
    assert make_fresh(bloom, Fresh(hidden_size=16)).config.hidden_size == 16
    falcon = make(
        FalconConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0)
    )
    assert make_fresh(falcon, Fresh(hidden_size=16)).config.head_dim == 16  # which its config does not let be set
    assert Fresh(num_heads=3).check(ModelFacts(model_type="bert", hidden_size=32))[0].field == "num_heads"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_the_size_of_a_student_is_known_from_its_teachers_headers(config: PreTrainedConfig, tmp_path: Path) -> None:
    teacher = make(config)
    teacher.save_pretrained(tmp_path / "teacher")
    keep_layers(teacher, [0, 2]).save_pretrained(tmp_path / "student")
    found = {}
    for name in ("teacher", "student"):
        settings = json.loads((tmp_path / name / "config.json").read_text())
        found[name] = read_facts(settings, tensors=read_tensors(tmp_path / name / "model.safetensors"))
    expected = found["student"].num_parameters
    assert TeacherLayers(keep=[0, 2]).count_parameters(found["teacher"]) == expected
    layers = found["teacher"].layer_parameters
    assert layers is not None
    by_rule = TeacherLayers(keep=Choice(count=2, by="importance")).count_parameters(found["teacher"])
    assert by_rule == (expected if len(set(layers)) == 1 else None)
    assert Pretrained(model="small").count_parameters(found["student"]) == expected


def test_layers_are_chosen_by_a_rule() -> None:
    teacher = make(CONFIGS[0])
    chosen = {rule: choose_layers(None, teacher, None, 2, rule) for rule in ("first", "last", "uniform")}  # type: ignore[arg-type]
    assert chosen == {"first": [0, 1], "last": [2, 3], "uniform": [1, 3]}


def test_a_first_layer_that_is_unlike_the_others_stays() -> None:
    """A ModernBERT's lacks a norm that each other layer begins with."""
    teacher = make(next(config for config in CONFIGS if config.model_type == "modernbert"))
    chosen = choose_layers(None, teacher, None, 2, "uniform")  # type: ignore[arg-type]
    assert chosen == [0, 3]
    assert keep_layers(teacher, chosen).config.num_hidden_layers == 2
    with pytest.raises(StageFailed, match="unlike the others") as caught:
        keep_layers(teacher, [1, 3])
    assert caught.value.suggestion == "Keep layer 0, as in [0, 3]."


@pytest.mark.parametrize("is_stored", [True, False], ids=["stored", "of a hub"])
def test_what_leaves_out_a_first_layer_that_must_stay_is_refused_at_submit(is_stored: bool, tmp_path: Path) -> None:
    """The weights tell, or where only the config is read the kind of model."""
    for config in (CONFIGS[0], CONFIGS[4]):
        make(config).save_pretrained(tmp_path)
        stored = json.loads((tmp_path / "config.json").read_text())
        facts = read_facts(stored, tensors=read_tensors(tmp_path / "model.safetensors") if is_stored else None)
        by_last = [TeacherLayers(keep=Choice(count=count, by="last")) for count in (2, 4)]
        problems = [student.check(facts) for student in (TeacherLayers(keep=[1, 3]), *by_last)]
        if config.model_type == "bert":
            assert problems == [[], [], []]
            continue
        [named], [ruled], all_kept = problems
        assert (named.field, ruled.field, all_kept) == ("keep", "keep.by", [])
        assert "unlike the others, and none can take its place; keep layer 0, as in [0, 3]" in named.message
        assert "choose 'uniform', 'first' or 'importance'" in ruled.message
        for student in (TeacherLayers(keep=[0, 3]), TeacherLayers(keep=Choice(count=2))):
            assert student.check(facts) == []


def test_the_layers_that_matter_most_are_kept() -> None:
    """By a score that falls with each layer that is missing, by as much as the layer is worth."""
    teacher, worth = make(CONFIGS[0]), [3.0, 0.5, 2.0, 1.0]
    marks = [layer.attention.self.query.weight[0, 0].item() for layer in teacher.bert.encoder.layer]
    seen = []

    class Task:
        def sample(self, *_: object) -> None: ...
        def score(self, model: Any, *_: object) -> float:
            left = [marks.index(layer.attention.self.query.weight[0, 0].item()) for layer in model.bert.encoder.layer]
            seen.append(left)
            return sum(worth[layer] for layer in left)

        def rank(self, score: float) -> tuple[float, ...]:
            return 0.0, score

    ctx: Any = SimpleNamespace(task=Task(), device="cpu", find_split=lambda _: "path", check_stop=None)
    assert choose_layers(ctx, teacher, None, 2, "importance") == [0, 2]
    assert len(seen) == 4 + 3
    teacher.has_new_head = True
    with pytest.raises(StageFailed, match="nothing tells which of its layers"):
        choose_layers(ctx, teacher, None, 2, "importance")
