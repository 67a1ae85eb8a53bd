"""What counts when a model is pruned, and that a pruned model is the whole one with the rest masked."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Embedding
from torch.nn.utils import prune as torch_prune
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification as Classifier
from transformers import BertConfig, BertForSequenceClassification, Phi3Config, Phi3ForCausalLM, PreTrainedConfig

from app.jobs.resolving import check_models
from core.compressing import Narrowed
from core.errors import SpecInvalid, StageFailed
from core.jobs.spec import load_spec
from core.models.facts import ModelFacts, read_facts
from core.models.safetensors_header import read_tensors
from core.models.widths import Widths
from core.registry import list_methods
from tests import pico
from tests.engine_bench import FAST, Bench, contents, make_spec
from tests.unit.test_engine_models import CONFIGS, make
from tests.unit.test_engine_narrowing import KNOWN, Sample, context, cut, logits, parts_of, weight_of
from worker.engine import goals, measuring, pruning
from worker.engine.changes import Reader, compare
from worker.engine.data import Encoded
from worker.engine.goals import build, make_cost
from worker.engine.importance import Site, rank_blocks, watch
from worker.engine.pruning import _list_fitting
from worker.engine.shapes import Shape, shape_of
from worker.methods.stages.prune import Prune

TAYLOR = {"kind": "taylor"}
KINDS = sorted(list_methods("pruning"))
BERT = CONFIGS[0]
each_kind = pytest.mark.parametrize("kind", KINDS)


def look(model: torch.nn.Module, kind: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Returns how much each head of each layer counts, and each neuron."""
    by, parts = list_methods("pruning")[kind](), parts_of(model)
    heads, neurons = {part.out: Site(part.out, 16) for part in parts}, {part.down: Site(part.down, 1) for part in parts}
    watch(context(), model, heads | neurons, by, Sample())  # type: ignore[arg-type]
    return rank_blocks(context(), heads.values(), by), rank_blocks(context(), neurons.values(), by)  # type: ignore[arg-type]


def inputs_of(model: torch.nn.Module, module: torch.nn.Module) -> torch.Tensor:
    """Returns what a linear map gets of all tokens, inputs_NI."""
    seen = []
    hook = module.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].flatten(0, -2)))
    logits(model)
    hook.remove()
    return seen[0]


def loss(model: torch.nn.Module) -> float:
    return torch.nn.functional.cross_entropy(logits(model), torch.tensor([0, 1, 2])).item()


def test_magnitude_is_that_of_torch() -> None:
    model = make(BERT)
    found = look(model, "magnitude")[1]
    for part, importance in zip(parts_of(model), found, strict=True):
        torch_prune.ln_structured(part.down, "weight", amount=12, n=2, dim=1)
        gone = (part.down.weight_mask.sum(0) == 0).nonzero().flatten()
        assert set(gone.tolist()) == set(importance.argsort()[:12].tolist())


def test_wanda_adds_its_scores_of_single_weights_up() -> None:
    model = make(BERT)
    for part, importance in zip(parts_of(model), look(model, "wanda")[1], strict=True):
        scores = part.down.weight.detach().abs() * inputs_of(model, part.down).norm(p=2, dim=0)
        expected = scores.sum(dim=0)
        torch.testing.assert_close(importance / importance.sum(), expected / expected.sum())


@pytest.mark.parametrize("config", [BERT, CONFIGS[-1]], ids=lambda config: config.model_type)
def test_taylor_is_how_the_loss_changes(config: PreTrainedConfig) -> None:
    """By central differences of the loss, with what a head or a neuron adds to the states scaled up and down."""
    model = make(config).double()
    heads, neurons = look(model, "taylor")
    part = parts_of(model)[1]
    step = 1e-4
    for module, found, width in ((part.out, heads[1], 16), (part.down, neurons[1], 1)):
        for block in (0, 1):
            places, whole, seen = slice(block * width, (block + 1) * width), weight_of(module).detach().clone(), []
            for factor in (1 + step, 1 - step):
                with torch.no_grad():
                    weight_of(module)[places] = whole[places] * factor
                seen.append(loss(model))
            with torch.no_grad():
                weight_of(module)[:] = whole
            torch.testing.assert_close(found[block].item(), abs(seen[0] - seen[1]) / (2 * step), rtol=1e-3, atol=1e-7)


@each_kind
@pytest.mark.parametrize("config", KNOWN, ids=lambda config: config.model_type)
def test_sliced_is_masked(config: PreTrainedConfig, kind: str) -> None:
    """A model without its least important neurons answers as the whole one does where these say nothing."""
    model = make(config)
    importance = look(model, kind)[1]
    width = len(importance[0])
    pruned = cut(model, None, width // 2, kind)
    with torch.no_grad():
        for part, found in zip(parts_of(model), importance, strict=True):
            weight_of(part.down)[found.argsort()[: width - width // 2]] = 0
    torch.testing.assert_close(logits(pruned), logits(model), rtol=1e-5, atol=1e-6)


def test_a_model_that_has_learned_nothing_does_not_tell_what_it_misses() -> None:
    model = make(BERT)
    model.has_new_head = True
    with pytest.raises(StageFailed, match="has no head for the task"):
        look(model, "taylor")


def test_a_job_prunes_and_brings_back_what_was_lost(tmp_path: Path) -> None:
    stages = [
        {"kind": "finetune", **FAST},
        {"kind": "distill", **FAST},
        {
            "kind": "prune",
            "num_layers": 2,
            "intermediate_size": 24,
            "hidden_size": 16,
            "importance": {"kind": "taylor"},
        },
        {"kind": "distill", **FAST},
        {"kind": "export"},
        {"kind": "evaluate", "latency_samples": 10},
    ]
    spec = make_spec(stages, student={"kind": "teacher_layers", "keep": [0, 1, 2]})
    done = Bench(tmp_path).lay().succeed_all(spec)
    pruned = done[2].last["summary"]
    assert pruned["num_parameters"] < 0.6 * pruned["num_parameters_before"]
    assert pruned["flops"] < 0.6 * pruned["flops_before"]
    assert pruned["validation"]["loss"] > pruned["validation_before"]["loss"]
    assert done[3].last["summary"]["validation"]["accuracy"] > 0.9
    made = Classifier.from_pretrained(done[4].outputs / "safetensors")
    assert made.num_parameters() == pruned["num_parameters"]
    config = made.config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (2, 16, 24)
    rows = json.loads((done[5].outputs / "report" / "report.json").read_text())["models"]
    assert {row["name"]: row["num_parameters"] for row in rows}["student"] == pruned["num_parameters"]


def test_times_are_told_and_no_file_holds_them(tmp_path: Path) -> None:
    bench = Bench(tmp_path).lay()
    stages = [{"kind": "prune", "intermediate_size": 24}, {"kind": "evaluate", "latency_samples": 10}]
    spec = make_spec(stages)
    first, again = (bench.succeed(spec, 0, name) for name in ("first", "again"))
    assert contents(again.outputs) == contents(first.outputs)
    told, told_again = (dict(done.last["summary"]) for done in (first, again))
    times = {name: told[name] for name in ("latency_p50_ms_before", "latency_p50_ms")}
    assert min(times.values()) > 0
    assert told_again.keys() == told.keys()
    assert {name for name in told if told[name] != told_again[name]} <= times.keys()
    bench.adopt(first, 0, "prune")
    account = {"kind": "prune", "state": "succeeded", "seconds": 1.0, "summary": told, "reused": None}
    page = (bench.succeed(spec, 1, earlier=[account]).outputs / "report" / "report.html").read_text()
    assert "<td>{:.2f} → {:.2f}</td>".format(*times.values()) in page
    assert f"<td>{told['num_parameters_before']:,} → {told['num_parameters']:,}</td>" in page
    assert f"<td>{4 * told['num_parameters_before']:,} → {4 * told['num_parameters']:,}</td>" in page


def test_the_report_tells_where_bytes_went_and_what_zeros_gain(tmp_path: Path) -> None:
    bench = Bench(tmp_path).lay()
    spec = make_spec([{"kind": "sparsify", "share": 0.75}, {"kind": "evaluate", "latency_samples": 10}])
    done = bench.succeed(spec)
    bench.adopt(done, 0, "sparsify")
    told = done.last["summary"]
    account = {"kind": "sparsify", "state": "succeeded", "seconds": 1.0, "summary": told, "reused": None}
    page = (bench.succeed(spec, 1, earlier=[account]).outputs / "report" / "report.html").read_text()
    assert told["compressed_bytes"] < told["stored_bytes"]
    assert told["zeros"] == pytest.approx(0.75)
    for cell in (f"{told['stored_bytes']:,}", f"{told['compressed_bytes']:,}", "75.00"):
        assert f"<td>{cell}</td>" in page
    parts = told["packed_bytes_by_component"]
    assert sum(parts.values()) == told["packed_bytes"]
    assert all(f"<td>{size:,} → {size:,}</td>" in page for size in parts.values())


def test_each_time_is_that_of_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only the models move on, each by a time of its own."""
    now = [0.0]
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now[0])
    models = {0.003: make(BERT), 0.002: make(BERT)}
    for seconds, model in models.items():
        model.register_forward_hook(lambda *_, seconds=seconds: now.__setitem__(0, now[0] + seconds))
    texts = [np.arange(4, 4 + length, dtype=np.int32) for length in (8, 5, 12)]
    sample = Encoded({"input_ids": texts}, {"input_ids": 0}, torch.tensor([0, 1, 2]), 12, 0, "")
    ctx = context()
    ctx.find_split, ctx.get_split = lambda _: None, lambda split: Path(f"{split}.jsonl")
    ctx.task.sample, ctx.task.is_head = lambda *_: sample, lambda *_: False
    ctx.task.logits = lambda answer, data, _: [answer(data.single(row)) for row in range(len(data))]
    told = compare(ctx, *(Reader(model, None) for model in models.values()))  # type: ignore[arg-type]
    assert told["latency_p50_ms_before"] == pytest.approx(3)
    assert told["latency_p50_ms"] == pytest.approx(2)
    assert told["flops"] == told["flops_before"] > 0
    assert told["validation"] is told["validation_before"] is None


def test_a_language_model_is_pruned(tmp_path: Path) -> None:
    stage = {"kind": "prune", "intermediate_size": 64, "importance": TAYLOR}
    spec = make_spec([stage], task={"kind": "causal_lm", "block_tokens": 32})
    summary = Bench(tmp_path).lay_language().succeed(spec, labels=[]).last["summary"]
    assert summary["num_parameters_before"] - summary["num_parameters"] == 2 * 64 * (2 * 32 + 1)
    assert min(summary["latency_p50_ms"], summary["latency_p50_ms_before"]) > 0
    parts = summary["parameters"]
    assert parts["attention"] == 2 * (4 * 32 * 32 + 4 * 32)
    assert parts["feed_forward"] == 2 * (2 * 64 * 32 + 64 + 32 + 4 * 32)
    assert sum(parts.values()) == summary["num_parameters"]


def test_what_cannot_be_pruned_is_said_at_submit() -> None:
    spec: dict[str, Any] = {"teacher": {"model": "m"}, "student": {"kind": "teacher_layers", "keep": [0]}, "data": "d"}
    with pytest.raises(SpecInvalid, match="nothing is to go"):
        load_spec(spec | {"stages": [{"kind": "prune"}]})
    fresh = {"student": {"kind": "fresh"}, "stages": [{"kind": "finetune"}, {"kind": "prune", "num_layers": 1}]}
    with pytest.raises(SpecInvalid, match="the student has learned nothing yet"):
        load_spec(spec | fresh)
    with pytest.raises(SpecInvalid, match="unknown kind 'taylr'"):
        load_spec(spec | {"stages": [{"kind": "prune", "num_layers": 1, "importance": {"kind": "taylr"}}]})
    assert Prune(num_layers=1).reads(load_spec(spec | {"stages": [{"kind": "distill"}]})) == {"teacher"}


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A job whose teacher has learned its task; a student of all its layers is to be pruned."""
    bench = Bench(tmp_path_factory.mktemp("learned")).lay()
    bench.succeed_all(make_spec([{"kind": "finetune", **FAST}]))
    return bench


def pruned(bench: Bench, root: Path, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """Returns what the stage left of a student with all of the teacher's layers, and its summary."""
    student = {"kind": "teacher_layers", "keep": [0, 1, 2]}
    done = bench.copy(root).succeed(make_spec([{"kind": "prune", **settings}], student=student))
    return done, done.last["summary"]


def count_bert(teacher: BertConfig, num_layers: int, intermediate_size: int) -> int:
    config = BertConfig(**teacher.to_dict() | {"num_hidden_layers": num_layers, "intermediate_size": intermediate_size})
    return sum(parameter.numel() for parameter in BertForSequenceClassification(config).parameters())


def test_sizes_are_those_that_a_look_at_all_of_them_finds(learned: Bench, tmp_path: Path) -> None:
    """And a candidate scores as what is pruned to its sizes by hand, so that the best of them is chosen."""
    done, summary = pruned(learned, tmp_path / "to", to={"parameters": 0.7})
    config = Classifier.from_pretrained(learned.inputs / "teacher").config
    counts = {(n, width): count_bert(config, n, width) for n in (1, 2, 3) for width in (16, 32, 48)}
    limit = 0.7 * counts[3, 48]
    widest = {n: max((w for w in (16, 32, 48) if counts[n, w] <= limit), default=0) for n in (3, 2, 1)}
    deepest_whole = max(n for n, width in widest.items() if width == 48)
    wanted = [(n, width) for n, width in widest.items() if width and n >= deepest_whole]
    found = summary["candidates"]
    assert len(wanted) > 1
    assert [(one["num_layers"], one["intermediate_size"]) for one in found] == wanted
    assert [one["parameters"] for one in found] == [counts[sizes] for sizes in wanted]
    assert summary["limit"] == pytest.approx(limit)
    for index, (num_layers, width) in enumerate(wanted):
        sizes = {"num_layers": num_layers} | ({"intermediate_size": width} if width < 48 else {})
        by_hand = pruned(learned, tmp_path / str(index), **sizes)[1]
        assert found[index]["scores"]["loss"] == pytest.approx(by_hand["validation"]["loss"], rel=1e-4)
    assert summary["chosen"] == min(found, key=lambda one: one["scores"]["loss"])
    assert summary["chosen"]["parameters"] == summary["num_parameters"]
    made = Classifier.from_pretrained(done.outputs / "student")
    chosen = summary["chosen"]["num_layers"], summary["chosen"]["intermediate_size"]
    assert (made.config.num_hidden_layers, made.config.intermediate_size) == chosen
    assert made.num_parameters() == counts[chosen]


@pytest.mark.parametrize("measure", ["bytes", "flops"])
def test_what_is_told_of_a_language_model_is_what_it_has(measure: str, tmp_path: Path) -> None:
    task, student = {"kind": "causal_lm", "block_tokens": 32}, {"kind": "teacher_layers", "keep": [0, 1, 2]}
    spec = make_spec([{"kind": "prune", "to": {measure: 0.6}}], task=task, student=student)
    done = Bench(tmp_path).lay_language().succeed(spec, labels=[])
    summary = done.last["summary"]
    has = {"bytes": (done.outputs / "student" / "model.safetensors").stat().st_size, "flops": summary["flops"]}
    assert summary["chosen"][measure] == pytest.approx(has[measure], rel=1e-9)
    assert has[measure] <= summary["limit"]
    assert len(summary["candidates"]) > 1
    if measure == "flops":
        assert summary["limit"] == pytest.approx(0.6 * summary["flops_before"])


def test_of_a_model_that_cannot_be_narrowed_layers_alone_go_to_a_goal(tmp_path: Path) -> None:
    bench = Bench(tmp_path).lay_language()
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 128}
    vocab_size = json.loads((bench.inputs / "teacher/config.json").read_text())["vocab_size"]
    Phi3ForCausalLM(Phi3Config(**sizes, vocab_size=vocab_size, pad_token_id=0)).save_pretrained(
        bench.inputs / "teacher"
    )
    task, student = {"kind": "causal_lm", "block_tokens": 32}, {"kind": "teacher_layers", "keep": [0, 1, 2]}
    done = bench.succeed(make_spec([{"kind": "prune", "to": {"flops": 0.8}}], task=task, student=student), labels=[])
    found = done.last["summary"]["candidates"]
    assert [(one["num_layers"], one["intermediate_size"]) for one in found] == [(2, 128)]
    assert json.loads((done.outputs / "student/config.json").read_text())["num_hidden_layers"] == 2


@pytest.mark.parametrize("config", KNOWN, ids=lambda config: config.model_type)
def test_operations_of_every_shape_are_those_of_torch(config: PreTrainedConfig) -> None:
    model, ids_BT = make(config), torch.arange(4, 40).reshape(3, 12)
    inputs = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
    task = SimpleNamespace(logits=lambda answer, *_: answer(inputs))
    ctx: Any = SimpleNamespace(task=task, check_stop=lambda: None)
    cost, whole = make_cost(ctx, model, ids_BT, "flops"), shape_of(model)
    for num_layers in range(1, whole.num_layers + 1):
        for width in (whole.intermediate_size, 16):
            shape = Shape(num_layers, width, whole.hidden_size)
            other, counter = build(model, shape).eval(), FlopCounterMode(display=False)
            other.set_attn_implementation("eager")  # whose products torch knows all
            with counter, torch.no_grad():
                other(**inputs, **({"use_cache": False} if config.model_type == "gpt2" else {}))
            assert cost(shape) == pytest.approx(counter.get_total_flops() / 3, rel=1e-12)


@pytest.mark.parametrize("multiple_of", [32, 128])
def test_of_a_deep_model_a_few_numbers_of_layers_are_tried(multiple_of: int) -> None:
    whole, asked = Shape(48, 4096, 1024), []

    def cost(shape: Shape) -> float:
        asked.append(shape)
        return 1e4 + shape.num_layers * (2000 + shape.intermediate_size)

    limit = 0.4 * cost(whole)
    orders = ([*range(count)] for count in range(48, 0, -1))
    fitting = _list_fitting(whole, cost, limit, multiple_of, orders)
    found = [shape for shape, keep in fitting if len(keep) == shape.num_layers]
    assert len(found) <= 8
    assert len({shape.num_layers for shape in asked}) <= 8
    assert len(asked) < 80
    assert found[-1].intermediate_size == 4096
    for shape in found:
        assert cost(shape) <= limit
        if shape.intermediate_size < 4096:
            assert shape.intermediate_size % multiple_of == 0
            assert cost(shape._replace(intermediate_size=shape.intermediate_size + multiple_of)) > limit


def test_a_goal_that_nothing_meets_is_told_with_the_least(learned: Bench, tmp_path: Path) -> None:
    config = Classifier.from_pretrained(learned.inputs / "teacher").config
    for number, (goal, least) in enumerate(
        [({"parameters": 2}, f"{count_bert(config, 1, 16):,}"), ({"latency_ms": 1e-6}, "1 layer of 16 neurons")]
    ):
        last = learned.copy(tmp_path / str(number)).run(make_spec([{"kind": "prune", "to": goal}])).last
        assert (last["type"], last["reason"], least in last["message"]) == ("error", "goal_missed", True)
        assert "trim_vocabulary" in last["suggestion"]


def test_a_student_that_is_fast_enough_is_left_as_it_is(learned: Bench, tmp_path: Path) -> None:
    done, summary = pruned(learned, tmp_path / "fast", to={"latency_ms": 60_000})
    assert summary["num_parameters"] == summary["num_parameters_before"]
    assert [report["event"]["type"] for report in done.of("event")] == ["goal_met_before"]


def prune_to_time(learned: Bench, root: Path, monkeypatch: pytest.MonkeyPatch, slower: float) -> dict[str, Any]:
    """Returns the summary of a student for 12 ms, where what is made takes so many times as long as was foreseen."""

    def time(model: Any) -> float:
        return float(model.config.num_hidden_layers * (2 + model.config.intermediate_size / 16))

    monkeypatch.setattr(goals, "time_single", lambda _, model, __: time(model))
    monkeypatch.setattr(pruning, "time_single", lambda _, model, __: slower * time(model))
    stage = {"kind": "prune", "to": {"latency_ms": 12}}
    spec = make_spec([stage], student={"kind": "teacher_layers", "keep": [0, 1, 2]})
    with learned.copy(root).surround(spec) as ctx:
        return pruning.prune(ctx, Prune.model_validate(stage))


@pytest.mark.parametrize(
    ("slower", "wanted"),
    [
        (1.0, [(3, 32, 12.0), (2, 48, 10.0)]),
        (1.1, [(3, 16, 9.9), (2, 48, 11.0)]),
        (1.4, [(2, 32, 11.2)]),
    ],
)
def test_a_student_that_takes_longer_than_foreseen_gets_narrower(
    learned: Bench, slower: float, wanted: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = prune_to_time(learned, tmp_path, monkeypatch, slower)["candidates"]
    assert [(one["num_layers"], one["intermediate_size"], pytest.approx(one["latency_ms"])) for one in found] == wanted


def test_a_time_that_nothing_meets_when_measured_again_is_told(
    learned: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StageFailed, match="12; the last one is at 1,000") as caught:
        prune_to_time(learned, tmp_path, monkeypatch, 100)
    assert caught.value.reason == "goal_missed"


@pytest.mark.parametrize(
    ("settings", "field", "words"),
    [
        ({"to": {"parameters": 0.5}, "num_layers": 1}, "num_layers", "leave one of the two out"),
        ({"to": {"parameters": 0.5}, "hidden_size": 8}, "hidden_size", "leave one of the two out"),
        ({"to": {"parameters": 0.5, "flops": 0.5}}, "to", "set one of parameters"),
        ({"to": {}}, "to", "set one of parameters"),
        ({"to": {"bytes": 1.0}}, "to", "1 is all that there is"),
        ({"to": {"flops": 0}}, "to.flops", "greater than 0"),
        ({"to": {"paramters": 0.5}}, "to.paramters", "did you mean 'parameters'"),
        ({"num_layers": 1, "multiple_of": 64}, "multiple_of", "it is of a goal; set 'to'"),
    ],
    ids=str,
)
def test_goals_that_make_no_sense_are_refused_at_submit(settings: dict[str, Any], field: str, words: str) -> None:
    spec: dict[str, Any] = {"teacher": {"model": "m"}, "student": {"kind": "teacher_layers", "keep": [0]}, "data": "d"}
    with pytest.raises(SpecInvalid) as caught:
        load_spec(spec | {"stages": [{"kind": "prune", **settings}]})
    [detail] = caught.value.details
    assert (detail["field"], words in detail["message"]) == (f"stages.0.{field}", True)


@pytest.mark.parametrize(
    "grouped",
    [
        {"kind": "quantize", "group": 128},
        {"kind": "sparsify", "pattern": "64:128"},
        {"kind": "distill", "sparsity": {"pattern": "64:128"}},
    ],
    ids=lambda stage: stage["kind"],
)
def test_neurons_that_a_goal_finds_fit_the_groups_that_come_later(grouped: dict[str, Any]) -> None:
    spec: dict[str, Any] = {"teacher": {"model": "m"}, "student": {"kind": "teacher_layers", "keep": [0]}, "data": "d"}
    prune = {"kind": "prune", "to": {"parameters": 0.5}}
    with pytest.raises(SpecInvalid) as caught:
        load_spec(spec | {"stages": [prune, {"kind": "distill"}, grouped]})
    [detail] = caught.value.details
    assert (detail["field"], "in groups of" in detail["message"]) == ("stages.0.multiple_of", True)
    load_spec(spec | {"stages": [prune | {"multiple_of": 128}, {"kind": "distill"}, grouped]})


def test_a_goal_that_the_student_meets_is_refused_where_its_size_is_known(tmp_path: Path) -> None:
    folder = pico.write_model(tmp_path / "model")
    facts = read_facts(
        json.loads((folder / "config.json").read_text()), tensors=read_tensors(folder / "model.safetensors")
    )
    count = facts.num_parameters or 0

    def problems(*stages: dict[str, Any], last: int = 2) -> list[tuple[str, str]]:
        student = {"kind": "teacher_layers", "keep": [0, 1, last]}
        spec = load_spec({"teacher": {"model": "m"}, "student": student, "data": "d", "stages": list(stages)})
        return [(found.field, found.message) for stage in spec.stages for found in stage.check_model(spec, facts)]

    def prune(**goal: float) -> dict[str, Any]:
        return {"kind": "prune", "to": goal}

    assert problems(prune(parameters=count)) == [
        ("to.parameters", f"the student has {count:,} parameters; choose fewer, or a share below 1")
    ]
    assert problems(prune(bytes=4 * count))[0][0] == "to.bytes"
    for goal in ({"parameters": count - 1}, {"parameters": 0.9}, {"flops": 1e15}, {"latency_ms": 1e3}):
        assert problems(prune(**goal)) == []
    assert problems({"kind": "prune", "num_layers": 2}, prune(parameters=count)) == []
    assert problems(prune(parameters=count), last=9) == []  # which is what is wrong then
    assert Prune(to={"latency_ms": 1.0}).measures() == {"student"}  # type: ignore[arg-type]
    assert Prune(to={"flops": 0.5}).measures() == set()  # type: ignore[arg-type]


def test_a_goal_that_no_sizes_meet_is_refused_where_they_are_known(learned: Bench) -> None:
    folder = learned.inputs / "teacher"
    config = json.loads((folder / "config.json").read_text())
    facts = read_facts(config, tensors=read_tensors(folder / "model.safetensors"))
    smallest = build(Classifier.from_pretrained(folder), Shape(1, 16, 32))
    layer = sum(parameter.numel() for parameter in smallest.bert.encoder.parameters())
    least = layer + 32 * sum(part.num_embeddings for part in smallest.modules() if isinstance(part, Embedding))
    assert 0.8 * smallest.num_parameters() < least < smallest.num_parameters()
    for goal, bound in (("parameters", least), ("bytes", 4 * least)):
        [(field, message)] = problems_of(facts, {"to": {goal: bound - 1}})
        assert (field, f"1 layer of 16 neurons, the least that is left, has at least {bound:,}" in message) == (
            f"stages.0.to.{goal}",
            True,
        )
        assert problems_of(facts, {"to": {goal: bound}}) == []
        assert problems_of(facts, {"to": {goal: 0.01}})[0][0] == f"stages.0.to.{goal}"
    assert problems_of(facts, TRIM, {"to": {"parameters": layer - 1}})[0][0] == "stages.1.to.parameters"
    for stages in ([TRIM, {"to": {"parameters": layer}}], [TRIM, {"to": {"bytes": 0.01}}], [{"to": {"flops": 2}}]):
        assert problems_of(facts, *stages) == []


def in_steps(**settings: Any) -> dict[str, Any]:
    stage = {"kind": "prune", "importance": TAYLOR, **settings}
    student = {"kind": "teacher_layers", "keep": [0]}
    return {"teacher": {"model": "m"}, "student": student, "data": "d", "stages": [stage, {"kind": "evaluate"}]}


@pytest.mark.parametrize(
    ("schedule", "goal", "goals"),
    [
        ({"schedule": "linear"}, {"parameters": 0.4}, [0.8, 0.75, 0.666667]),  # 1, .8, .6, .4
        ({}, {"flops": 0.46}, [0.62, 0.774194, 0.958333]),  # gone are 19/27, 26/27 and all of .54
        ({"schedule": "cubic"}, {"bytes": 0.999999}, [0.999999, 0.999999, 0.999999]),
    ],
    ids=str,
)
def test_a_stage_in_steps_is_the_stages_that_one_would_write(
    schedule: dict[str, str], goal: dict[str, float], goals: list[float]
) -> None:
    recover = {"epochs": 2.0, "deletion_probability": 0.2}
    found = load_spec(in_steps(to=goal, steps=3, recover=recover, **schedule))
    [measure] = goal
    pairs = [
        stage
        for share in goals
        for stage in ({"kind": "prune", "importance": TAYLOR, "to": {measure: share}}, {"kind": "distill", **recover})
    ]
    written = load_spec(in_steps() | {"stages": [*pairs, {"kind": "evaluate"}]})
    assert found == written == load_spec(found.model_dump(mode="json"))
    assert found.digest() == written.digest()
    assert [found.seen_by(stage) for stage in found.stages] == [written.seen_by(stage) for stage in written.stages]
    assert [problem.field for stage in found.stages for problem in stage.advise(found)] == []


def test_the_training_after_a_step_has_the_losses_of_its_task() -> None:
    task = {"task": {"kind": "text_regression"}}
    found = load_spec(in_steps(to={"parameters": 0.5}, steps=2) | task)
    written = load_spec(in_steps(to={"parameters": 0.5}) | task | {"stages": [{"kind": "distill"}]})
    assert [stage for stage in found.stages if stage.kind == "distill"] == written.stages * 2


@pytest.mark.parametrize(
    ("settings", "field", "words"),
    [
        ({"num_layers": 2, "steps": 2}, "stages.0", "a number below 1"),
        ({"to": {"latency_ms": 0.5}, "steps": 2}, "stages.0", "a number below 1"),
        ({"to": {"parameters": 1e6}, "steps": 2}, "stages.0", "a number below 1"),
        ({"to": {"parameters": 0.5}, "schedule": "linear"}, "stages.0", "set 'steps' above 1"),
        ({"to": {"parameters": 0.5}, "steps": 0}, "stages.0.steps", "greater than or equal to 1"),
        ({"to": {"parameters": 0.5}, "steps": 2, "recover": {"epoch": 1}}, "stages.0.recover.epoch", "'epochs'"),
        ({"to": {"parameters": 0.5}, "steps": 2, "recover": 1}, "stages.0.recover", "valid dictionary"),
    ],
    ids=str,
)
def test_steps_that_make_no_sense_are_refused_at_submit(settings: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(SpecInvalid) as caught:
        load_spec(in_steps(**settings) | {"task": {"kind": "text_regression"}})
    [detail] = caught.value.details
    assert (detail["field"], words in detail["message"]) == (field, True)


def test_more_stages_than_a_spec_may_have_are_refused() -> None:
    spec = in_steps(to={"parameters": 0.5}, steps=15)
    with pytest.raises(SpecInvalid, match="choose fewer steps"):
        load_spec(spec | {"stages": spec["stages"] * 2})


def problems_of(start: ModelFacts, *stages: dict[str, Any], **changes: Any) -> list[tuple[str, str]]:
    """Returns what is found at submit of stages that prune a student of the model's three layers."""
    student = {"kind": "teacher_layers", "keep": [0, 1, 2]} | changes
    kinds = [{"kind": "prune"} | stage for stage in stages]
    spec = load_spec({"teacher": {"model": "m"}, "student": student, "data": "d", "stages": kinds})
    return [(problem["field"], problem["message"]) for problem in check_models(spec, {"teacher": start})]


@pytest.mark.parametrize(
    ("settings", "field", "words"),
    [
        ({"hidden_size": 64}, "hidden_size", "has 32 states"),
        ({"hidden_size": 20}, "hidden_size", "16 wide; choose a multiple"),
        ({"intermediate_size": 9999}, "intermediate_size", "has 48 neurons; choose at most as many"),
        ({"num_layers": 4}, "num_layers", "has 3 layers; choose fewer"),
        ({"num_layers": 3}, "num_layers", "has 3 layers; choose fewer"),
        ({"num_layers": 4, "intermediate_size": 24}, "num_layers", "has 3 layers; choose at most as many"),
    ],
)
def test_sizes_that_the_student_cannot_have_are_refused_at_submit(
    tmp_path: Path, settings: dict[str, Any], field: str, words: str
) -> None:
    folder = pico.write_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    facts = read_facts(config, tensors=read_tensors(folder / "model.safetensors"))
    [(found, message)] = problems_of(facts, settings)
    assert (found, words in message) == (f"stages.0.{field}", True), message
    assert problems_of(facts, {"hidden_size": 16, "intermediate_size": 24, "num_layers": 3}) == []
    assert problems_of(facts, {"num_layers": 2}, {"num_layers": 1}) == []
    assert problems_of(facts, {"num_layers": 2}, {"num_layers": 2})[0][0] == "stages.1.num_layers"
    assert problems_of(facts, {"intermediate_size": 30}, intermediate_size=24)[0][0] == "stages.0.intermediate_size"
    assert (
        problems_of(facts, {"intermediate_size": 24}, {"intermediate_size": 30})[0][0] == "stages.1.intermediate_size"
    )


TRIM, DISTILL, HALF = {"kind": "trim_vocabulary"}, {"kind": "distill"}, {"to": {"parameters": 0.5}}


FINE_HALF = {"to": {"parameters": 0.5}, "multiple_of": 1}


def learn(layer: int | str) -> dict[str, Any]:
    """Returns a stage that compares a layer of the student with the teacher's first, or all by a rule."""
    layers = layer if isinstance(layer, str) else [[layer, 0]]
    return DISTILL | {"losses": [{"kind": "cross_entropy"}, {"kind": "hidden_mse", "layers": layers}]}


def adapt(layer: int) -> dict[str, Any]:
    return DISTILL | {"adapter": {"kind": "lora", "layers": [layer]}}


@pytest.mark.parametrize(
    ("stages", "field", "words"),
    [
        ([adapt(3), TRIM], "0.adapter.layers", "the student has 3"),
        ([adapt(3), {"num_layers": 2}], "0.adapter.layers", "the student has 3"),
        ([{"num_layers": 2}, adapt(2)], "1.adapter.layers", "the student has 2"),
        ([HALF, adapt(3)], "1.adapter.layers", "the student has 3"),
        ([{"num_layers": 2}, DISTILL | {"freeze": {"layers": 3}}], "1.freeze.layers", "the student has 2"),
        ([{"num_layers": 2}, learn(2)], "1.losses.1.layers", "the student has 2"),
        ([HALF, learn(3)], "1.losses.1.layers", "the student has 3"),
        ([HALF, {"num_layers": 3}], "1.num_layers", "has 3 layers"),
        ([DISTILL, TRIM, {"kind": "quantize", "group": 32}], "2.group", "32 do not divide the 48 inputs"),
        ([{"intermediate_size": 24}, {"kind": "quantize", "group": 16}], "1.group", "16 do not divide the 24 inputs"),
        ([{"hidden_size": 16}, {"kind": "sparsify", "pattern": "3:32"}], "1.pattern", "the 16 inputs"),
        ([HALF, {"kind": "sparsify", "pattern": "1:2"}, {"kind": "quantize", "group": 32}], "0.multiple_of", "of 16"),
        ([TRIM, {"intermediate_size": 99_999}], "1.intermediate_size", "has 48 neurons"),
        ([HALF, {"hidden_size": 20}], "1.hidden_size", "16 wide; choose a multiple"),
        ([FINE_HALF, DISTILL, FINE_HALF], "2.to.parameters", "has at least"),
        ([HALF, {"to": {"parameters": 30_000}}], "1.to.parameters", "has at most"),
    ],
)
def test_what_earlier_stages_leave_is_known_at_submit(
    tmp_path: Path, stages: list[dict[str, Any]], field: str, words: str
) -> None:
    folder = pico.write_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    facts = read_facts(config, tensors=read_tensors(folder / "model.safetensors"))
    found = problems_of(facts, *stages)
    assert [place for place, _ in found] == [f"stages.{field}"], found
    assert words in found[0][1]


TINY = {  # of TinyBERT's 312 states and 1,200 neurons; no tensor of it is at hand
    "model_type": "bert",
    "hidden_size": 312,
    "intermediate_size": 1200,
    "num_attention_heads": 12,
    "num_hidden_layers": 4,
    "vocab_size": 30_522,
}


@pytest.mark.parametrize(
    ("stage", "field", "words"),
    [
        ({"kind": "quantize", "group": 64}, "group", "64 do not divide the 312 inputs"),
        ({"kind": "sparsify", "pattern": "5:7"}, "pattern", "groups of 7 do not divide the 312 inputs"),
        ({"hidden_size": 100}, "hidden_size", "26 wide; choose a multiple"),
        ({"intermediate_size": 99_999}, "intermediate_size", "has 1200 neurons"),
    ],
)
def test_a_hubs_config_tells_what_a_model_cannot_have(stage: dict[str, Any], field: str, words: str) -> None:
    [(found, message)] = problems_of(read_facts(TINY), stage)
    assert (found, words in message) == (f"stages.0.{field}", True), message
    fitting = ({"kind": "quantize", "group": None}, {"kind": "sparsify", "pattern": "2:4"}, {"hidden_size": 104})
    assert [problems_of(read_facts(TINY), one) for one in fitting] == [[]] * 3


def test_a_quantised_teacher_is_not_quantised_again_before_its_student_has_learned() -> None:
    facts = read_facts(TINY, grid_bits=[4])
    for stage in ({"kind": "quantize", "group": None}, {"kind": "sparsify"}, {"num_layers": 2}):
        [(field, message)] = problems_of(facts, stage)
        assert (field, "the teacher is quantised" in message) == ("stages.0.kind", True)
        assert problems_of(facts, DISTILL, stage) == []


def test_layers_that_no_searched_student_has_are_known_at_submit() -> None:
    stages = [{"kind": "finetune"}, {"kind": "search", "min_retained": 0.9}, adapt(4)]
    spec = load_spec({"teacher": {"model": "m"}, "student": {"kind": "searched"}, "data": "d", "stages": stages})
    [problem] = check_models(spec, {"teacher": read_facts(TINY)})
    assert (problem["field"], "the student has 4" in problem["message"]) == ("stages.2.adapter.layers", True)


def test_what_pruning_undoes_of_a_pattern_is_advised_against() -> None:
    stages = [{"kind": "sparsify", "pattern": "2:4"}, DISTILL, {"kind": "prune", "intermediate_size": 30}, DISTILL]
    spec = load_spec(make_spec(stages))
    [advice] = spec.stages[2].advise(spec)
    assert "no 2:4 zeros any more, which stage 0, 'sparsify', makes" in advice.message
    fewer = load_spec(make_spec([*stages[:2], {"kind": "prune", "num_layers": 1}, DISTILL]))
    assert fewer.stages[2].advise(fewer) == []


def test_what_earlier_stages_leave_is_not_guessed(tmp_path: Path) -> None:
    folder = pico.write_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    facts = read_facts(config, tensors=read_tensors(folder / "model.safetensors"))
    for stages in (
        [adapt(2), {"num_layers": 2}],
        [HALF, adapt(2)],
        [HALF, learn(2), learn("uniform"), {"num_layers": 2}],
        [HALF, TRIM, {"kind": "quantize", "group": 16}],
        [HALF, DISTILL, {"to": {"parameters": 0.9}}],
        [HALF, DISTILL, {"to": {"flops": 0.01}}],
        [HALF, {"intermediate_size": 32}, {"kind": "quantize", "group": 16}],
        [{"intermediate_size": 32}, {"kind": "quantize", "group": 32}],
    ):
        assert problems_of(facts, *stages) == []


def test_heads_that_share_keys_go_together() -> None:
    widths = Widths(states=64, inner=96, head=16, num_heads=4, num_groups=2)
    narrowed = Narrowed("student", ModelFacts(model_type="llama"), 64, 4, widths)
    [problem] = narrowed.check(16, None, None)
    assert (problem.field, "groups of 32 states" in problem.message) == ("hidden_size", True)
    assert narrowed.check(32, None, None) == []


def test_a_kind_of_model_that_cannot_be_narrowed_is_refused_at_submit() -> None:
    facts = ModelFacts(model_type="gpt_neox", num_layers=4, hidden_size=32, num_heads=2)
    [(field, message)] = problems_of(facts, {"intermediate_size": 24})
    assert field == "stages.0.intermediate_size"
    assert "a 'gpt_neox' is built in a way in which this cannot be narrowed" in message
    assert problems_of(facts, {"num_layers": 2}) == []


def test_widths_that_cannot_be_told_apart_are_refused_at_submit(tmp_path: Path) -> None:
    folder = pico.write_model(tmp_path / "model", width=48)  # of 48 neurons
    config = json.loads((folder / "config.json").read_text())
    facts = read_facts(config, tensors=read_tensors(folder / "model.safetensors"))
    [(field, message)] = problems_of(facts, {"intermediate_size": 24})
    assert field == "stages.0.intermediate_size"
    assert "cannot be told apart" in message


def test_as_many_layers_as_there_are_is_warned_of(learned: Bench, tmp_path: Path) -> None:
    done, _ = pruned(learned, tmp_path / "job", num_layers=7)
    [event] = [report["event"] for report in done.of("event")]
    assert (event["type"], event["level"]) == ("no_layer_pruned", "warning")
