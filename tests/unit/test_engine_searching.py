"""The search for the smallest student: its choices on known truths, and whole stages through the real child."""

import json
import shutil
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from core.errors import SpecInvalid, StageFailed
from core.jobs.spec import load_spec
from core.pareto import find_front
from tests import pico
from tests.engine_bench import FAST, Bench, contents, make_spec
from worker.engine import checkpoints, distillation
from worker.engine.context import Order, StageContext
from worker.engine.mailbox import Mailbox
from worker.engine.reporting import Reporter
from worker.engine.shapes import HALVING_COSTS, WRITING_COSTS, Shape, choose, fit_costs

WHOLE = Shape(6, 1536, 384)
SHAPES = {
    Shape(layers, inner, states): states * 3000 + layers * (4 * states**2 + 2 * inner * states)
    for layers in range(1, 7)
    for inner in (1536, 768, 384)
    for states in (384, 192)
}
SMALL = FAST | {"epochs": 8}
TARGET = {"min_retained": 0.9, "max_trials": 4}
BOTH = [{"kind": "onnx_int8"}, {"kind": "onnx_int4"}]


def hunt(costs_3: np.ndarray, least: float, largest: int = 10**9) -> dict[Shape, dict[str, Any]]:
    """Plays a search whose students lose so much for each halving; returns what was trained."""
    tried: dict[Shape, dict[str, Any]] = {}
    refused: set[Shape] = set()
    while (shape := choose(WHOLE, SHAPES, tried, refused, least, HALVING_COSTS)) is not None:
        assert shape not in tried
        assert not any(shape.contains(other) for other in refused)
        if SHAPES[shape] > largest:
            refused.add(shape)
            continue
        retained = float(np.exp(-shape.halvings(WHOLE) @ costs_3))
        tried[shape] = {"retained": retained, "meets": retained >= least}
    return tried


@given(
    st.tuples(*[st.floats(0.001, 0.1)] * 3).map(np.array),
    st.floats(0.9, 0.995),
    st.sampled_from([10**9, 6_000_000, 2_000_000]),
)
def test_a_search_ends_with_the_smallest_that_its_model_allows(costs_3: np.ndarray, least: float, largest: int) -> None:
    tried = hunt(costs_3, least, largest)
    good = [shape for shape in SHAPES if np.exp(-shape.halvings(WHOLE) @ costs_3) >= least and SHAPES[shape] <= largest]
    found = [shape for shape, point in tried.items() if point["meets"]]
    assert bool(found) == bool(good)  # what there is, is found, whatever the first guess
    if found:
        best = min(found, key=lambda shape: SHAPES[shape])
        smaller = [shape for shape in good if SHAPES[shape] < SHAPES[best]]
        costs = fit_costs(WHOLE, tried, HALVING_COSTS)
        assert all(np.exp(-shape.halvings(WHOLE) @ costs) < least for shape in smaller)  # and left out as hopeless


def test_a_search_needs_few_students_where_the_guess_is_right() -> None:
    tried = hunt(HALVING_COSTS, 0.97)
    best = min((shape for shape, point in tried.items() if point["meets"]), key=lambda shape: SHAPES[shape])
    smallest = min(
        (shape for shape in SHAPES if np.exp(-shape.halvings(WHOLE) @ HALVING_COSTS) >= 0.97), key=lambda s: SHAPES[s]
    )
    assert (best, len(tried)) == (smallest, 1)


@pytest.mark.parametrize(("kept", "is_tried"), [(0.9743, True), (0.96, False)])
def test_a_miss_within_the_noise_rules_no_smaller_student_out(kept: float, is_tried: bool) -> None:
    """One that is as wide and less deep may keep enough where the deeper one lacked a few texts of the split."""
    shapes = {shape: size for shape, size in SHAPES.items() if shape.hidden_size == 384 and shape.num_layers <= 5}
    missed = {Shape(5, 1536, 384): {"retained": kept, "meets": False}}
    found = choose(WHOLE, shapes, missed, [], 0.975, HALVING_COSTS)
    assert (found is not None) == is_tried


def test_costs_are_those_of_bayesian_regression() -> None:
    """With one student in each direction the posterior is the mean of guess and measure, weighted by precision."""
    tried = {
        shape: {"retained": np.exp(-0.1)} for shape in (Shape(3, 1536, 384), Shape(6, 768, 384), Shape(6, 1536, 192))
    }
    weight_3 = HALVING_COSTS**2 / (HALVING_COSTS**2 + 0.006**2)
    found_3 = fit_costs(WHOLE, tried, HALVING_COSTS)
    np.testing.assert_allclose(found_3, weight_3 * 0.1 + (1 - weight_3) * HALVING_COSTS)
    np.testing.assert_allclose(fit_costs(WHOLE, {}, HALVING_COSTS), HALVING_COSTS)


def test_what_a_language_model_lost_by_layers_foretells_others() -> None:
    """A Llama of 260,000 parameters that writes stories: what three of its students were seen to keep."""
    whole = Shape(5, 172, 64)
    tried = {Shape(1, 172, 64): {"retained": 0.342}, Shape(3, 43, 64): {"retained": 0.414}}
    costs_3 = fit_costs(whole, tried, WRITING_COSTS)
    assert np.exp(-Shape(3, 172, 64).halvings(whole) @ costs_3) == pytest.approx(0.726, abs=0.02)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)), max_size=8))
def test_the_front_is_what_no_other_is_better_than(found: list[tuple[int, int, int]]) -> None:
    points = [{"retained": kept, "size_bytes": size, "latency_p95_ms": time} for kept, size, time in found]
    for own, on_front in zip(found, find_front(points), strict=True):
        better = [
            other
            for other in found
            if other != own and other[0] >= own[0] and other[1] <= own[1] and other[2] <= own[2]
        ]
        assert on_front == (not better)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A teacher that was fine-tuned."""
    bench = Bench(tmp_path_factory.mktemp("bench")).lay()
    bench.adopt(bench.succeed(make_spec([{"kind": "finetune", **FAST}])), 0, "finetune")
    return bench


def searching(**settings: Any) -> dict[str, Any]:
    stage = {"kind": "search", "distill": SMALL, "formats": BOTH[:1], **TARGET, **settings}
    stages = [stage, {"kind": "evaluate", "latency_samples": 10}]
    return make_spec(stages, student={"kind": "searched"})


def test_the_smallest_student_that_meets_a_goal_is_found(bench: Bench, tmp_path: Path) -> None:
    bench = bench.copy(tmp_path / "job")
    spec = searching(max_bytes=90_000, max_p95_ms=200.0, formats=BOTH)
    searched = bench.succeed(spec)
    bench.adopt(searched, 0, "search")
    summary = searched.last["summary"]
    points = {(point["number"], point["form"]): point for point in summary["points"]}
    told = [event["data"] for event in events(searched, "trial.measured")]
    assert [(data["number"], data["form"]) for data in told] == [*points]
    assert {form for _, form in points} == {"onnx_int8", "onnx_int4"}
    assert [form for _, form in points] == ["onnx_int8", "onnx_int4"] * (len(points) // 2)  # each student in both
    chosen = points[summary["chosen"]["number"], summary["chosen"]["form"]]
    assert chosen["meets"]
    assert chosen["size_bytes"] == min(point["size_bytes"] for point in points.values() if point["meets"])
    assert chosen["retained"] >= 0.905
    form = bench.inputs / chosen["form"]
    assert {path.name for path in bench.inputs.glob("onnx*")} == {form.name}
    assert sum(path.stat().st_size for path in form.iterdir()) == chosen["size_bytes"] <= 90_000
    assert contents(form) == contents(bench.inputs / "points" / str(chosen["number"]) / chosen["form"])
    assert json.loads((bench.inputs / "points" / "points.json").read_text()) == summary["points"]
    model = AutoModelForSequenceClassification.from_pretrained(bench.inputs / "student").eval()
    assert model.num_parameters() == chosen["num_parameters"]
    assert model.config.num_hidden_layers == chosen["sizes"]["num_layers"]
    assert model.config.intermediate_size == chosen["sizes"]["intermediate_size"]
    assert right_answers(form, bench.inputs / "data" / "validation.jsonl") == pytest.approx(chosen["score"])
    earlier = [{"kind": "search", "state": "succeeded", "seconds": 1.0, "summary": summary, "reused": None}]
    evaluated = bench.succeed(spec, 1, earlier=earlier)
    bench.adopt(evaluated, 1, "evaluate")
    assert {row["name"] for row in evaluated.last["summary"]["models"]} == {"teacher", "student", form.name}
    assert "Pareto front" in (bench.inputs / "report" / "report.html").read_text()


def events(finished: Any, type: str) -> list[dict[str, Any]]:
    return [report["event"] for report in finished.of("event") if report["event"]["type"] == type]


def right_answers(folder: Path, split: Path) -> float:
    """Returns the accuracy of a form by onnxruntime and the stock tokenizer."""
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    tokenizer, labels = AutoTokenizer.from_pretrained(folder), json.loads((folder / "labels.json").read_text())
    names = [node.name for node in session.get_inputs()]
    rows = [json.loads(line) for line in split.read_text().splitlines()]
    right = 0
    for row in rows:
        inputs = tokenizer(row["text"], return_tensors="np")
        [logits_BC] = session.run(["logits"], {name: inputs[name].astype(np.int64) for name in names})
        right += labels[int(logits_BC.argmax())] == row["label"]
    return right / len(rows)


def test_sizes_that_cannot_meet_it_are_not_trained(bench: Bench, tmp_path: Path) -> None:
    bench = bench.copy(tmp_path / "job")
    spec = searching(max_bytes=1000)
    finished = bench.run(spec)
    assert finished.last == {
        "type": "error",
        "reason": "goal_missed",
        "message": "None of 0 students meets the goal, as all are too large or too slow.",
        "suggestion": "Ask for less, or let it try more (max_trials); the artifact 'points' has what was found.",
        "retryable": False,
        "publishes": ["points"],
    }
    refused = events(finished, "trial.refused")
    assert refused
    assert all("and max_bytes is 1,000" in event["message"] for event in refused)
    assert not finished.series("trial/1/loss/total")


def test_where_all_tokens_of_the_data_are_too_many_those_that_are_rare_are_left_out(
    bench: Bench, tmp_path: Path
) -> None:
    bench = bench.copy(tmp_path / "job")
    splits = [bench.inputs / "data" / f"{name}.jsonl" for name in ("train", "validation")]
    once = {"money": "back", "courier": "ship", "code": "locked", "paid": "charge", "box": "parcel"}
    for word, other in once.items():
        for path in splits:
            path.write_text(path.read_text().replace(word, other))
        splits[0].write_text(splits[0].read_text().replace(other, word, 1))
    settings = {"min_retained": 0.1, "margin": 0.0, "max_trials": 1}
    [large] = bench.succeed(searching(**settings), 0, "large").last["summary"]["points"]
    found = bench.succeed(searching(**settings, max_bytes=large["size_bytes"] - 80), 0, "small")
    [small] = found.last["summary"]["points"]
    assert small["sizes"] == large["sizes"]
    assert small["meets"]
    assert small["num_tokens"] < large["num_tokens"]
    folder = found.outputs / "onnx_int8"
    assert sum(path.stat().st_size for path in folder.iterdir()) == small["size_bytes"]
    texts = [json.loads(line)["text"] for path in splits for line in path.read_text().splitlines()]
    whole, left = (AutoTokenizer.from_pretrained(path) for path in (bench.inputs / "teacher", folder))
    counts = Counter(token for text in texts for token in whole.tokenize(text))
    rare = {token for token, count in counts.items() if count == 1}
    assert rare == {*once}
    assert not rare & set(left.get_vocab())
    assert {token for token in counts if token not in rare} <= set(left.get_vocab())
    validation = bench.inputs / "data" / "validation.jsonl"
    assert right_answers(folder, validation) == pytest.approx(small["score"])
    model = AutoModelForSequenceClassification.from_pretrained(found.outputs / "student")
    assert (model.config.vocab_size, model.num_parameters()) == (small["num_tokens"], small["num_parameters"])


def test_a_teacher_that_cannot_be_made_narrower_gets_students_of_fewer_layers(bench: Bench, tmp_path: Path) -> None:
    bench = bench.copy(tmp_path / "job")
    shutil.rmtree(bench.inputs / "teacher")
    pico.write_model(bench.inputs / "teacher", width=48)  # its neurons cannot be told from its states
    bench.adopt(bench.succeed(make_spec([{"kind": "finetune", **FAST}])), 0, "finetune")
    searched = bench.succeed(searching(), 0, "search")
    assert "not built as narrowing knows them" in events(searched, "trial.refused")[0]["message"]
    sizes = [point["sizes"] for point in searched.last["summary"]["points"]]
    assert {(one["hidden_size"], one["intermediate_size"]) for one in sizes} == {(48, 48)}
    assert any(one["num_layers"] < 3 for one in sizes)


def test_a_goal_that_is_missed_tells_the_nearest(bench: Bench, tmp_path: Path) -> None:
    bench = bench.copy(tmp_path / "job")
    spoiling = SMALL | {"learning_rate": 1.0, "head_learning_rate": 1.0}
    finished = bench.run(searching(min_retained=1.0, distill=spoiling))
    assert finished.last["reason"] == "goal_missed"
    assert finished.last["message"].startswith("None of 1 students meets the goal; nearest: 3 layers of 32 states")
    assert {path.name for path in (finished.outputs / "points").iterdir()} == {"1", "points.json"}
    assert finished.series("trial/1/loss/total")


def test_no_more_is_asked_than_the_largest_score(bench: Bench, tmp_path: Path) -> None:
    bench = bench.copy(tmp_path / "job")
    summary = bench.succeed(searching(min_retained=0.9, margin=0.5)).last["summary"]
    met = [point["score"] for point in summary["points"] if point["meets"]]
    assert met
    assert set(met) == {1.0}
    assert summary["teacher_validation"]["accuracy"] > 1 / 1.4  # so that 1.4 of it is more than all


def test_a_search_that_was_interrupted_finds_the_same(bench: Bench, tmp_path: Path) -> None:
    bench = bench.copy(tmp_path / "job")
    spec = searching(min_retained=1.0, margin=0.5, max_trials=3, formats=BOTH)
    spec["stages"][0]["min_retained"], spec["stages"][0]["margin"] = 0.98, 0.0
    whole = bench.succeed(spec, 0, "whole")
    count = len(numbers_of(whole))
    assert count > 1
    found, _ = bench.interrupt(bench.write_order(spec, 0, "cut"), 1, "kill")  # after the first student
    again = bench.succeed(spec, 0, "again", checkpoint=str(found[-1]))
    assert numbers_of(again) == [*range(2, count + 1)]
    check_same(again, whole, count)
    found, _ = bench.interrupt(bench.write_order(spec, 0, "torn", checkpoint_s=0), 1, "stop")  # within it
    step = checkpoints.read(found[-1])[1]["half"]["step"]
    on = bench.succeed(spec, 0, "on", checkpoint=str(found[-1]))
    assert f"going on from step {step} of" in on.log
    assert numbers_of(on) == [*range(1, count + 1)]
    check_same(on, whole, count)


def test_a_student_that_fails_is_left_out(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench.copy(tmp_path / "job")
    spec = searching(min_retained=0.5, max_trials=2)
    failure = StageFailed("loss_not_finite", "The loss became nan.", suggestion="Lower learning_rate.")
    whole, told = run_here(bench.write_order(spec, 0, "whole"), monkeypatch, [failure])
    assert (whole["chosen"]["number"], {point["number"] for point in whole["points"]}) == (2, {2})
    [failed] = [event for event in told if event["type"] == "trial.failed"]
    assert (failed["level"], failed["data"]["number"], failed["data"]["reason"]) == ("warning", 1, "loss_not_finite")
    assert "The loss became nan." in failed["message"]
    assert failed["data"]["sizes"] != whole["points"][0]["sizes"]
    [checkpoint] = (tmp_path / "job" / "whole" / "checkpoints").glob("1*.safetensors")  # after the one that failed
    order = bench.write_order(spec, 0, "on", checkpoint=str(checkpoint))
    again, told = run_here(order, monkeypatch, [])
    assert [point["sizes"] for point in again["points"]] == [point["sizes"] for point in whole["points"]]
    assert again["chosen"] == whole["chosen"]
    assert not [event for event in told if event["type"] == "trial.failed"]


def test_forms_need_not_agree_with_the_student(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench.copy(tmp_path / "job")
    monkeypatch.setattr("worker.engine.exporting.measure", lambda *_, **__: {"agreement": -0.5})
    whole, _ = run_here(bench.write_order(searching(), 0, "whole"), monkeypatch, [])
    assert any(point["meets"] for point in whole["points"])
    assert all(point["meets"] == (point["retained"] >= 0.905) for point in whole["points"])


def test_a_form_that_was_disturbed_is_timed_again(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second look at a form finds it slow; no more than three are taken of one that always is."""
    bench = bench.copy(tmp_path / "job")
    times_ms = iter([900.0, 5.0] * 1000)
    seen: list[float] = []

    def look(*_: Any) -> list[dict[str, float]]:
        seen.append(next(times_ms))
        return [{"latency_p50_ms": 1.0, "latency_p95_ms": seen[-1]}]

    monkeypatch.setattr("worker.engine.searching.time_singles", look)
    whole, told = run_here(bench.write_order(searching(max_p95_ms=10.0), 0, "whole"), monkeypatch, [])
    assert {point["latency_p95_ms"] for point in whole["points"]} == {5.0}
    assert not [event for event in told if event["type"] == "trial.refused"]
    times_ms, looks = iter([900.0] * 1000), len(seen)
    with pytest.raises(StageFailed, match="too large or too slow"):
        run_here(bench.write_order(searching(max_p95_ms=10.0), 0, "slow"), monkeypatch, [])
    refused = (tmp_path / "job" / "slow" / "told").read_text().count("trial.refused")
    assert len(seen) - looks == 3 * refused > 0


def test_where_every_student_fails_the_last_ones_reason_is_told(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = bench.copy(tmp_path / "job")
    order = bench.write_order(searching(max_trials=2), 0, "search")
    first = StageFailed("loss_not_finite", "The loss became nan.")
    last = StageFailed("export_unsupported", "Nothing writes it.", suggestion="Choose another form.")
    with pytest.raises(StageFailed) as caught:
        run_here(order, monkeypatch, [first, last])
    assert caught.value.report() == last.report()


def run_here(
    order: Path, monkeypatch: pytest.MonkeyPatch, failures: list[StageFailed]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Runs a search in this process, whose first trainings fail so; returns its summary, and what events it told."""
    make, left = distillation.make_trainer, [*failures]

    def make_or_fail(*arguments: Any) -> Any:
        if left:
            raise left.pop(0)
        return make(*arguments)

    monkeypatch.setattr("worker.engine.searching.make_trainer", make_or_fail)
    told = order.parent / "told"
    with told.open("wb") as reports:
        parsed = Order.parse(json.loads(order.read_text()))
        ctx = StageContext(parsed, Reporter(reports.fileno()), threading.Event(), Mailbox())
        try:
            summary = parsed.stage.build(ctx)()
        finally:
            ctx.close()
    lines = [json.loads(line) for line in told.read_text().splitlines()]
    return summary, [line["event"] for line in lines if line["type"] == "event"]


@pytest.mark.parametrize(
    "distill",
    [{"freeze": {}}, *({"losses": [{"kind": "hidden_mse", "layers": rule}]} for rule in ("uniform", "skip", "last"))],
)
def test_what_students_of_any_depth_can_have_is_accepted(distill: dict[str, Any]) -> None:
    stages = [{"kind": "search", "distill": distill}]
    load_spec({"teacher": {"model": "pico"}, "data": "toy", "student": {"kind": "searched"}, "stages": stages})


def numbers_of(finished: Any) -> list[int]:
    return [*dict.fromkeys(event["data"]["number"] for event in events(finished, "trial.measured"))]


def check_same(found: Any, whole: Any, count: int) -> None:
    chosen = whole.last["summary"]["chosen"]
    assert found.last["summary"]["chosen"] == chosen
    for role in ("student", chosen["form"]):
        assert contents(found.outputs / role) == contents(whole.outputs / role)
    for number, form in ((n, form) for n in range(1, count + 1) for form in ("onnx_int8", "onnx_int4")):
        place = Path("points") / str(number) / form
        assert contents(found.outputs / place) == contents(whole.outputs / place)


def test_a_teacher_that_knows_nothing_is_told(tmp_path: Path) -> None:
    finished = Bench(tmp_path).lay().run(searching())
    assert finished.last["reason"] == "spec_invalid"
    assert finished.last["suggestion"] == "Put a finetune stage before this one."


def test_a_form_that_a_student_cannot_have_is_left_out(bench: Bench, tmp_path: Path) -> None:
    """No block of the runtime divides rows of 24 weights or of 8."""
    bench = bench.copy(tmp_path / "job")
    shutil.rmtree(bench.inputs / "teacher")
    pico.write_model(bench.inputs / "teacher", width=24)
    bench.adopt(bench.succeed(make_spec([{"kind": "finetune", **FAST}])), 0, "finetune")
    settings = {"min_retained": 0.1, "max_trials": 1}
    found = bench.succeed(searching(**settings, formats=BOTH), 0, "search")
    assert {point["form"] for point in found.last["summary"]["points"]} == {"onnx_int8"}
    assert "as onnx_int4: None of the" in found.log
    lacking = bench.run(searching(**settings, formats=BOTH[1:]), 0, "lacking")
    assert (lacking.last["reason"], lacking.last["suggestion"]) == (
        "export_unsupported",
        "Choose onnx_int8, or leave this form out.",
    )


def searched(**settings: Any) -> dict[str, Any]:
    return {"student": {"kind": "searched"}, "stages": [{"kind": "search", **settings}]}


def test_a_target_is_a_search() -> None:
    spec = load_spec({"teacher": {"model": "pico"}, "data": "toy", "target": {"min_retained": 0.97, "max_bytes": 9}})
    assert [stage.kind for stage in spec.stages] == ["finetune", "search", "evaluate"]
    assert spec.student.kind == "searched"
    dumped = spec.model_dump(mode="json")
    assert "target" not in dumped
    assert (dumped["stages"][1]["min_retained"], dumped["stages"][1]["max_bytes"]) == (0.97, 9)
    assert load_spec(dumped).digest() == spec.digest()


def test_its_students_hear_the_losses_of_the_task() -> None:
    task = {"kind": "text_regression", "value": "stars"}
    spec = load_spec({"teacher": {"model": "pico"}, "data": "toy", "task": task, "target": {}})
    assert [loss["kind"] for loss in spec.model_dump()["stages"][1]["distill"]["losses"]] == [
        "squared_error",
        "logit_mse",
    ]


@pytest.mark.parametrize(
    ("changes", "field", "hint"),
    [
        ({"target": {"min_retained": 2.0}}, "target.min_retained", "less than or equal to 1"),
        ({"target": {"max_size": 3}}, "target.max_size", "unknown field"),
        ({"target": {"runtime": "tensorrt"}}, "target.runtime", "should match pattern"),
        ({"target": {}, "student": {"kind": "teacher_layers", "keep": [0]}}, "", "'student' says what to make"),
        ({"target": {}, "stages": [{"kind": "finetune"}]}, "", "'stages' says what to make"),
        (searched(formats=[{"kind": "onnx_int8"}] * 2), "stages.0.formats.1", "is named twice"),
        (
            searched(formats=[{"kind": "onnx_int8"}, {"kind": "onnx_int4", "min_agreement": 0.5}]),
            "stages.0.formats.1.min_agreement",
            "what a form keeps is measured itself",
        ),
        (searched(formats=[{"kind": "safetensors"}]), "stages.0.formats.0.kind", "unknown kind 'safetensors'"),
        ({"target": {}, "data": {"train": "toy/train", "test": "toy/test"}}, "stages.1.kind", "set data.validation"),
        (
            {"student": {"kind": "searched"}, "stages": [{"kind": "distill"}]},
            "student.kind",
            "a 'searched' student comes from a stage 'search'",
        ),
        (
            {"student": {"kind": "teacher_layers", "keep": [0]}, "stages": [{"kind": "search"}]},
            "stages.0",
            "write student: {kind: searched}",
        ),
        (
            {"student": {"kind": "searched"}, "stages": [{"kind": "search"}, {"kind": "search"}]},
            "stages.1",
            "finds the student, once",
        ),
        (
            {
                "student": {"kind": "searched"},
                "stages": [{"kind": "search", "distill": {"losses": [{"kind": "squared_error"}]}}],
            },
            "stages.0.distill.losses.0",
            "fits no text_classification",
        ),
        (
            {
                "student": {"kind": "searched"},
                "stages": [{"kind": "search", "distill": {"freeze": {"layers": 3}}}],
            },
            "stages.0.distill.freeze.layers",
            "use 0",
        ),
        (
            {
                "student": {"kind": "searched"},
                "stages": [
                    {
                        "kind": "search",
                        "distill": {"losses": [{"kind": "cross_entropy"}, {"kind": "hidden_mse", "layers": [[5, 11]]}]},
                    }
                ],
            },
            "stages.0.distill.losses.1.layers",
            "use 'uniform', 'skip' or 'last'",
        ),
        (
            searched(distill={"losses": [{"kind": "cross_entropy"}, {"kind": "attention_mse"}]}),
            "stages.0.distill.losses.1",
            "use 'relations' without 'heads'",
        ),
        (
            searched(distill={"losses": [{"kind": "cross_entropy"}, {"kind": "relations", "heads": 6}]}),
            "stages.0.distill.losses.1",
            "use 'relations' without 'heads'",
        ),
    ],
)
def test_specs_that_cannot_be(changes: dict[str, Any], field: str, hint: str) -> None:
    with pytest.raises(SpecInvalid) as caught:
        load_spec({"teacher": {"model": "pico"}, "data": "toy"} | changes)
    details = {detail["field"]: detail["message"] for detail in caught.value.details}
    assert hint in details.get(field, ""), details
