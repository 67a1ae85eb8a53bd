"""Language models that teach classes by scoring words, against stock transformers and through the real child."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.errors import SpecInvalid, StageFailed
from tests import pico
from tests.engine_bench import FAST, Bench, make_spec, teach_classes
from tests.llama_cpp import STORIES, needs_stories
from worker.engine.data import Examples
from worker.engine.speaking import Scorer, cut

WORDS = {"refund": " refund", "delivery": " parcel late", "login": " password"}
PROMPT = "please {text} is"
TEACHER = {"kind": "label_space", "model": "big", "prompt": PROMPT, "words": WORDS}
TEXTS = ["my box and the courier", "", "it was charged please help with the money now"]


def expected(model: Any, tokenizer: Any, prompt: str, words: str) -> float:
    """log p of the words by the definition: that of the whole less that of the prompt, one token at a time."""
    ids = tokenizer(prompt + words, return_tensors="pt").input_ids
    start = len(tokenizer(prompt).input_ids)
    total = 0.0
    for place in range(start, ids.shape[1]):
        with torch.no_grad():
            logits = model(input_ids=ids[:, :place]).logits[0, -1].double()
        total += torch.log_softmax(logits, dim=-1)[ids[0, place]].item()
    return total


def scorer_of(folder: Path, words: list[str], **options: Any) -> tuple[Scorer, Any, Any]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Scorer(model, tokenizer, words, **options), model, tokenizer


@pytest.mark.parametrize("words", [list(WORDS.values()), [" refund", " parcel", " password"]])
def test_scores_are_log_probabilities_of_the_words(tmp_path: Path, words: list[str]) -> None:
    prompt = PROMPT
    scorer, model, tokenizer = scorer_of(pico.write_language_model(tmp_path), words)
    prompts = Examples(TEXTS, []).prompts(prompt)
    found = scorer.score(prompts, lambda: None)
    wanted = [[expected(model, tokenizer, prompt.format(text=text), w) for w in words] for text in TEXTS]
    torch.testing.assert_close(found.double(), torch.tensor(wanted).double(), rtol=1e-5, atol=1e-5)
    mean, *_ = scorer_of(tmp_path, words, average=True)
    counts = torch.tensor([len(tokenizer(w).input_ids) for w in words])
    torch.testing.assert_close(mean.score(prompts, lambda: None), found / counts)


@needs_stories
def test_a_real_tokenizer_reads_the_words_after_the_prompt() -> None:
    prompt, words = "Once upon a time {text} The end was", [" happy", " very sad indeed", "!"]
    scorer, model, tokenizer = scorer_of(STORIES, words)
    texts = ["a girl met a cat.", "the boat sank."]
    found = scorer.score(Examples(texts, []).prompts(prompt), lambda: None)
    wanted = [[expected(model, tokenizer, prompt.format(text=text), w) for w in words] for text in texts]
    torch.testing.assert_close(found.double(), torch.tensor(wanted).double(), rtol=1e-4, atol=1e-4)


def test_a_long_text_is_cut_and_a_long_prompt_is_told(tmp_path: Path) -> None:
    scorer, _, tokenizer = scorer_of(pico.write_language_model(tmp_path), [" refund", " parcel"])
    long = Examples([" ".join(["late"] * 500)], [], [" ".join(["box"] * 500)])
    shortened = cut(long, tokenizer, 20)
    assert (shortened.texts, shortened.pairs) == ([" ".join(["late"] * 20)], [" ".join(["box"] * 20)])
    with pytest.raises(StageFailed, match="places for 64") as caught:
        scorer.score(long.prompts("please {text} is"), lambda: None)
    assert "max_length" in caught.value.suggestion


def test_a_prompt_takes_texts_as_they_are() -> None:
    examples = Examples(["a {pair} {labels}", "b"], [0, 0], ["c {text}", "d"])
    assert examples.prompts("{labels}: {text} / {pair} {other}", labels="x, y") == [
        "x, y: a {pair} {labels} / c {text} {other}",
        "x, y: b / d {other}",
    ]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A language model that has learned to name the class of a text, beside an encoder that knows nothing."""
    taught = teach_classes(tmp_path_factory.mktemp("language"), PROMPT, WORDS)
    bench = Bench(tmp_path_factory.mktemp("classes"))
    pico.write_data(bench.inputs / "data")
    pico.write_model(bench.inputs / "base", num_layers=1)
    shutil.copytree(taught, bench.inputs / "teacher")
    return bench


def test_a_job_goes_from_a_language_model_to_a_classifier(bench: Bench) -> None:
    settings = FAST | {"epochs": 20, "learning_rate": 1e-3, "batch_size": 16}
    distill = {"kind": "distill", **settings, "losses": [{"kind": "forward_kl", "temperature": 1.0}]}
    stages = [
        {"kind": "answer", "splits": ["train", "validation", "test"]},
        distill,
        {"kind": "evaluate", "latency_samples": 10},
    ]
    spec = make_spec(stages, teacher=TEACHER, student={"kind": "pretrained", "model": "small"})
    for ordinal, stage in enumerate(spec["stages"]):
        finished = bench.succeed(spec, ordinal)
        bench.adopt(finished, ordinal, stage["kind"])
        if stage["kind"] == "answer":
            assert finished.last["summary"]["teacher_validation"]["accuracy"] > 0.9
            assert finished.last["summary"]["num_rows"] == {"train": 180, "validation": 45, "test": 60}
    rows = {row["name"]: row for row in finished.last["summary"]["models"]}
    assert list(rows) == ["teacher", "student"]
    assert rows["teacher"]["accuracy"] > 0.9
    assert rows["student"]["accuracy"] > 0.9
    assert rows["student"]["agreement"] > 0.9
    assert rows["teacher"]["size_bytes"] is None
    card = (finished.outputs / "report" / "MODEL_CARD.md").read_text()
    assert "| teacher | answers |" in card
    assert "distilled from `big`" in card


def test_a_text_that_says_nothing_gets_no_label_more_than_another(bench: Bench) -> None:
    teacher = TEACHER | {"content_free": ["please now"]}
    path = bench.inputs / "data" / "train.jsonl"
    rows = path.read_text()
    try:
        path.write_text(json.dumps({"text": "please now", "label": "login"}) + "\n" + rows)
        spec = make_spec(
            [{"kind": "answer"}, {"kind": "distill"}], teacher=teacher, student={"kind": "pretrained", "model": "small"}
        )
        finished = bench.succeed(spec, 0, "free")
    finally:
        path.write_text(rows)
    from safetensors.torch import load_file

    logits = load_file(finished.outputs / "answers" / "answers.safetensors")["logits"]
    torch.testing.assert_close(logits[0].softmax(dim=-1), torch.full((3,), 1 / 3), atol=2e-2, rtol=0)
    assert logits[1:].softmax(dim=-1).max(dim=-1).values.mean() > 0.6


def test_words_whose_probability_is_no_float_are_weighed_by_its_logarithm(bench: Bench) -> None:
    teacher = TEACHER | {"content_free": ["please now"], "words": WORDS | {"login": " password late" * 20}}
    stages = [{"kind": "answer"}, {"kind": "distill"}]
    spec = make_spec(stages, teacher=teacher, student={"kind": "pretrained", "model": "small"})
    with bench.surround(spec, 0, "unlikely") as ctx:
        found = ctx.spec.teacher.build(ctx)(Examples(["please now"], []), 64)
    torch.testing.assert_close(found.softmax(dim=-1), torch.full((1, 3), 1 / 3))


def test_words_for_a_label_that_is_not_there_are_told(bench: Bench) -> None:
    teacher = TEACHER | {"words": {"refunds": " refund"}}
    spec = make_spec(
        [{"kind": "answer"}, {"kind": "distill"}], teacher=teacher, student={"kind": "pretrained", "model": "small"}
    )
    finished = bench.run(spec, 0, name="unknown")
    assert finished.last["reason"] == "dataset_invalid"
    assert "refunds" in finished.last["message"]


BAD = [
    ({"teacher": TEACHER | {"prompt": "Text:"}}, "teacher.prompt", "'{text}'"),
    ({"task": {"kind": "text_classification", "pair": "b"}}, "teacher.prompt", "'{pair}'"),
    ({"teacher": TEACHER | {"words": {"a": ""}}}, "teacher.words.a", "no words"),
    ({"task": {"kind": "causal_lm"}}, "teacher.kind", "chooses among labels"),
    ({"student": {"kind": "teacher_layers", "keep": [0]}}, "student.kind", "use kind 'pretrained'"),
    ({"stages": [{"kind": "distill"}]}, "stages.0", "add stage 'answer' before it"),
    ({"stages": [{"kind": "finetune"}]}, "stages.0", "leave the stage out"),
    ({"stages": [{"kind": "answer", "splits": ["test"]}]}, "stages.0.splits", "'train' is missing"),
    (
        {"stages": [{"kind": "answer"}, {"kind": "distill", "losses": [{"kind": "relations"}]}]},
        "stages.1.losses",
        "compares layers",
    ),
]


@pytest.mark.parametrize(("change", "field", "hint"), BAD, ids=[field for _, field, _ in BAD])
def test_what_does_not_fit_such_a_teacher_is_told(change: dict[str, Any], field: str, hint: str) -> None:
    base = {"teacher": TEACHER, "student": {"kind": "pretrained", "model": "small"}}
    with pytest.raises(SpecInvalid) as caught:
        make_spec(change.pop("stages", [{"kind": "answer"}, {"kind": "distill"}]), **(base | change))
    assert any(d["field"] == field and hint in d["message"] for d in caught.value.details), caught.value.details


def test_default_stages_ask_first() -> None:
    from core.jobs.spec import load_spec

    spec = load_spec({"teacher": TEACHER, "student": {"kind": "pretrained", "model": "small"}, "data": "toy"})
    assert [stage.kind for stage in spec.stages] == ["answer", "distill", "export", "evaluate"]
    assert "test" in spec.stages[0].splits
