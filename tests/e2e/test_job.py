"""Whole jobs over HTTP, by one worker that nothing disturbs."""

import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from safetensors.torch import load
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.db import session_scope
from core.jobs.models import StageRun
from tests import pico
from tests.e2e.stack import LONG, Stack, is_gone, running_child, until
from tests.e2e.test_continuing import checkpoints_of, content
from tests.unit.test_engine_label_space import expected

pytestmark = pytest.mark.usefixtures("worker")
SST2 = Path(__file__).parents[3] / "shared" / "data" / "sst2"


def test_job_goes_from_post_to_a_downloaded_smaller_model(stack: Stack) -> None:
    job_id = stack.submit(
        stages=[
            {"kind": "finetune", "epochs": 8, "learning_rate": 3e-3},
            {"kind": "distill", "epochs": 8, "learning_rate": 3e-3},
            {"kind": "export"},
            {"kind": "evaluate", "latency_samples": 10},
        ]
    )
    job = stack.wait(job_id)
    assert job["state"] == "succeeded", json.dumps(job, indent=1)
    assert [stage["state"] for stage in job["stages"]] == ["succeeded"] * 4
    artifacts = {a["name"] for a in stack.http.get(f"/v1/jobs/{job_id}/artifacts").json()["data"]}
    assert artifacts == {"teacher", "student", "safetensors", "onnx", "onnx_int8", "report"}

    report = stack.http.get(f"/v1/jobs/{job_id}/artifacts/report/report.json").json()
    measured = {row["name"]: row for row in report["models"]}
    assert measured["student"]["num_parameters"] < measured["teacher"]["num_parameters"]
    assert measured["onnx_int8"]["size_bytes"] < measured["onnx"]["size_bytes"]
    assert measured["student"]["accuracy"] > 0.9

    packed = stack.http.get(f"/v1/jobs/{job_id}/artifacts/onnx_int8/download").content
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        assert any(name.endswith("model.onnx") for name in archive.getnames())

    names = {series["name"] for series in stack.http.get(f"/v1/jobs/{job_id}/metrics").json()["data"]}
    assert {"loss/total", "loss/cross_entropy", "loss/forward_kl", "share/forward_kl"} <= names


def test_a_goal_is_enough(stack: Stack) -> None:
    """Of the forms that are measured the smallest one that meets it is an artifact, and is measured again."""
    search = {"kind": "search", "min_retained": 0.5, "max_trials": 1, "distill": {"epochs": 8, "learning_rate": 3e-3}}
    finetune = {"kind": "finetune", "epochs": 8, "learning_rate": 3e-3}
    evaluate = {"kind": "evaluate", "latency_samples": 10}
    job_id = stack.submit(student={"kind": "searched"}, stages=[finetune, search, evaluate])
    job = stack.wait(job_id)
    assert job["state"] == "succeeded", json.dumps(job, indent=1)
    points = stack.http.get(f"/v1/jobs/{job_id}/pareto").json()["data"]
    assert [(point["number"], point["form"]) for point in points] == [(1, "onnx_int8"), (1, "onnx_int4")]
    best = min((point for point in points if point["meets"]), key=lambda point: point["size_bytes"])
    assert job["stages"][1]["summary"]["chosen"] == {"number": 1, "form": best["form"]}
    artifacts = {a["name"]: a for a in stack.http.get(f"/v1/jobs/{job_id}/artifacts").json()["data"]}
    assert artifacts.keys() == {"teacher", "student", "points", "report", best["form"]}
    assert artifacts[best["form"]]["size_bytes"] == best["size_bytes"]
    hashes = stack.hashes(job_id)
    assert hashes[f"points/{best['files']['path']}model.onnx"] == hashes[f"{best['form']}/model.onnx"]
    assert {row["name"] for row in job["stages"][2]["summary"]["models"]} == {"teacher", "student", best["form"]}


def test_a_language_model_goes_the_same_way_and_answers_once(stack: Stack, tmp_path: Path) -> None:
    stack.push_model(pico.write_language_model(tmp_path / "model"), "pico-lm")
    stack.push_data(pico.write_walks(tmp_path / "data"), "walks")
    distill = {
        "kind": "distill",
        "epochs": 4,
        "learning_rate": 5e-3,
        "batch_size": 8,
        "losses": [{"kind": "cross_entropy"}, {"kind": "reverse_kl", "temperature": 1}],
    }
    spec = {
        "task": {"kind": "causal_lm", "block_tokens": 32},
        "teacher": {"model": "pico-lm"},
        "data": "walks",
        "stages": [{"kind": "answer", "top_k": 8}, distill, {"kind": "evaluate", "latency_samples": 10}],
    }
    first = stack.submit(**spec)
    assert stack.wait(first)["state"] == "succeeded", stack.job(first)
    rows = stack.job(first)["stages"][2]["summary"]["models"]
    assert [row["name"] for row in rows] == ["teacher", "student"]
    assert rows[1]["perplexity"] < rows[0]["perplexity"]  # the teacher never saw such texts, the student has

    second = stack.submit(**spec | {"stages": [spec["stages"][0], distill | {"epochs": 1}]})
    assert [stage["state"] for stage in stack.wait(second)["stages"]] == ["cached", "succeeded"]

    distill = {key: distill[key] for key in ("epochs", "learning_rate", "batch_size")}
    search = {"kind": "search", "min_retained": 0.5, "max_trials": 1, "distill": distill}
    third = stack.submit(**spec | {"student": {"kind": "searched"}, "stages": [search]})
    job = stack.wait(third)
    assert job["state"] == "succeeded", json.dumps(job, indent=1)
    points = stack.http.get(f"/v1/jobs/{third}/pareto").json()["data"]
    chosen = job["stages"][0]["summary"]["chosen"]
    [best] = [point for point in points if {name: point[name] for name in chosen} == chosen]
    assert best["meets"]
    assert f"{chosen['form']}/generation_config.json" in stack.hashes(third)  # with which it writes


@pytest.mark.skipif(not SST2.is_dir(), reason=f"SST-2 is not at {SST2}")
def test_a_language_model_teaches_another_one_the_classes_of_texts(stack: Stack, tmp_path: Path) -> None:
    """It has learned nothing, and finds one word likelier than two: all texts are positive then."""
    folder, words = pico.write_language_model(tmp_path / "teacher"), {"positive": " please", "negative": " late parcel"}
    stack.push_model(folder, "teller")
    stack.push_model(pico.write_language_model(tmp_path / "small", num_layers=1), "gpt2")
    rows = {}
    for split, count in (("train", 64), ("validation", 16), ("test", 16)):
        lines = (SST2 / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        rows[split] = [json.loads(line) for line in lines]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    stack.push_data({split: tmp_path / f"{split}.jsonl" for split in rows}, "reviews")
    distill = {"kind": "distill", "epochs": 5, "head_learning_rate": 2e-2, "batch_size": 16}
    job_id = stack.submit(
        teacher={"kind": "label_space", "model": "teller", "prompt": "please {text} it was", "words": words},
        student={"kind": "pretrained", "model": "gpt2"},
        data="reviews",
        stages=[
            {"kind": "answer", "splits": [*rows], "max_length": 32},
            distill | {"losses": [{"kind": "forward_kl", "temperature": 1.0}]},
            {"kind": "evaluate", "latency_samples": 10},
        ],
    )
    job = stack.wait(job_id)
    assert job["state"] == "succeeded", json.dumps(job, indent=1)
    assert job["stages"][0]["summary"]["num_rows"] == {split: len(found) for split, found in rows.items()}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    kept = load(stack.http.get(f"/v1/jobs/{job_id}/artifacts/answers/answers.safetensors").content)
    prompt = f"please {rows['train'][0]['text']} it was"
    wanted = [expected(model, tokenizer, prompt, words[label]) for label in ("negative", "positive")]
    assert kept["logits"][0].tolist() == pytest.approx(wanted, abs=2e-2)  # answered in half precision, where it is fast
    measured = {row["name"]: row for row in job["stages"][2]["summary"]["models"]}
    share = sum(row["label"] == "positive" for row in rows["test"]) / len(rows["test"])
    assert measured["teacher"]["accuracy"] == measured["student"]["accuracy"] == share
    assert measured["student"]["agreement"] == 1
    config = stack.http.get(f"/v1/jobs/{job_id}/artifacts/student/config.json").json()
    assert (config["model_type"], config["id2label"]) == ("gpt2", {"0": "negative", "1": "positive"})


def test_an_intermediate_task_is_learned_once(stack: Stack, tmp_path: Path) -> None:
    paths = pico.write_data(tmp_path / "data", seed=1)
    for path in paths.values():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        paid = [{"text": row["text"], "paid": "yes" if row["label"] == "refund" else "no"} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in paid))
    stack.push_data(paths, "payments")
    stack.push_data(paths, "renamed")
    first = {"kind": "intermediate", "task": {"label": "paid"}, "epochs": 1}
    done = stack.wait(stack.submit(stages=[first | {"data": "payments"}, {"kind": "finetune", "epochs": 1}]))
    assert done["state"] == "succeeded", done
    again = stack.wait(stack.submit(stages=[first | {"data": "renamed"}, {"kind": "finetune", "epochs": 2}]))
    assert [stage["state"] for stage in again["stages"]] == ["cached", "succeeded"]
    other = {"train": "payments/test", "validation": "payments/validation"}
    last = stack.wait(stack.submit(stages=[first | {"data": other}, {"kind": "finetune", "epochs": 1}]))
    assert [stage["state"] for stage in last["stages"]] == ["succeeded", "succeeded"]


def test_output_of_a_job_is_the_teacher_of_the_next(stack: Stack) -> None:
    first = stack.submit()
    assert stack.wait(first)["state"] == "succeeded"
    second = stack.submit(teacher={"model": f"job:{first}/teacher"}, stages=[{"kind": "distill", "epochs": 1}])
    assert stack.wait(second)["state"] == "succeeded"


def test_cancel_stops_the_process(stack: Stack, worker: subprocess.Popen[bytes]) -> None:
    job_id = stack.submit(stages=LONG)
    child = running_child(stack, job_id, worker.pid)
    answer = stack.http.post(f"/v1/jobs/{job_id}/cancel")
    assert answer.json()["state"] == "cancelling"
    assert stack.wait(job_id)["state"] == "cancelled"
    until(lambda: is_gone(child), 10)
    assert stack.http.post(f"/v1/jobs/{job_id}/cancel").status_code == 409
    assert stack.http.get(f"/v1/jobs/{job_id}/artifacts").json()["data"] == []


def test_exploding_loss_fails_with_reason_stage_and_log(stack: Stack) -> None:
    beyond_float32 = {"kind": "cross_entropy", "weight": 1e39}
    job_id = stack.submit(stages=[{"kind": "distill", "losses": [beyond_float32]}])
    job = stack.wait(job_id)
    assert job["state"] == "failed"
    assert job["error"]["reason"] == "loss_not_finite"
    assert job["error"]["stage"] == "distill"
    assert "learning_rate" in job["error"]["suggestion"]
    stage_log = stack.http.get(f"/v1/jobs/{job_id}/stages/0/log")
    assert stage_log.status_code == 200
    assert "The gradient became" in stage_log.text


def test_the_same_stage_runs_once(stack: Stack) -> None:
    stages = [{"kind": "finetune", "epochs": 1}, {"kind": "export", "formats": [{"kind": "safetensors"}]}]
    stages.insert(1, {"kind": "distill", "epochs": 1})
    stages.append({"kind": "evaluate", "latency_samples": 10})
    first, second = (stack.submit(stages=stages, metadata={"run": run}) for run in ("a", "b"))
    assert stack.wait(first)["state"] == stack.wait(second)["state"] == "succeeded"
    job = stack.job(second)
    assert [(stage["state"], stage["attempt"]) for stage in job["stages"]] == [("cached", 0)] * 4
    assert stack.hashes(second) == stack.hashes(first)
    assert content(second) == content(first)
    series = [stack.http.get(f"/v1/jobs/{job_id}/metrics").json() for job_id in (first, second)]
    assert series[0] == series[1]

    onnx = {"kind": "export", "formats": [{"kind": "onnx"}]}
    other = stack.submit(name="other", stages=[*stages[:2], onnx, stages[3]])
    seed = stack.submit(stages=stages[:1], seed=1)
    refreshed = stack.submit(stages=stages[:1], cache="refresh")
    states = {job_id: [s["state"] for s in stack.wait(job_id)["stages"]] for job_id in (other, seed, refreshed)}
    assert states == {other: ["cached"] * 2 + ["succeeded"] * 2, seed: ["succeeded"], refreshed: ["succeeded"]}
    with session_scope() as session:
        keys = {job_id: session.get_one(StageRun, (job_id, 0)).cache_key for job_id in (first, seed, refreshed)}
    assert keys[first] == keys[refreshed] != keys[seed]

    report = stack.http.get(f"/v1/jobs/{other}/artifacts/report/report.json").json()
    assert report["measured_by"] == other
    assert [(stage["kind"], stage["state"]) for stage in report["stages"]] == [
        ("finetune", "cached"),
        ("distill", "cached"),
        ("export", "succeeded"),
    ]
    assert report["stages"][0]["reused"] == {"job_id": first, "ordinal": 0}
    assert report["stages"][2]["seconds"] > 0
    page = stack.http.get(f"/v1/jobs/{other}/artifacts/report/report.html").text
    assert f"stage 1 of {first}" in page


def test_a_job_over_its_time_ends_with_a_checkpoint(stack: Stack) -> None:
    job_id = stack.submit(stages=[{"kind": "finetune", "epochs": 1000, "batch_size": 4}], max_seconds=4)
    job = stack.wait(job_id)
    assert (job["state"], job["error"]["reason"]) == ("failed", "budget_exhausted")
    assert len(checkpoints_of(job_id, 0)) == 1


def test_walk_with_curl_alone(stack: Stack, pico_files: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    """From upload to download."""
    base = f"http://127.0.0.1:{stack.port}/v1"
    key = stack.http.headers["authorization"]

    def curl(path: str, *options: str) -> bytes:
        command = ["curl", "-sSf", "--noproxy", "*", "-H", f"Authorization: {key}", *options, base + path]
        return subprocess.run(command, capture_output=True, check=True).stdout

    model, splits = pico_files
    files = [part for path in sorted(model.iterdir()) for part in ("-F", f"files=@{path}")]
    curl("/models", "-F", "name=walker", *files)
    curl("/datasets", "-F", "name=walk", *[part for name, path in splits.items() for part in ("-F", f"{name}=@{path}")])
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        "teacher: {model: walker}\n"
        "student: {kind: teacher_layers, keep: [1]}\n"
        "data: walk\n"
        "stages: [{kind: distill, epochs: 1}, {kind: export, formats: [{kind: onnx}]}]\n"
    )
    job = json.loads(curl("/jobs", "--data-binary", f"@{spec}"))["id"]
    until(lambda: json.loads(curl(f"/jobs/{job}"))["state"] == "succeeded")
    (tmp_path / "onnx.tar").write_bytes(curl(f"/jobs/{job}/artifacts/onnx/download"))
    subprocess.run(["tar", "xf", "onnx.tar"], cwd=tmp_path, check=True)

    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    feeds = {node.name: np.ones((1, 4), dtype=np.int64) for node in session.get_inputs()}
    [logits_BC] = session.run(None, feeds)
    assert logits_BC.shape == (1, len(json.loads((tmp_path / "onnx" / "labels.json").read_text())))
