"""The child process of a stage, started for real."""

import hashlib
import json
import os
import signal
from pathlib import Path

import pytest

from stillhouse.classifier import Classifier
from tests.engine_bench import FAST, LABELS, Bench, Finished, contents, make_spec

STAGES = [
    {"kind": "finetune", **FAST, "epochs": 15},
    {"kind": "distill", **FAST},
    {"kind": "export"},
    {"kind": "evaluate", "latency_samples": 10},
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench")).lay()


@pytest.fixture(scope="module")
def run_through(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bench, list[Finished]]:
    """A whole job: each stage's outputs are the next one's inputs."""
    job = bench.copy(tmp_path_factory.mktemp("job") / "job")
    spec, stages = make_spec(STAGES), []
    for ordinal, stage in enumerate(spec["stages"]):
        finished = job.run(spec, ordinal)
        assert finished.last["type"] == "result", finished.log
        assert finished.returncode == 0
        job.adopt(finished, ordinal, stage["kind"])
        stages.append(finished)
    return job, stages


def digests(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in contents(folder).items()}


def test_a_job_goes_from_teacher_to_report(run_through: tuple[Bench, list[Finished]]) -> None:
    _, (finetune, distill, export, evaluate) = run_through
    assert [
        sorted(path.name for path in stage.outputs.iterdir()) for stage in (finetune, distill, export, evaluate)
    ] == [
        ["teacher"],
        ["student"],
        ["onnx", "onnx_int8", "safetensors"],
        ["report"],
    ]
    models = evaluate.last["summary"]["models"]
    assert [model["name"] for model in models] == ["teacher", "student", "safetensors", "onnx", "onnx_int8"]
    by_name = {model["name"]: model for model in models}
    assert by_name["teacher"]["accuracy"] > 0.9
    assert by_name["student"]["accuracy"] > 0.9
    assert by_name["student"]["num_parameters"] < by_name["teacher"]["num_parameters"]
    assert by_name["onnx"]["accuracy"] == by_name["safetensors"]["accuracy"] == by_name["student"]["accuracy"]
    for model in models:
        low, high = model["accuracy_ci"]
        assert 0 <= low <= model["accuracy"] <= high <= 1
        assert model["latency_p50_ms"] <= model["latency_p95_ms"]
        assert model["throughput_per_s"] > 0
    assert set(export.last["summary"]["formats"]) == {"safetensors", "onnx", "onnx_int8"}


def test_every_term_is_logged_alone_and_as_its_share(run_through: tuple[Bench, list[Finished]]) -> None:
    distill = run_through[1][1]
    terms = {name: dict(distill.series(f"loss/{name}")) for name in ("total", "cross_entropy", "forward_kl")}
    shares = {name: dict(distill.series(f"share/{name}")) for name in ("cross_entropy", "forward_kl")}
    num_steps = distill.last["summary"]["num_steps"]
    assert num_steps == FAST["epochs"] * 6  # 180 examples in batches of 32
    assert max(terms["total"]) == num_steps
    for step, total in terms["total"].items():
        assert total == pytest.approx(terms["cross_entropy"][step] + terms["forward_kl"][step], rel=1e-5)
        assert shares["cross_entropy"][step] + shares["forward_kl"][step] == pytest.approx(1, rel=1e-5)
    assert len(distill.series("validation/accuracy")) == FAST["epochs"]
    rates = [value for _, value in distill.series("learning_rate")]
    assert max(rates) <= FAST["head_learning_rate"]


def test_the_best_epoch_is_kept(run_through: tuple[Bench, list[Finished]]) -> None:
    distill = run_through[1][1]
    summary = distill.last["summary"]
    accuracies = [value for _, value in distill.series("validation/accuracy")]
    assert summary["validation"]["accuracy"] == max(accuracies) == accuracies[summary["kept_epoch"] - 1]


def test_progress_ends_at_its_total(run_through: tuple[Bench, list[Finished]]) -> None:
    for finished in run_through[1]:
        progress = finished.of("progress")
        steps = [report["step"] for report in progress]
        assert steps == sorted(steps)
        assert progress[-1]["step"] == progress[-1]["total"]
        assert [report["type"] for report in finished.reports].count("result") == 1


def test_inputs_stay_untouched_and_no_scratch_is_left(run_through: tuple[Bench, list[Finished]], bench: Bench) -> None:
    job, stages = run_through
    assert contents(job.inputs / "data") == contents(bench.inputs / "data")
    for finished in stages:
        assert sorted(path.name for path in finished.outputs.parent.iterdir()) == ["log", "order.json", "out"]


def test_same_order_twice_gives_the_same_bytes(run_through: tuple[Bench, list[Finished]]) -> None:
    job, stages = run_through
    spec = make_spec(STAGES)
    for ordinal in (1, 2):
        (job.inputs / "student").rename(job.root / "student") if ordinal == 1 else None
        again = job.run(spec, ordinal, name=f"again-{ordinal}")
        (job.root / "student").rename(job.inputs / "student") if ordinal == 1 else None
        assert digests(again.outputs) == digests(stages[ordinal].outputs)
        assert again.last == stages[ordinal].last
        assert again.points() == stages[ordinal].points()


def test_no_output_names_a_folder_of_this_machine(run_through: tuple[Bench, list[Finished]]) -> None:
    job, stages = run_through
    for finished in stages:
        for name, data in contents(finished.outputs).items():
            assert str(job.root).encode() not in data, name
            assert b"site-packages" not in data, name


def test_the_report_is_one_file_and_complete(run_through: tuple[Bench, list[Finished]]) -> None:
    folder = run_through[1][3].outputs / "report"
    report = json.loads((folder / "report.json").read_text())
    assert report["schema_version"] == 1
    assert {row["label"] for row in report["per_class"]} == set(LABELS)
    assert {series["name"] for series in report["training"]} >= {"loss/total", "validation/accuracy"}
    page = (folder / "report.html").read_text()
    assert "http" not in page
    assert "src=" not in page
    assert page.count("<svg") == 3
    for model in report["models"]:
        assert f"<td>{model['name']}</td>" in page
    card = (folder / "MODEL_CARD.md").read_text()
    import yaml

    front_matter = yaml.safe_load(card.split("---")[1])
    assert front_matter["pipeline_tag"] == "text-classification"
    assert front_matter["model-index"][0]["results"][0]["metrics"][0]["value"] == round(
        report["models"][1]["accuracy"], 4
    )
    for heading in ("## Metrics", "## Intended use", "## Limitations", "## Training"):
        assert heading in card


def test_a_teacher_that_is_no_better_is_told(bench: Bench) -> None:
    spec = make_spec(
        [
            {"kind": "finetune", **FAST, "epochs": 0.1},
            {"kind": "distill", **FAST, "learning_rate": 1e-3, "batch_size": 16, "losses": [{"kind": "cross_entropy"}]},
        ]
    )
    finished = bench.run(spec, 1, name="bad-teacher")
    events = {report["event"]["type"]: report["event"] for report in finished.of("event")}
    assert set(events) == {"teacher_untrained", "teacher_no_better"}
    assert events["teacher_no_better"]["level"] == "warning"
    assert events["teacher_no_better"]["data"]["student_accuracy"] > 0.8


def test_a_class_of_two_texts_needs_both(bench: Bench, tmp_path: Path) -> None:
    """The class is that of the second text; the first tells nothing."""
    bench = bench.copy(tmp_path / "pairs")
    for path in (bench.inputs / "data").iterdir():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        pairs = [
            {"a": other["text"], "b": row["text"], "label": row["label"]}
            for row, other in zip(rows, rows[::-1], strict=True)
        ]
        path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    task = {"kind": "text_classification", "text": "a", "pair": "b"}
    stages = [{"kind": "finetune", **FAST, "epochs": 30}, {"kind": "export", "formats": [{"kind": "onnx"}]}]
    spec = make_spec(
        [stages[0] | {"of": "student"}, stages[1]], task=task, student={"kind": "pretrained", "model": "m"}
    )
    (bench.inputs / "teacher").rename(bench.inputs / "base")
    for ordinal in range(2):
        finished = bench.run(spec, ordinal, name=f"pairs-{ordinal}")
        assert finished.last["type"] == "result", finished.log
        bench.adopt(finished, ordinal, stages[ordinal]["kind"])
    classifier = Classifier(bench.inputs / "onnx")
    assert classifier.classify("my parcel is late", "please help with the password reset code")[0][0] == "login"
    assert classifier.classify("please help with the password reset code", "my parcel is late")[0][0] == "delivery"


def test_layers_computed_again_give_the_same_step(bench: Bench) -> None:
    stage = {"kind": "finetune", **FAST, "epochs": 1, "dropout": 0.1}
    plain, again = (
        bench.run(make_spec([stage | {"gradient_checkpointing": is_again}]), name=f"again-{is_again}")
        for is_again in (False, True)
    )
    assert again.last["type"] == "result", again.log
    for (_, first), (_, second) in zip(plain.series("loss/total"), again.series("loss/total"), strict=True):
        assert second == pytest.approx(first, rel=1e-4)


def test_a_training_that_gets_no_better_stops(bench: Bench) -> None:
    stage = {"kind": "finetune", **FAST, "epochs": 50, "learning_rate": 1e-9, "head_learning_rate": 1e-9, "patience": 2}
    finished = bench.run(make_spec([stage]), name="stalled")
    epochs = len(finished.series("validation/loss"))
    assert 3 <= epochs < 50
    assert finished.last["summary"]["kept_epoch"] == epochs - 2
    assert "no better for 2 epochs" in finished.log


def test_a_step_in_parts_is_the_same_step(bench: Bench) -> None:
    losses = [{"kind": "cross_entropy"}, {"kind": "forward_kl", "weight": 1e-7}]
    stage = {"kind": "distill", **FAST, "epochs": 1, "losses": losses}
    whole, parts = (
        bench.run(make_spec([stage | size]), name=f"parts-{len(size)}") for size in ({}, {"micro_batch_size": 5})
    )
    for name in ("loss/total", "loss/forward_kl", "share/gradient/cross_entropy"):
        series = [finished.series(name) for finished in (whole, parts)]
        assert len(series[0]) == 6
        rounding = 1e-3 * max(value for _, value in series[0])  # in bfloat16 the shapes round otherwise
        assert dict(series[0]) == pytest.approx(dict(series[1]), rel=0.03, abs=rounding)
    events = [report["event"] for report in parts.of("event") if report["event"]["type"] == "loss_share"]
    assert sorted(event["data"]["term"] for event in events) == ["cross_entropy", "forward_kl"]
    assert all("weight" in event["message"] for event in events)


def test_a_temperature_moves_from_the_first_step_to_the_last(bench: Bench) -> None:
    losses = [{"kind": "forward_kl", "temperature": found} for found in ({"start": 8.0, "end": 2.0}, 8.0, 2.0)]
    finished = bench.succeed(make_spec([{"kind": "distill", **FAST, "epochs": 1, "losses": losses}]), name="moving")
    names = ("forward_kl", "forward_kl_2", "forward_kl_3")
    moving, start, end = ([value for _, value in finished.series(f"loss/{name}")] for name in names)
    assert moving[0] == start[0] != end[0]
    assert moving[-1] == end[-1] != start[-1]
    assert moving[2] not in (start[2], end[2])


def test_a_student_can_be_finetuned_without_validation(bench: Bench, tmp_path: Path) -> None:
    job = bench.copy(tmp_path / "job")
    (job.inputs / "data" / "validation.jsonl").unlink()
    finished = job.run(make_spec([{"kind": "finetune", "of": "student", **FAST, "epochs": 1.5}]))
    summary = finished.last["summary"]
    assert summary["num_steps"] == 9
    assert summary["validation"] is None
    config = json.loads((finished.outputs / "student" / "config.json").read_text())
    assert config["num_hidden_layers"] == 2


def test_a_loss_that_is_not_finite_names_its_step(bench: Bench) -> None:
    spec = make_spec([{"kind": "finetune", **FAST, "learning_rate": 1, "head_learning_rate": 1}])
    model = bench.copy(bench.root.parent / "huge")
    _scale_weights(model.inputs / "teacher", 1e30)
    finished = model.run(spec)
    assert finished.returncode == 1
    assert finished.last["reason"] == "loss_not_finite"
    assert "step 1 of 60" in finished.last["message"]
    assert "learning_rate" in finished.last["suggestion"]
    assert "Traceback" in finished.log
    assert "Traceback" not in json.dumps(finished.last)


def _scale_weights(folder: Path, factor: float) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor * factor for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def test_a_limit_below_what_the_libraries_take_is_told(bench: Bench) -> None:
    finished = bench.run(make_spec([{"kind": "finetune", **FAST}]), name="small", max_memory_bytes=200 * 2**20)
    assert finished.last["reason"] == "out_of_memory", finished.log
    assert "STILLHOUSE_MAX_CHILD_MEMORY_BYTES, 209,715,200" in finished.last["message"]
    assert "operator" in finished.last["suggestion"]


def test_too_little_memory_is_told(bench: Bench, tmp_path: Path) -> None:
    job = bench.copy(tmp_path / "job")
    train = job.inputs / "data" / "train.jsonl"
    rows = [json.loads(line) for line in train.read_text().splitlines()]
    long = [json.dumps(row | {"text": " ".join([row["text"]] * 30)}) for row in rows]
    train.write_text("\n".join(long * 16))
    spec = make_spec([{"kind": "finetune", **FAST, "batch_size": 4096}])
    finished = job.run(spec, name="small", max_memory_bytes=1800 * 2**20)
    assert finished.last["reason"] == "out_of_memory", finished.log
    assert "batch_size" in finished.last["suggestion"]


def test_a_label_that_the_order_lacks_names_the_line(bench: Bench, tmp_path: Path) -> None:
    job = bench.copy(tmp_path / "job")
    with (job.inputs / "data" / "train.jsonl").open("a") as rows:
        rows.write('{"text": "x", "label": "unheard of"}\n')
    finished = job.run(make_spec(STAGES))
    assert finished.last["reason"] == "dataset_invalid"
    assert "train.jsonl, line 181" in finished.last["message"]


def test_an_order_to_stop_stops_at_the_next_step(bench: Bench) -> None:
    order = bench.write_order(make_spec([{"kind": "finetune", **FAST, "epochs": 1000}]), 0, "stop")
    with bench.start(order) as stage:
        first = stage.reports.readline()
        stage.stdin.write(b'nonsense\n{"order": "dance"}\n{"order": "stop"}\n')
        reports = [json.loads(line) for line in (first, *stage.reports)]
        assert stage.exit_code.read() == b"0"
    assert reports[-1] == {"type": "stopped"}
    assert [report["type"] for report in reports].count("stopped") == 1
    assert sorted(path.name for path in order.parent.iterdir()) == ["checkpoints", "log", "order.json", "out"]


def test_a_child_whose_reader_is_gone_leaves(bench: Bench) -> None:
    order = bench.write_order(make_spec([{"kind": "finetune", **FAST, "epochs": 1000}]), 0, "orphan")
    with bench.start(order) as stage:
        stage.reports.close()
        assert stage.exit_code.read() == b"1"


def test_sigusr1_writes_the_stacks_to_the_log(bench: Bench) -> None:
    order = bench.write_order(make_spec([{"kind": "finetune", **FAST, "epochs": 1000}]), 0, "stacks")
    with bench.start(order) as stage:
        stage.reports.readline()
        os.kill(stage.pid, signal.SIGUSR1)
        stage.reports.readline()
        os.kill(stage.pid, signal.SIGKILL)
        assert stage.exit_code.read() == b"-9"
    assert "most recent call first" in (order.parent / "log").read_text()
