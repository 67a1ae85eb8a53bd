"""What holds for every loss on layers: against what stock transformers says of them, and in a real stage."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaConfig,
    DebertaV2Config,
    DistilBertConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from app.jobs.resolving import check_models
from core.errors import SpecInvalid, StageFailed
from core.jobs.spec import load_spec
from core.losses import FeatureLoss
from core.methods import Depths
from core.models.facts import ModelFacts
from core.models.widths import Composition, Widths
from core.registry import list_methods
from tests import pico
from tests.engine_bench import FAST, Bench, make_spec
from tests.feature_oracles import ORACLES, states
from worker.engine.blocks import Blocks
from worker.engine.data import Batch
from worker.engine.features import Features
from worker.engine.students import keep_layers
from worker.engine.watching import Watched

LOSSES = {kind: loss for kind, loss in list_methods("losses").items() if issubclass(loss, FeatureLoss)}
every_loss = pytest.mark.parametrize("kind", sorted(LOSSES))
SIZES = {"vocab_size": 60, "num_labels": 3}
BERT = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 4}
CONFIGS: list[PreTrainedConfig] = [
    BertConfig(**SIZES, **BERT),
    DistilBertConfig(**SIZES, dim=32, hidden_dim=48, n_heads=2, n_layers=4),
    GPT2Config(**SIZES, n_embd=32, n_layer=4, n_head=2, pad_token_id=0),
    LlamaConfig(**SIZES, **BERT, num_key_value_heads=1, pad_token_id=0),
]


class Task:
    kind = "text_classification"


class Spec:
    task = Task()


class Context:
    spec = Spec()


def make(config: PreTrainedConfig) -> tuple[PreTrainedModel, PreTrainedModel, Batch]:
    """Teacher, a student of two of its layers with other weights, and a padded batch."""
    torch.manual_seed(0)
    teacher = AutoModelForSequenceClassification.from_config(config).eval()
    teacher.has_new_head = False
    student = keep_layers(teacher, [0, 2]).eval()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    mask_BT = (torch.arange(6) < torch.tensor([6, 4, 1])[:, None]).long()
    inputs = {"input_ids": torch.randint(4, 60, (3, 6)) * mask_BT, "attention_mask": mask_BT}
    return student, teacher, Batch(inputs, torch.zeros(3, dtype=torch.long), torch.arange(3))


def compare(kind: str, student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch, **settings: Any) -> float:
    loss = LOSSES[kind].model_validate({"kind": kind, "layers": "last", **settings})
    features = Features(Context(), [(kind, loss)], Watched(student), Watched(teacher))  # type: ignore[arg-type]
    whole = 0.0
    for part in batch.parts(2):  # in parts, so that the denominator must be that of the whole
        for model in (student, teacher):
            model(**part.inputs)
        value, numbers = features.compare(part, batch)
        value.backward()
        assert value.item() == pytest.approx(numbers[kind] * loss.weight)
        whole += numbers[kind]
    return whole


def configs(kind: str) -> list[PreTrainedConfig]:
    """Returns those of which the oracle knows what is compared; decoders tell states after the last norm."""
    if kind == "attention_kl":
        return CONFIGS
    return CONFIGS[: 2 if LOSSES[kind].projects else 3]


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        pytest.param(kind, config, id=f"{config.model_type}-{kind}")
        for kind in sorted(LOSSES)
        for config in configs(kind)
    ],
)
def test_it_is_what_the_models_own_outputs_give(kind: str, config: PreTrainedConfig) -> None:
    """Value and gradient by every weight."""
    assert kind in ORACLES, f"name an independent oracle for '{kind}'"
    student, teacher, batch = make(config)
    size = len(batch.rows) if LOSSES[kind].denominator == "examples" else batch.inputs["attention_mask"].sum()
    stock = states(student.double(), batch)
    expected = ORACLES[kind](stock, states(teacher.double(), batch), batch) / size
    expected.backward()
    assert compare(kind, student, teacher, batch) == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(student.parameters(), stock.model.parameters(), strict=True):
        found, gradient = (torch.zeros_like(x) if x.grad is None else x.grad for x in (ours, theirs))
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-7)


def test_relations_are_of_as_many_heads_as_the_student_has() -> None:
    _, teacher, batch = make(CONFIGS[0])
    student, _, _ = make(BertConfig(**SIZES, **BERT | {"hidden_size": 16, "num_attention_heads": 4}))
    expected = ORACLES["relations"](states(student, batch), states(teacher, batch), batch)
    tokens = batch.inputs["attention_mask"].sum().item()
    assert compare("relations", student, teacher, batch) == pytest.approx(expected.item() / tokens, rel=1e-4)


@every_loss
def test_what_fills_up_the_last_block_of_a_stream_does_not_count(kind: str) -> None:
    """The last block of eight has three places; the same three stand alone in a batch without filler."""
    student, teacher, _ = make(CONFIGS[2])
    ids = np.arange(10, 22, dtype=np.int32)
    filled = Blocks(ids, ids > 0, 8).batch(np.array([1]), torch.device("cpu"))
    assert filled.inputs["input_ids"].shape == (1, 8)
    assert filled.inputs.keys() == {"input_ids"}
    alone = Batch({"input_ids": torch.arange(18, 21)[None]}, torch.zeros(1, 3), torch.arange(3)[None])
    expected = compare(kind, student, teacher, alone)
    assert compare(kind, student, teacher, filled) == pytest.approx(expected, rel=1e-4)


def test_relations_fit_models_whose_heads_divide_nothing() -> None:
    wide = {"hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 48}
    _, teacher, batch = make(CONFIGS[0])
    student = AutoModelForSequenceClassification.from_config(BertConfig(**SIZES, **wide)).eval()
    found = compare("relations", student, teacher, batch)
    assert found == pytest.approx(compare("relations", student, teacher, batch, heads=1))
    with pytest.raises(StageFailed, match="3 relation heads do not divide the widths 32, 48"):
        compare("relations", student, teacher, batch, heads=3)


@every_loss
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_every_architecture_can_be_compared(kind: str, config: PreTrainedConfig) -> None:
    student, teacher, batch = make(config)
    assert compare(kind, student, teacher, batch, weight=0.5, layers="uniform") > 0
    assert compare(kind, teacher, teacher, batch) == pytest.approx(0, abs=1e-6)


TURNED: list[PreTrainedConfig] = [  # by places, and in the last one scaled, before they are compared
    ModernBertConfig(**SIZES, **BERT, pad_token_id=0, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3),
    GPTNeoXConfig(**SIZES, **BERT, rotary_pct=0.5, pad_token_id=0),
    Qwen3Config(**SIZES, **BERT, num_key_value_heads=1, head_dim=16, pad_token_id=0),
]


@pytest.mark.parametrize("config", [*CONFIGS, *TURNED], ids=lambda config: config.model_type)
def test_they_are_what_the_attention_compares(config: PreTrainedConfig) -> None:
    _, teacher, batch = make(config)
    plain = teacher(**batch.inputs).logits
    watched = Watched(teacher)
    watched.ask({"query": [0], "key": [0]})
    torch.testing.assert_close(teacher(**batch.inputs).logits, plain, rtol=0, atol=0)
    found = states(teacher, batch)
    layer = watched.take(0)
    heads = config.num_attention_heads
    query, key = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (layer.query_BTD, layer.key_BTD))
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    pairs = torch.ones(6, 6, dtype=torch.bool)
    if config.model_type in ("gpt2", "llama", "gpt_neox", "qwen3"):
        pairs = pairs.tril()
    attention = scores.masked_fill(~pairs, -1e9).softmax(-1)[0]
    torch.testing.assert_close(attention, found.attentions[0][0], rtol=1e-4, atol=1e-5)


def test_where_attention_is_a_models_own_its_projections_are_compared() -> None:
    config = DebertaV2Config(**SIZES, **BERT, pos_att_type=["c2p"], relative_attention=True)
    student, teacher, batch = make(config)
    [query] = [module for name, module in teacher.named_modules() if name.endswith("0.attention.self.query_proj")]
    made: list[Tensor] = []
    query.register_forward_hook(lambda _, __, output: made.append(output))
    watched = Watched(teacher)
    watched.ask({"query": [0]})
    teacher(**batch.inputs)
    assert torch.equal(watched.take(0).query_BTD, made[0])
    assert compare("relations", student, teacher, batch) > 0
    _, fused, _ = make(DebertaConfig(**SIZES, **BERT, pos_att_type=["c2p"], relative_attention=True))
    with pytest.raises(StageFailed, match=r"'DebertaLayer' has no queries, keys and values of its own"):
        Watched(fused).ask({"query": [0]})


def test_projections_are_compared_with_the_adapter_that_the_model_is_given_then() -> None:
    """Against the model into whose weights the adapter is merged."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(DebertaV2Config(**SIZES, **BERT)).eval()
    watched = Watched(model)
    watched.ask({"query": [0], "value": [0]})
    adapter = LoraConfig(r=2, target_modules=["query_proj", "value_proj"], init_lora_weights=False)
    wrapped = get_peft_model(model, adapter)
    ids = torch.arange(12).view(2, 6)
    hidden_BTD = model(input_ids=ids, output_hidden_states=True).hidden_states[0]
    found = watched.take(0)
    merged = wrapped.merge_and_unload().deberta.encoder.layer[0].attention.self
    torch.testing.assert_close(found.query_BTD, merged.query_proj(hidden_BTD))
    torch.testing.assert_close(found.value_BTD, merged.value_proj(hidden_BTD))


@pytest.mark.parametrize("config", [*CONFIGS, *TURNED], ids=lambda config: config.model_type)
def test_embeddings_are_compared(config: PreTrainedConfig) -> None:
    """Value and gradient, against torch's distance of what stock transformers says they are."""
    student, teacher, batch = make(config)
    mask_BT = batch.inputs["attention_mask"].bool()
    s_NH, t_NH = (
        model(**batch.inputs, output_hidden_states=True).hidden_states[0][mask_BT] for model in (student, teacher)
    )
    expected = torch.nn.functional.mse_loss(s_NH, t_NH.detach())
    table = student.get_input_embeddings().weight
    [gradient] = torch.autograd.grad(expected, table)
    assert compare("hidden_mse", student, teacher, batch, layers="embeddings") == pytest.approx(
        expected.item(), rel=1e-5
    )
    torch.testing.assert_close(table.grad, gradient, rtol=1e-4, atol=1e-8)


def test_embeddings_have_states_alone_and_are_not_kept() -> None:
    soft, embedded = {"kind": "forward_kl"}, {"kind": "hidden_mse", "layers": "embeddings"}
    kept = {"kind": "answer", "layers": {"hidden": [-1]}}
    for stages, field, hint in (
        (
            [{"kind": "distill", "losses": [soft, embedded | {"kind": "relations"}]}],
            "stages.0.losses.1",
            "'hidden_mse'",
        ),
        (
            [kept, {"kind": "distill", "losses": [soft, embedded]}],
            "stages.1.losses.1.layers",
            "stages.0 keeps no embed",
        ),
    ):
        with pytest.raises(SpecInvalid) as caught:
            make_spec(stages)
        [detail] = caught.value.details
        assert detail["field"] == field
        assert hint in detail["message"]


@pytest.mark.parametrize(
    ("layers", "pairs"),
    [
        ("uniform", [(0, 1), (1, 3), (2, 5)]),
        ("skip", [(0, 1), (1, 3)]),
        ("last", [(2, 5)]),
        ("embeddings", [(-1, -1)]),
        ([[0, 0], [2, 5]], [(0, 0), (2, 5)]),
    ],
)
def test_layers_are_mapped(layers: Any, pairs: list[tuple[int, int]]) -> None:
    loss = LOSSES["hidden_mse"].model_validate({"kind": "hidden_mse", "layers": layers})
    assert loss.pairs(Depths(3, 6)) == pairs


def test_layers_of_a_student_that_is_deeper_are_mapped_to_layers() -> None:
    loss = LOSSES["hidden_mse"].model_validate({"kind": "hidden_mse"})
    assert loss.pairs(Depths(5, 2)) == [(0, 0), (1, 0), (2, 0), (3, 0), (4, 1)]


def test_a_layer_that_is_not_there_is_told() -> None:
    student, teacher, batch = make(CONFIGS[0])
    with pytest.raises(StageFailed, match=r"\[0, 4\].*the student has 2 layers and the teacher 4"):
        compare("hidden_mse", student, teacher, batch, layers=[[0, 4]])


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"layers": "first"}, "losses.1.layers"),
        ({"layers": []}, "losses.1"),
        ({"layers": [[0]]}, "losses.1.layers"),
        ({"weight": "auto"}, "losses.1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(SpecInvalid) as caught:
        make_spec([{"kind": "distill", "losses": [{"kind": "cross_entropy"}, {"kind": "hidden_mse", **settings}]}])
    assert caught.value.details[0]["field"] == f"stages.0.{field}"


def facts_of(num_heads: int, states: int = 32) -> ModelFacts:
    widths = Widths(states=states, inner=48, head=states // num_heads, num_heads=num_heads, num_groups=num_heads)
    composition = Composition(widths=widths, outside={}, first_layer={}, other_layer={})
    return ModelFacts(model_type="bert", num_layers=2, hidden_size=states, composition=composition)


@pytest.mark.parametrize(
    ("loss", "student", "hint"),
    [
        ({"kind": "attention_mse"}, facts_of(2), None),
        ({"kind": "attention_mse"}, facts_of(4), "the student has 4 of them and the teacher 2; use 'relations'"),
        ({"kind": "value_relation"}, facts_of(4), "use 'relations'"),
        ({"kind": "relations"}, facts_of(4), None),
        ({"kind": "relations", "heads": 4}, facts_of(2), None),
        ({"kind": "relations", "heads": 3}, facts_of(2), "3 relation heads do not divide the widths 32; choose a div"),
        ({"kind": "relations", "heads": 32}, facts_of(4, 16), "the widths 16 and 32; choose a divisor of 16, or null"),
        ({"kind": "attention_mse"}, ModelFacts(model_type="bert", num_layers=2), None),
    ],
)
def test_heads_that_do_not_fit_are_told_at_submit(loss: dict[str, Any], student: ModelFacts, hint: str | None) -> None:
    stages = [{"kind": "distill", "losses": [{"kind": "cross_entropy"}, loss]}]
    spec = load_spec(make_spec(stages, student={"kind": "pretrained", "model": "small"}))
    found = check_models(spec, {"teacher": facts_of(2), "base": student})
    assert [problem["field"] for problem in found] == ["stages.0.losses.1"] * (hint is not None)
    assert all(hint in problem["message"] for problem in found)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("bench")).lay()
    finetuned = bench.run(make_spec([{"kind": "finetune", **FAST}]), 0, name="teacher")
    bench.adopt(finetuned, 0, "finetune")
    return bench


def test_all_of_them_train_in_one_stage(bench: Bench) -> None:
    losses = [{"kind": kind} for kind in ("cross_entropy", "forward_kl", *sorted(LOSSES))]
    finished = bench.run(make_spec([{"kind": "distill", **FAST, "losses": losses}]), 0, name="all")
    assert finished.last["type"] == "result", finished.log
    for kind in LOSSES:
        values = [value for _, value in finished.series(f"loss/{kind}")]
        assert values[-1] < values[0], kind
        assert all(0 <= share < 1 for _, share in finished.series(f"share/{kind}"))
    totals = dict(finished.series("loss/total"))
    for step, total in totals.items():
        parts = sum(dict(finished.series(f"loss/{loss['kind']}"))[step] for loss in losses)
        assert total == pytest.approx(parts, rel=1e-4)


def test_a_heavy_loss_on_layers_is_warned_of_by_its_share_of_the_loss(bench: Bench) -> None:
    losses = [{"kind": "cross_entropy"}, {"kind": "hidden_mse", "weight": 1e9}]
    finished = bench.succeed(make_spec([{"kind": "distill", **FAST, "epochs": 1, "losses": losses}]), 0, "heavy")
    events = {report["event"]["data"].get("term"): report["event"] for report in finished.of("event")}
    assert events["hidden_mse"]["data"]["share"] > 0.99 > 0.01 > events["cross_entropy"]["data"]["share"]
    assert "is nearly all that counts: its share of the loss" in events["hidden_mse"]["message"]
    assert not finished.series("share/gradient/cross_entropy")


def test_layers_alone_can_be_learned_and_in_parts(bench: Bench, tmp_path: Path) -> None:
    stage = {"kind": "distill", **FAST, "epochs": 1, "deletion_probability": 0.0, "losses": [{"kind": "hidden_mse"}]}
    whole = bench.run(make_spec([stage]), 0, name="whole")
    parts = bench.run(make_spec([stage | {"micro_batch_size": 5}]), 0, name="parts")
    assert whole.last["type"] == "result", whole.log
    for (_, one), (_, other) in zip(whole.series("loss/total"), parts.series("loss/total"), strict=True):
        assert one == pytest.approx(other, rel=2e-2)
    assert whole.series("loss/total")[-1][1] < whole.series("loss/total")[0][1]


PROJECTED = sorted(kind for kind, loss in LOSSES.items() if loss.projects)


@pytest.mark.parametrize("kind", PROJECTED)
def test_states_of_another_width_are_projected(kind: str) -> None:
    _, teacher, batch = make(CONFIGS[0])
    student, _, _ = make(BertConfig(**SIZES, **BERT | {"hidden_size": 16}))
    loss = LOSSES[kind].model_validate({"kind": kind, "layers": "last"})
    features = Features(Context(), [(kind, loss)], Watched(student), Watched(teacher))  # type: ignore[arg-type]
    found = {name: states(model, batch) for name, model in (("s", student), ("t", teacher))}
    for model in (student, teacher):
        model(**batch.inputs)
    value, _ = features.compare(batch, batch)
    [matrix] = features.projections.parameters()
    assert matrix.shape == (32, 16)
    projected = SimpleNamespace(hidden_states=[found["s"].hidden_states[-1] @ matrix.detach().T])
    size = len(batch.rows) if loss.denominator == "examples" else batch.inputs["attention_mask"].sum().item()
    assert value.item() == pytest.approx(ORACLES[kind](projected, found["t"], batch).item() / size, rel=1e-4)


def test_projections_are_trained_kept_over_a_crash_and_no_part_of_the_student(bench: Bench, tmp_path: Path) -> None:
    bench = bench.copy(tmp_path / "bench")
    pico.write_model(bench.inputs / "base", num_layers=1, width=16)
    embedded = {"kind": "hidden_mse", "layers": "embeddings"}
    losses = [{"kind": "cross_entropy"}, *({"kind": kind} for kind in PROJECTED), embedded]
    stage = {"kind": "distill", **FAST, "losses": losses}
    spec = make_spec([stage], student={"kind": "pretrained", "model": "small"})
    whole = bench.succeed(spec, 0, "undisturbed")
    for name in (*PROJECTED, "hidden_mse_2"):
        values = [value for _, value in whole.series(f"loss/{name}")]
        assert values[-1] < 0.9 * values[0], name
    saved = load_file(whole.outputs / "student" / "model.safetensors")
    assert all(name.startswith(("bert.", "classifier.")) for name in saved)
    found, _ = bench.interrupt(bench.write_order(spec, 0, "killed", checkpoint_s=0), 2, "kill")
    again = bench.succeed(spec, 0, "again", checkpoint=str(found[-1]))
    assert "going on from step" in again.log
    assert (again.outputs / "student" / "model.safetensors").read_bytes() == (
        whole.outputs / "student" / "model.safetensors"
    ).read_bytes()
