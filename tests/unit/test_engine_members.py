"""Language models that teach together: kept answers against stock transformers and scipy, and whole jobs."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import softmax
from scipy.stats import entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, GraniteConfig, GraniteForCausalLM

from core.errors import SpecInvalid
from core.jobs.spec import load_spec
from tests import pico
from tests.engine_bench import Bench, contents, finished_before, make_spec, read_answers
from worker.child import ForkServer
from worker.kernels.precision import has_fast_bf16

ROLES = ("teacher_1", "teacher_2", "teacher_3")
WEIGHTS = (1.0, 2.0, 0.5)
BLOCK = 32
CLOSE = 1e-2 if has_fast_bf16("cpu") else 1e-3  # what is trained by is answered in half precision
MEMBERS = [{"model": role, "weight": weight} for role, weight in zip(ROLES, WEIGHTS, strict=True)]
TEACHER = {"kind": "ensemble", "members": MEMBERS}
STUDENT = {"kind": "pretrained", "model": "small"}
FAST = {"epochs": 8, "learning_rate": 5e-3, "batch_size": 8}
KL = [{"kind": "forward_kl", "temperature": 1.0}]
TEXTS = {"kind": "causal_lm", "text": "whole", "block_tokens": BLOCK}
ANSWERS = {"kind": "causal_lm", "prompt": "prompt", "block_tokens": BLOCK}
ANSWER = {"kind": "answer", "top_k": 5, "splits": ["train", "validation", "test"]}
STAGES = [ANSWER, {"kind": "distill", **FAST, "losses": KL}, {"kind": "evaluate", "latency_samples": 10}]


def spec_of(stages: list[dict[str, Any]] = STAGES, task: dict[str, Any] = TEXTS, **changes: Any) -> dict[str, Any]:
    return make_spec(stages, task=task, **{"teacher": TEACHER, "student": STUDENT, **changes})


def write_scaled_model(folder: Path, like: Path) -> None:
    """Writes a model that divides its logits after its last layer, which therefore are there all at once."""
    tokenizer = AutoTokenizer.from_pretrained(like)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    torch.manual_seed(1)
    config = GraniteConfig(vocab_size=len(tokenizer), **sizes, **ends, max_position_embeddings=64, logits_scaling=2.0)
    GraniteForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Three trained models, of which the second has logits for more tokens, beside one that knows nothing."""
    bench = Bench(tmp_path_factory.mktemp("bench")).lay_language()
    for path in (bench.inputs / "data").iterdir():
        rows = [json.loads(line)["text"].split() for line in path.read_text().splitlines()]
        pairs = [{"whole": " ".join(row), "prompt": " ".join(row[:2]), "text": " ".join(row[2:])} for row in rows]
        path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    teacher = bench.inputs / "teacher"
    for seed, role in enumerate(ROLES):
        shutil.rmtree(teacher)
        pico.write_language_model(teacher, num_layers=2, num_padding=5 * (seed == 1))
        if seed == 2:
            write_scaled_model(teacher, bench.inputs / ROLES[0])
        stages = [{"kind": "finetune", **FAST, "epochs": 2 + seed, "learning_rate": 1e-2}]
        made = bench.succeed(make_spec(stages, task=TEXTS, seed=seed), 0, f"train-{role}", labels=[])
        shutil.copytree(made.outputs / "teacher", bench.inputs / role)
    shutil.rmtree(teacher)
    pico.write_language_model(bench.inputs / "base", num_layers=1)
    return bench


class Read(NamedTuple):
    """A split by stock tokenizer and models: what comes next at each place, and what all models say of it, p_NV."""

    next_N: NDArray[Any]
    is_learned_N: NDArray[Any]
    p_NV: NDArray[Any]


def read(bench: Bench, split: str, *, whole: bool, by_entropy: bool) -> Read:
    tokenizer = AutoTokenizer.from_pretrained(bench.inputs / ROLES[0])
    ids: list[int] = []
    is_learned: list[bool] = []
    for line in (bench.inputs / "data" / f"{split}.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = [] if whole else tokenizer(row["prompt"])["input_ids"]
        text = [*tokenizer(row["whole"] if whole else row["text"])["input_ids"], tokenizer.eos_token_id]
        ids += prompt + text
        is_learned += [False] * len(prompt) + [True] * len(text)
    stream, probabilities, weights = torch.tensor(ids), [], []
    for role, weight in zip(ROLES, WEIGHTS, strict=True):
        model = AutoModelForCausalLM.from_pretrained(bench.inputs / role).eval()
        with torch.no_grad():
            blocks = [model(input_ids=some[None]).logits[0] for some in stream[:-1].split(BLOCK)]
        p_NV = softmax(torch.cat(blocks)[:, : len(tokenizer)].double().numpy(), axis=-1)
        probabilities.append(p_NV)
        weights.append(weight / entropy(p_NV, axis=-1) if by_entropy else np.full(len(p_NV), weight))
    weights_MN = np.array(weights) / np.sum(weights, axis=0)
    return Read(
        stream[1:].numpy(), np.array(is_learned[1:]), np.einsum("mn,mnv->nv", weights_MN, np.array(probabilities))
    )


def loss_of(found: Read) -> float:
    chosen_N = found.p_NV[np.arange(len(found.next_N)), found.next_N]
    return float(-np.log(chosen_N[found.is_learned_N]).mean())


@pytest.mark.parametrize(("task", "weighting"), [(TEXTS, "fixed"), (ANSWERS, "entropy")], ids=["fixed", "entropy"])
def test_a_job_goes_from_an_ensemble_to_a_language_model(
    bench: Bench, tmp_path: Path, task: dict[str, Any], weighting: str
) -> None:
    bench = bench.copy(tmp_path / "job")
    reads = {"whole": task is TEXTS, "by_entropy": weighting == "entropy"}
    spec = spec_of(task=task, teacher=TEACHER | {"weighting": weighting})
    kept, distil, evaluate = bench.succeed_all(spec, labels=[])
    train = read(bench, "train", **reads)
    rows = np.flatnonzero(train.is_learned_N)
    tensors = {name: tensor.numpy() for name, tensor in read_answers(bench.inputs / "answers").items()}
    assert tensors["num_classes"] == train.p_NV.shape[1]
    p_NK, classes_NK, rest_N = np.exp(tensors["log_p"][rows]), tensors["classes"][rows], np.exp(tensors["log_rest"])
    assert p_NK == pytest.approx(-np.sort(-train.p_NV[rows])[:, :5], rel=CLOSE)
    assert p_NK == pytest.approx(np.take_along_axis(train.p_NV[rows], classes_NK, axis=-1), rel=CLOSE)
    assert rest_N[rows] == pytest.approx(1 - p_NK.sum(axis=-1), abs=1e-5)
    assert kept.last["summary"]["kept_probability"] == pytest.approx(p_NK.sum(axis=-1).mean(), abs=1e-5)

    validation = loss_of(read(bench, "validation", **reads))
    assert distil.last["summary"]["teacher_validation"]["loss"] == pytest.approx(validation, rel=1e-4)
    teacher, student = evaluate.last["summary"]["models"]
    assert (teacher["name"], teacher["runtime"], teacher["latency_p50_ms"]) == ("teacher", "answers", None)
    assert teacher["loss"] == pytest.approx(loss_of(read(bench, "test", **reads)), rel=1e-4)
    low, high = teacher["perplexity_ci"]
    assert low < teacher["perplexity"] < high
    assert student["kl_to_teacher"] is None
    assert student["loss"] < 1.2 * teacher["loss"]
    assert "`ensemble`" in (bench.inputs / "report" / "MODEL_CARD.md").read_text()


def test_draws_are_from_what_the_mixture_leaves(bench: Bench, tmp_path: Path) -> None:
    bench = bench.copy(tmp_path / "job")
    answer = {"kind": "answer", "top_k": 2, "rest": "samples", "num_samples": 200, "splits": ["train"]}
    spec = spec_of([answer])
    kept = read_answers(bench.succeed(spec, labels=[]).outputs / "answers")
    train = read(bench, "train", whole=True, by_entropy=False)
    for place in range(0, 60, 20):
        likeliest, drawn = np.split(kept["classes"][place].numpy(), [2])
        rest_V = train.p_NV[place].copy()
        rest_V[likeliest] = 0
        assert kept["log_p"][place, 2:].exp().sum().item() == pytest.approx(rest_V.sum(), rel=CLOSE)
        shares_V = np.bincount(drawn, minlength=len(rest_V)) / 200
        assert np.abs(shares_V - rest_V / rest_V.sum()).max() < 0.15


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_answers_go_on_from_a_checkpoint(bench: Bench, small_shards: ForkServer, how: str, tmp_path: Path) -> None:
    bench, spec = bench.copy(tmp_path / "bench"), spec_of()
    bench.server = small_shards
    whole = bench.succeed(spec, 0, "whole", labels=[])
    found, _ = bench.interrupt(bench.write_order(spec, 0, "cut", labels=[], checkpoint_s=0), 30, how)
    assert list(contents(finished_before(found[29]))) == ["answers/answers-00000.safetensors"]
    again = bench.succeed(spec, 0, "on", labels=[], checkpoint=str(found[-1]))
    assert "going on from block" in again.log
    assert contents(again.outputs) == contents(whole.outputs)


def test_a_member_with_other_tokens_is_told(bench: Bench, tmp_path: Path) -> None:
    bench, spec = bench.copy(tmp_path / "job"), spec_of()
    shutil.rmtree(bench.inputs / "teacher_2")
    pico.write_language_model(bench.inputs / "teacher_2", is_reversed=True)
    error = bench.run(spec, labels=[]).last
    assert error["reason"] == "vocab_incompatible"
    assert "The teacher 2 has other tokens than the teacher 1: id 2 is" in error["message"]
    assert "to the teacher 2's." in error["message"]


def test_a_member_without_a_token_of_the_texts_is_told(bench: Bench, tmp_path: Path) -> None:
    bench, spec = bench.copy(tmp_path / "job"), spec_of()
    for role in ("teacher_1", "teacher_3"):
        tokenizer = AutoTokenizer.from_pretrained(bench.inputs / role)
        tokenizer.add_tokens(["unheard"])
        model = AutoModelForCausalLM.from_pretrained(bench.inputs / role)
        model.resize_token_embeddings(len(tokenizer))
        tokenizer.save_pretrained(bench.inputs / role)
        model.save_pretrained(bench.inputs / role)
    with (bench.inputs / "data" / "validation.jsonl").open("a") as file:
        file.write(json.dumps({"whole": "a unheard one"}) + "\n")
    error = bench.run(spec, labels=[]).last
    assert error["reason"] == "vocab_incompatible"
    assert error["message"] == "The validation split has the token 'unheard', which the teacher 2 lacks."


def test_a_student_with_other_tokens_is_told(bench: Bench, tmp_path: Path) -> None:
    bench, spec = bench.copy(tmp_path / "job"), spec_of()
    bench.adopt(bench.succeed(spec, 0, labels=[]), 0, "answer")
    shutil.rmtree(bench.inputs / "base")
    pico.write_language_model(bench.inputs / "base", is_reversed=True)
    error = bench.run(spec, 1, labels=[]).last
    assert error["reason"] == "vocab_incompatible"
    assert "to the teacher's tokenizer and" in error["message"]


BAD: list[tuple[list[dict[str, Any]], str, str]] = [
    (STAGES[1:], "stages.0", "add stage 'answer' before it"),
    ([ANSWER, STAGES[1] | {"on_policy": {}}], "stages.1.on_policy", "only answers ahead"),
    ([ANSWER, STAGES[1] | {"losses": [*KL, {"kind": "hidden_mse"}]}], "stages.1.losses", "only answers"),
    ([{"kind": "generate"}], "stages.0.kind", "'ensemble' teacher writes no texts"),
    ([{"kind": "finetune"}], "stages.0", "needs a teacher that is a model"),
]


@pytest.mark.parametrize(("stages", "field", "hint"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_stages_that_an_ensemble_cannot_take_part_in_are_refused(
    stages: list[dict[str, Any]], field: str, hint: str
) -> None:
    with pytest.raises(SpecInvalid) as caught:
        spec_of(stages)
    assert caught.value.details[0]["field"] == field
    assert hint in caught.value.details[0]["message"]


def test_default_stages_keep_the_answers() -> None:
    spec = load_spec({"task": TEXTS, "teacher": TEACHER, "student": STUDENT, "data": "toy"})
    assert [stage.kind for stage in spec.stages] == ["answer", "distill", "export", "evaluate"]
    assert spec.stages[0].splits == ["train", "validation", "test"]
