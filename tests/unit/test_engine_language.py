"""Language models through the real child process: fine-tuned, heard online and kept, exported, measured."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.jobs.resolving import check_models
from core.errors import SpecInvalid
from core.jobs.spec import load_spec
from core.models.facts import ModelFacts
from tests import pico
from tests.engine_bench import Bench, Finished, contents, finished_before, make_spec, read_answers
from worker.child import ForkServer
from worker.engine.next_tokens import has_plain_head

TASK = {"kind": "causal_lm", "block_tokens": 32}
FAST = {"epochs": 8, "learning_rate": 5e-3, "batch_size": 8}
KL = [{"kind": "forward_kl", "temperature": 1.0}]
STAGES = [
    {"kind": "finetune", **FAST},
    {"kind": "answer", "top_k": 100},
    {"kind": "distill", **FAST, "losses": KL},
    {"kind": "export", "formats": [{"kind": "safetensors"}]},
    {"kind": "evaluate", "latency_samples": 10},
]


def spec_of(stages: list[dict[str, Any]]) -> dict[str, Any]:
    return make_spec(stages, task=TASK)


def run_all(bench: Bench, stages: list[dict[str, Any]]) -> list[Finished]:
    spec, done, told = spec_of(stages), [], []
    for ordinal, stage in enumerate(spec["stages"]):
        finished = bench.run(spec, ordinal, labels=[], earlier=told)
        assert finished.last["type"] == "result", finished.log
        bench.adopt(finished, ordinal, stage["kind"])
        done.append(finished)
        account = {"kind": stage["kind"], "state": "succeeded", "seconds": 1.0, "reused": None}
        told.append(account | {"summary": finished.last["summary"]})
    return done


def without(bench: Bench, *roles: str) -> Bench:
    for role in roles:
        shutil.rmtree(bench.inputs / role)
    return bench


@pytest.fixture(scope="module")
def run_through(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bench, list[Finished]]:
    bench = Bench(tmp_path_factory.mktemp("bench")).lay_language()
    return bench, run_all(bench, STAGES)


def test_a_job_goes_from_teacher_to_report(run_through: tuple[Bench, list[Finished]]) -> None:
    _, (finetune, answer, distill, export, evaluate) = run_through
    made = [sorted(path.name for path in stage.outputs.iterdir()) for stage in run_through[1]]
    assert made == [["teacher"], ["answers"], ["student"], ["safetensors"], ["report"]]
    assert answer.last["summary"]["kept_probability"] == pytest.approx(1, abs=1e-6)  # all of the few words there are
    model = AutoModelForCausalLM.from_pretrained(finetune.outputs / "teacher")
    assert answer.last["summary"]["bytes_per_row"] == pytest.approx(8 * model.config.vocab_size + 4, rel=0.05)
    losses = [value for _, value in finetune.series("validation/loss")]
    assert losses[-1] < 2 < losses[0]
    assert distill.last["summary"]["validation"]["loss"] < 1.1 * distill.last["summary"]["teacher_validation"]["loss"]
    assert export.last["summary"]["formats"]["safetensors"]["max_logit_difference"] < 1e-5
    rows = {row["name"]: row for row in evaluate.last["summary"]["models"]}
    assert list(rows) == ["teacher", "student", "safetensors"]
    assert rows["teacher"]["kl_to_teacher"] == 0
    assert rows["teacher"]["agreement"] == 1
    assert 0 < rows["student"]["kl_to_teacher"] < 0.1
    assert rows["student"]["agreement"] > 0.9
    assert rows["safetensors"]["loss"] == pytest.approx(rows["student"]["loss"])
    for row in rows.values():
        low, high = row["perplexity_ci"]
        assert low <= row["perplexity"] <= high
        assert row["throughput_per_s"] > 0


def test_the_report_is_one_file_and_names_no_classes(run_through: tuple[Bench, list[Finished]]) -> None:
    folder = run_through[1][-1].outputs / "report"
    report = json.loads((folder / "report.json").read_text())
    assert report["labels"] == []
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 3
    assert "perplexity" in page
    assert "class by class" not in page
    answers = run_through[1][1].outputs / "answers"
    size = sum(path.stat().st_size for path in answers.iterdir())
    num_tokens = len(read_answers(answers)["log_rest"])
    assert f"<td>{size / 1e6:.2f} MB, {size / num_tokens:.0f} bytes each</td>" in page
    card = (folder / "MODEL_CARD.md").read_text()
    assert "pipeline_tag: text-generation" in card


def test_measured_loss_is_that_of_stock_transformers(run_through: tuple[Bench, list[Finished]]) -> None:
    bench, stages = run_through
    folder = stages[3].outputs / "safetensors"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    lines = (bench.inputs / "data" / "test.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] + " <end>" for line in lines]
    ids_S = torch.tensor(tokenizer(" ".join(texts))["input_ids"])
    total = 0.0
    for start in range(0, len(ids_S) - 1, TASK["block_tokens"]):
        block = ids_S[start : start + TASK["block_tokens"] + 1]
        with torch.no_grad():
            logits = model(input_ids=block[None, :-1]).logits[0]
        total += torch.nn.functional.cross_entropy(logits, block[1:], reduction="sum").item()
    rows = {row["name"]: row for row in stages[4].last["summary"]["models"]}
    assert rows["safetensors"]["loss"] == pytest.approx(total / (len(ids_S) - 1), rel=1e-5)


def test_the_loss_can_be_a_mean_over_texts(run_through: tuple[Bench, list[Finished]], tmp_path: Path) -> None:
    """All texts are in one step here; the oracle reads its blocks with stock transformers, and cuts them into texts."""
    bench = without(run_through[0].copy(tmp_path / "bench"), "answers")
    (bench.inputs / "student").rename(bench.inputs / "base")
    path = bench.inputs / "data" / "train.jsonl"
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    texts = [text if number % 2 else text.split()[0] for number, text in enumerate(texts)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    distill = {"kind": "distill", "epochs": 1, "batch_size": 4096, "losses": [{"kind": "cross_entropy"}, *KL]}
    found = {}
    for reduction in ("mean", "sequence_mean"):
        stages = [{"kind": "finetune"}, {**distill, "reduction": reduction}]
        spec = make_spec(stages, task=TASK, student={"kind": "pretrained", "model": "base"})
        finished = bench.run(spec, 1, name=reduction, labels=[])
        assert finished.last["type"] == "result", finished.log
        [(_, found[reduction])] = finished.series("loss/total")
    student, teacher = (AutoModelForCausalLM.from_pretrained(bench.inputs / role) for role in ("base", "teacher"))
    tokenizer = AutoTokenizer.from_pretrained(bench.inputs / "base")
    ids_S = torch.tensor(tokenizer(" ".join(f"{text} <end>" for text in texts))["input_ids"])
    loss_N = []
    for start in range(0, len(ids_S) - 1, TASK["block_tokens"]):
        block = ids_S[start : start + TASK["block_tokens"] + 1]
        with torch.no_grad():
            z_NC, u_NC = (model.eval()(input_ids=block[None, :-1]).logits[0] for model in (student, teacher))
        kl_N = torch.nn.functional.kl_div(z_NC.log_softmax(-1), u_NC.softmax(-1), reduction="none").sum(-1)
        loss_N += (torch.nn.functional.cross_entropy(z_NC, block[1:], reduction="none") + kl_N).tolist()
    ends = [0, *(ids_S[1:] == tokenizer.eos_token_id).nonzero().flatten().add(1).tolist()]
    alone = [fmean(loss_N[start:end]) for start, end in pairwise(ends)]
    assert len(alone) == len(texts)
    assert found["sequence_mean"] == pytest.approx(fmean(alone), rel=1e-3)
    assert found["mean"] == pytest.approx(fmean(loss_N), rel=1e-3)
    assert fmean(alone) != pytest.approx(fmean(loss_N), rel=0.1)


def test_kept_answers_teach_as_the_teacher_itself_does(
    run_through: tuple[Bench, list[Finished]], tmp_path: Path
) -> None:
    """The kept ones hold every word here, so that the two differ by rounding alone."""
    bench, stages = run_through
    online = without(bench.copy(tmp_path / "online"), "answers", "student")
    heard = online.run(spec_of(STAGES), 2, name="online", labels=[])
    assert heard.last["type"] == "result", heard.log
    kept = dict(stages[2].series("loss/forward_kl"))
    for step, value in heard.series("loss/forward_kl"):
        assert value == pytest.approx(kept[step], rel=0.02, abs=1e-3)


def test_kept_answers_teach_a_student_whose_tokenizer_lacks_some_of_their_tokens(
    run_through: tuple[Bench, list[Finished]], tmp_path: Path
) -> None:
    """The teacher has two tokens that no text has; the student's logits have rows for these and more."""
    bench = without(run_through[0].copy(tmp_path / "bench"), "answers", "student")
    pico.write_language_model(bench.inputs / "base", num_layers=1, num_padding=5)
    teacher = bench.inputs / "teacher"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(teacher), AutoTokenizer.from_pretrained(teacher)
    tokenizer.add_tokens(["parcels", "refunds"])
    model.resize_token_embeddings(len(tokenizer))
    shutil.rmtree(teacher)
    for part in (model, tokenizer):
        part.save_pretrained(teacher)
    stages = [{"kind": "answer", "top_k": 100}, {"kind": "distill", **FAST, "losses": KL}]
    spec = make_spec(stages, task=TASK, student={"kind": "pretrained", "model": "base"})
    _, distill = bench.succeed_all(spec, labels=[])
    losses = [value for _, value in distill.series("loss/forward_kl")]
    assert losses[-1] < 0.5 * losses[0]


def test_parts_of_a_step_add_up_to_the_whole(run_through: tuple[Bench, list[Finished]], tmp_path: Path) -> None:
    bench = without(run_through[0].copy(tmp_path / "parts"), "student")
    stages = [*STAGES[:2], STAGES[2] | {"micro_batch_size": 3}]
    in_parts = bench.run(spec_of(stages), 2, name="parts", labels=[])
    assert in_parts.last["type"] == "result", in_parts.log
    whole = dict(run_through[1][2].series("loss/forward_kl"))
    found = in_parts.series("loss/forward_kl")
    assert [step for step, _ in found] == list(whole)
    assert found[0][1] == pytest.approx(whole[found[0][0]], rel=1e-3)


def test_answers_to_another_text_are_refused(run_through: tuple[Bench, list[Finished]], tmp_path: Path) -> None:
    bench = run_through[0].copy(tmp_path / "other")
    pico.write_walks(bench.inputs / "data", seed=1)
    finished = bench.run(spec_of(STAGES), 2, name="other", labels=[])
    assert finished.last["reason"] == "dataset_invalid"
    assert "kept answers are to another text" in finished.last["message"]


def test_the_same_order_gives_the_same_bytes(run_through: tuple[Bench, list[Finished]]) -> None:
    bench, stages = run_through
    again = bench.run(spec_of(STAGES), 1, name="again", labels=[])
    assert contents(again.outputs) == contents(stages[1].outputs)


@pytest.mark.parametrize("rest", ["samples", "dropped"])
def test_the_rest_can_be_drawn_from_or_dropped(
    run_through: tuple[Bench, list[Finished]], rest: str, tmp_path: Path
) -> None:
    """Two tokens at each place: with draws from the rest the student is as sure as its teacher, without them surer."""
    shutil.copytree(run_through[0].inputs, tmp_path / "in")
    bench = without(Bench(tmp_path), "answers", "student", "safetensors", "report")
    answer = {"kind": "answer", "top_k": 2, "rest": rest, "num_samples": 6}
    stages = [answer, {**STAGES[2], "losses": KL}, STAGES[4]]
    kept, distil, evaluate = bench.succeed_all(spec_of(stages), labels=[])
    assert 0.3 < kept.last["summary"]["kept_probability"] < 0.9
    assert kept.last["summary"]["bytes_per_row"] == pytest.approx(8 * (8 if rest == "samples" else 2) + 4, rel=0.1)
    warned = [report["event"]["type"] for report in kept.of("event")]
    assert ("answers_renormalised" in warned) == (rest == "dropped")
    _, student = evaluate.last["summary"]["models"]
    assert (student["kl_to_teacher"] < 0.15) == (rest == "samples"), student["kl_to_teacher"]
    assert distil.last["summary"]["validation"]["accuracy"] > 0.6


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_answers_go_on_from_a_checkpoint(run_through: tuple[Bench, list[Finished]], how: str, tmp_path: Path) -> None:
    bench, stages = run_through[0].copy(tmp_path / "bench"), run_through[1]
    found, _ = bench.interrupt(bench.write_order(spec_of(STAGES), 1, "cut", labels=[], checkpoint_s=0), 3, how)
    again = bench.succeed(spec_of(STAGES), 1, "on", labels=[], checkpoint=str(found[-1]))
    assert "going on from block" in again.log
    assert contents(again.outputs) == contents(stages[1].outputs)


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_answers_in_several_files_go_on_from_a_checkpoint(
    run_through: tuple[Bench, list[Finished]], small_shards: ForkServer, how: str, tmp_path: Path
) -> None:
    """Three blocks are in a file; it is interrupted when the fifth is answered, or, where it is told to stop, later."""
    bench = run_through[0].copy(tmp_path / "bench")
    bench.server = small_shards
    whole = bench.succeed(spec_of(STAGES), 1, "whole", labels=[])
    found, _ = bench.interrupt(bench.write_order(spec_of(STAGES), 1, "cut", labels=[], checkpoint_s=0), 5, how)
    assert len(load_file(found[4])["log_rest"]) == 2 * TASK["block_tokens"]
    assert list(contents(finished_before(found[4]))) == ["answers/answers-00000.safetensors"]
    again = bench.succeed(spec_of(STAGES), 1, "on", labels=[], checkpoint=str(found[-1]))
    assert "going on from block" in again.log
    assert contents(again.outputs) == contents(whole.outputs)
    assert again.last["summary"] == whole.last["summary"]


def test_a_checkpoint_of_other_files_is_unfit(
    run_through: tuple[Bench, list[Finished]], small_shards: ForkServer, tmp_path: Path
) -> None:
    """One run has no file where one is to be finished, the other would write larger ones."""
    larger = run_through[0].copy(tmp_path / "bench")
    bench, alone = Bench(larger.root, small_shards), tmp_path / "alone.safetensors"
    found, _ = bench.interrupt(bench.write_order(spec_of(STAGES), 1, "cut", labels=[], checkpoint_s=0), 5, "kill")
    shutil.copy(found[-1], alone)
    for name, on, checkpoint in (("alone", bench, alone), ("larger", larger, found[-1])):
        last = on.run(spec_of(STAGES), 1, name, labels=[], checkpoint=str(checkpoint)).last
        assert (last["type"], "files are finished" in last["message"]) == ("unfit", True)


def test_a_student_learns_the_same_from_one_file_and_from_several(
    run_through: tuple[Bench, list[Finished]], small_shards: ForkServer, tmp_path: Path
) -> None:
    bench, stages = without(run_through[0].copy(tmp_path / "bench"), "answers", "student"), run_through[1]
    answered = Bench(bench.root, small_shards).succeed(spec_of(STAGES), 1, labels=[])
    bench.adopt(answered, 1, "answer")
    one, several = (read_answers(stage.outputs / "answers") for stage in (stages[1], answered))
    assert len(list((answered.outputs / "answers").iterdir())) > 10
    assert one.keys() == several.keys()
    assert all(torch.equal(several[name], tensor) for name, tensor in one.items())
    assert answered.last["summary"]["kept_probability"] == pytest.approx(1, abs=1e-6)
    distilled = bench.succeed(spec_of(STAGES), 2, labels=[])
    assert contents(distilled.outputs) == contents(stages[2].outputs)


@pytest.mark.parametrize(
    ("stages", "field"),
    [
        (
            [{"kind": "distill", "losses": KL}, {"kind": "export", "formats": [{"kind": "triton"}]}],
            "stages.1.formats.0",
        ),
        ([{"kind": "answer", "temperature": 2.0}, {"kind": "distill", "losses": KL}], "stages.0.temperature"),
        ([{"kind": "answer"}, {"kind": "distill", "losses": [*KL, {"kind": "logit_mse"}]}], "stages.0.kind"),
        (
            [{"kind": "answer", "rest": "samples"}, {"kind": "distill", "losses": [{"kind": "reverse_kl"}]}],
            "stages.0.rest",
        ),
        ([{"kind": "answer"}, {"kind": "finetune"}, {"kind": "distill", "losses": KL}], "stages.0.kind"),
    ],
)
def test_stages_that_do_not_fit_the_task_are_refused(stages: list[dict[str, Any]], field: str) -> None:
    with pytest.raises(SpecInvalid) as caught:
        spec_of(stages)
    assert caught.value.details[0]["field"] == field


def with_positions(folder: Path, count: int) -> None:
    """Cuts a GPT-2 folder to so many positions."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.transformer.wpe = torch.nn.Embedding.from_pretrained(model.transformer.wpe.weight[:count].clone())
    model.config.n_positions = count
    model.save_pretrained(folder)


def test_blocks_fit_the_model_with_fewer_positions(run_through: tuple[Bench, list[Finished]], tmp_path: Path) -> None:
    """A student of 64 positions and a teacher of 16, which hears its blocks; then the other way round."""
    stages = [{"kind": "distill", **FAST, "epochs": 1, "losses": KL}, {"kind": "evaluate", "latency_samples": 10}]
    spec = make_spec(stages, task=TASK, student={"kind": "pretrained", "model": "small"})
    bench = without(run_through[0].copy(tmp_path / "bench"), "answers")
    with_positions(bench.inputs / "teacher", 16)
    assert bench.run(spec, 0, labels=[]).last["type"] == "result"
    assert bench.run(spec, 1, labels=[]).last["type"] == "result"
    teacher, student = bench.inputs / "teacher", bench.inputs / "student"
    shutil.move(teacher, tmp_path / "short")
    shutil.move(student, teacher)
    shutil.move(tmp_path / "short", student)
    finished = bench.run(spec, 1, "round", labels=[])
    assert finished.last["type"] == "result", finished.log


def find_in_blocks(places: dict[str, int | None], stages: list[dict[str, Any]], **changes: Any) -> list[str]:
    """Returns what is wrong with the blocks of models with so many places, by role."""
    given = {"teacher": {"model": "m"}, "student": {"kind": "pretrained", "model": "s"}, "data": "d", "task": TASK}
    facts = {role: ModelFacts(model_type="gpt2", num_positions=count) for role, count in places.items()}
    problems = check_models(load_spec(given | changes | {"stages": stages}), facts)
    return [problem["message"] for problem in problems if problem["field"] == "task.block_tokens"]


@pytest.mark.parametrize(
    ("teacher", "student", "found"),
    [
        (64, 16, "blocks of 16 tokens, and answers would be kept to blocks of 32; set it to 16"),
        (16, 64, "blocks of 32 tokens, and answers would be kept to blocks of 16; set it to 16"),
        (None, 20, "blocks of 20 tokens, and answers would be kept to blocks of 32; set it to 20"),
    ],
)
def test_answers_to_other_blocks_than_the_student_reads_are_refused_at_submit(
    teacher: int | None, student: int, found: str
) -> None:
    places = {"teacher": teacher, "base": student}
    kept, distil = {"kind": "answer"}, {"kind": "distill", "losses": KL}
    [message] = find_in_blocks(places, [kept, distil])
    assert found in message
    assert find_in_blocks(places, [kept, distil], task=TASK | {"block_tokens": int(message.split()[-1])}) == []
    for unheard in ([distil], [distil, kept], [kept, {"kind": "finetune", "of": "student"}]):
        assert find_in_blocks(places, unheard) == []
    assert find_in_blocks(places, [kept, distil | {"on_policy": {}}]) == []


def test_blocks_of_several_teachers_are_those_of_the_shortest() -> None:
    stages = [{"kind": "answer"}, {"kind": "distill", "losses": KL}]
    ensemble = {"kind": "ensemble", "members": [{"model": "a"}, {"model": "b"}]}
    places = {"teacher_1": 64, "teacher_2": 24}
    assert find_in_blocks(places | {"base": 24}, stages, teacher=ensemble) == []
    [message] = find_in_blocks(places | {"base": 64}, stages, teacher=ensemble)
    assert "set it to 24" in message


def test_a_token_that_one_of_two_lacks_is_named(run_through: tuple[Bench, list[Finished]], tmp_path: Path) -> None:
    bench = without(run_through[0].copy(tmp_path / "bench"), "answers")
    student = bench.inputs / "student"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(student), AutoTokenizer.from_pretrained(student)
    tokenizer.add_tokens(["parcels"])
    model.resize_token_embeddings(len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(student)
    with (bench.inputs / "data" / "train.jsonl").open("a") as rows:
        rows.write(json.dumps({"text": "my parcels"}) + "\n")
    stages = [{"kind": "distill", **FAST, "losses": KL}]
    spec = make_spec(stages, task=TASK, student={"kind": "pretrained", "model": "small"})
    finished = bench.run(spec, 0, labels=[])
    assert finished.last["reason"] == "vocab_incompatible", finished.log
    assert "'parcels'" in finished.last["message"]


def test_default_stages_fit_the_task() -> None:
    spec = load_spec(
        {"task": TASK, "teacher": {"model": "a"}, "student": {"kind": "teacher_layers", "keep": [0]}, "data": "toy"}
    )
    assert [form.kind for form in spec.stages[2].formats] == ["safetensors"]
    assert spec.stages[1].losses[1].temperature == 1


def test_a_head_that_does_more_than_multiply_is_seen() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=2))
    assert has_plain_head(model)
    plain = model.forward

    def capped(*args: Any, **kwargs: Any) -> Any:
        found = plain(*args, **kwargs)
        found.logits = torch.tanh(found.logits) * 5
        return found

    model.forward = capped
    assert not has_plain_head(model)
