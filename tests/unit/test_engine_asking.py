"""What an API's answers say of labels, and what is asked."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.special import rel_entr

from core.errors import SpecInvalid, StageFailed
from core.jobs.spec import load_spec
from worker.asking import read_answer
from worker.engine.asking import (
    make_label_request,
    make_request,
    name_label,
    read_labels,
    read_probabilities,
    speak_by_asking,
)
from worker.engine.data import Examples
from worker.engine.objective import Objective, Term
from worker.engine.teaching import ANSWERS_FILE, AnswersKept
from worker.methods.losses.forward_kl import ForwardKL

WORDS = ["negative", "neutral", "positive"]
SPEC = {"teacher": {"kind": "openai", "model": "m"}, "student": {"kind": "pretrained", "model": "s"}, "data": "d"}


def teacher(**changes):
    return load_spec(SPEC | {"teacher": SPEC["teacher"] | changes}).teacher


def shares(top: dict[str, float]) -> list[float]:
    found = read_probabilities({token: math.log(p) for token, p in top.items()}, WORDS)
    return found.exp().tolist()


def test_a_label_has_the_probability_of_the_tokens_that_begin_it() -> None:
    assert shares({" Pos": 0.5, "positive": 0.1, "neg": 0.3, "neutr": 0.1}) == pytest.approx([0.3, 0.1, 0.6])
    assert shares({"negative.": 0.2, "ne": 0.4, "pos": 0.4}) == pytest.approx([0.4, 0.2, 0.4])  # "ne" begins two
    assert shares({"neg": 0.2, "neu": 0.1, "pos": 0.1, "The": 0.6}) == pytest.approx([0.5, 0.25, 0.25])


def test_a_token_of_a_longer_word_is_no_label() -> None:
    top = {" he": math.log(0.2), " her": math.log(0.5), " she, ": math.log(0.3)}
    torch.testing.assert_close(read_probabilities(top, ["he", "she"]).exp(), torch.tensor([0.4, 0.6]))
    top = {"10": math.log(0.6), "1": math.log(0.2), "2": math.log(0.2)}  # "1" begins both
    torch.testing.assert_close(read_probabilities(top, ["1", "2", "10"]).exp(), torch.tensor([0.1, 0.2, 0.7]))


def test_labels_that_are_not_told_share_what_is_left_below_the_least_token() -> None:
    assert shares({"pos": 0.9, "The": 0.04}) == pytest.approx([0.03 / 0.96, 0.03 / 0.96, 0.9 / 0.96])
    assert shares({"pos": 0.5, "The": 0.02}) == pytest.approx([0.02 / 0.54, 0.02 / 0.54, 0.5 / 0.54])
    assert min(shares({"pos": 1.0})) > 0
    assert read_probabilities({"The": -0.1}, WORDS) is None


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (" Positive.", 2),
        ("**neutral**", 1),
        ("The answer is negative", 0),
        ("negative or positive", 0),
        ("It is negative or positive", None),
        ("positively", None),
        ("", None),
    ],
)
def test_an_answer_names_a_label(text: str, label: int | None) -> None:
    assert name_label(text, WORDS) == label


def test_the_longest_of_labels_that_begin_alike_is_meant() -> None:
    assert name_label("card lost abroad", ["card", "card lost"]) == 1


def test_votes_are_smoothed_counts() -> None:
    answers = [{"text": text, "top": None} for text in ("positive", "positive", "neutral", "well")]
    found = read_labels(answers, WORDS, 0.5)
    torch.testing.assert_close(found.exp(), torch.tensor([0.5, 1.5, 2.5]) / 4.5)
    assert read_labels([{"text": "well", "top": None}], WORDS, 0.5) is None


def ask(answers: list[str], **settings) -> tuple[torch.Tensor, list[tuple]]:
    """Returns log p of the labels of so many texts with these answers, and what is warned of."""
    warned: list[tuple] = []
    ctx = SimpleNamespace(
        labels=WORDS,
        ask=lambda bodies: [{"text": text, "top": None} for text, _ in zip(answers, bodies, strict=True)],
        warn=lambda *told, **data: warned.append((*told, data)),
    )
    texts = [""] * (len(answers) // settings.get("votes", 1))
    return speak_by_asking(ctx, teacher(**settings))(Examples(texts, []), 64), warned


def test_texts_whose_answers_name_no_label_are_told() -> None:
    assert ask(["positive"] * 3)[1] == []
    _, [(type, message, data)] = ask(["I cannot say.", "positive", "neutral", "Sorry"])
    assert (type, data) == ("answers_unreadable", {"num_unread": 2, "num_texts": 4})
    assert "2 of 4 texts" in message
    assert "'I cannot say.'" in message
    votes = ["well", "well", "positive", "well"]
    assert ask(votes, top_logprobs=0, votes=2)[1][0][2] == {"num_unread": 1, "num_texts": 2}


@pytest.mark.parametrize(("most", "fails"), [(0.25, True), (0.5, False)])
def test_too_many_texts_without_a_label_end_the_stage(most: float, fails: bool) -> None:
    answers = ["well", "well", "positive", "neutral"]
    if not fails:
        ask(answers, max_unreadable=most)
        return
    with pytest.raises(StageFailed, match="2 of 4 texts") as caught:
        ask(answers, max_unreadable=most)
    assert caught.value.reason == "teacher_unavailable"
    assert "label alone" in caught.value.suggestion


def test_a_text_that_was_given_no_label_teaches_nothing(tmp_path: Path) -> None:
    logits_NC, _ = ask(["positive", "well", "neutral"])
    about = {"split": "", "temperature": 1.0, "scores": None, "rest": "together"}
    save_file({"logits": logits_NC}, tmp_path / ANSWERS_FILE, {"about": json.dumps(about)})
    teaching, batch = AnswersKept(tmp_path), SimpleNamespace(row_numbers=torch.arange(3), task="")
    student_NC, is_heard_N = torch.tensor([[2.0, -1.0, 0.5]]).repeat(3, 1), teaching.find_heard(batch)
    objective = Objective([Term("forward_kl", 1.0, ForwardKL(temperature=1.0).build(None))])
    gradient_NC, numbers = objective(student_NC, teaching.answer(batch), torch.zeros(3), 3, heard=2 / 3)
    q_C, p_NC = (x.softmax(-1).numpy() for x in (student_NC[0], logits_NC[[0, 2]]))
    assert is_heard_N.tolist() == [True, False, True]
    assert numbers["forward_kl"] == pytest.approx(rel_entr(p_NC, q_C).sum() / 2, rel=1e-5)
    np.testing.assert_allclose(gradient_NC[[0, 2]], (q_C - p_NC) / 2, atol=1e-6)
    assert not gradient_NC[1].any()


def test_requests_are_what_the_api_expects() -> None:
    chat = make_label_request(teacher(system="be brief"), "which?", 0)
    assert chat["messages"][0] == {"role": "system", "content": "be brief"}
    assert chat["messages"][1]["content"] == "which?"
    assert (chat["logprobs"], chat["top_logprobs"], chat["temperature"]) == (True, 20, 0.0)
    options = {"max_tokens": None, "max_completion_tokens": 4}
    voted = make_label_request(teacher(top_logprobs=0, votes=3, options=options), "a", 2)
    assert (voted["seed"], voted["temperature"], voted["max_completion_tokens"]) == (2, 1.0, 4)
    assert not {"logprobs", "max_tokens"} & voted.keys()
    plain = make_label_request(teacher(endpoint="completions", top_logprobs=5), "a", 0)
    assert plain["logprobs"] == 5
    assert plain["prompt"] == "a"


def test_a_text_is_asked_for_without_probabilities() -> None:
    found = make_request(teacher(system="be brief", options={"stop": ["\n"]}), "go on", temperature=0.5, max_tokens=7)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "go on"}]
    assert found == {"model": "m", "messages": messages, "temperature": 0.5, "max_tokens": 7, "stop": ["\n"]}


def test_answers_are_read_in_both_shapes() -> None:
    places = [
        {"token": "\n", "top_logprobs": [{"token": "\n", "logprob": -0.1}]},
        {"token": "pos", "top_logprobs": [{"token": "pos", "logprob": -0.2}, {"token": "n\x00eg", "logprob": -2.0}]},
    ]
    choice = {"message": {"content": "\npos\x00itive"}, "logprobs": {"content": places}, "finish_reason": "length"}
    found = read_answer("chat", {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 2}})
    assert found == ("\npositive", {"pos": -0.2, "neg": -2.0}, True, (7, 2))
    told = {"tokens": [" pos"], "top_logprobs": [{" pos": -0.2}]}
    assert read_answer("completions", {"choices": [{"text": " pos", "logprobs": told}]}) == (
        " pos",
        {" pos": -0.2},
        False,
        None,
    )
    alike = {"choices": [{"text": "\npos", "logprobs": {"content": places}}]}  # completions of llama.cpp
    assert read_answer("completions", alike) == ("\npos", {"pos": -0.2, "neg": -2.0}, False, None)
    assert read_answer("completions", {"choices": [{"text": "a", "logprobs": {"content": None}}]}).top is None
    assert read_answer("chat", {"choices": [{"message": {"content": None}}]}).text == ""
    for bad in ({}, {"choices": []}, {"choices": [{"message": {"content": 5}}]}, {"choices": [{"text": "a"}]}, []):
        with pytest.raises((ValueError, KeyError, TypeError, IndexError, AttributeError)):
            read_answer("chat", bad)


def test_tokens_of_one_text_are_as_likely_as_their_sum() -> None:
    some = [("a", 0.5), ("\ufffd", 0.2), ("\ufffd", 0.1), ("a", 0.05)]  # a byte last
    top = [{"token": token, "logprob": math.log(p)} for token, p in some] + [{"token": "b", "logprob": -9999.0}] * 2
    top += [{"token": "c", "logprob": -math.inf}] * 2
    choice = {"message": {"content": "a"}, "logprobs": {"content": [{"token": "a", "top_logprobs": top}]}}
    found = read_answer("chat", {"choices": [choice]}).top
    assert found is not None
    assert {token: math.exp(log_p) for token, log_p in found.items()} == pytest.approx(
        {"a": 0.55, "\ufffd": 0.3, "b": 0, "c": 0}
    )


BAD = [
    ({"base_url": "ftp://a/v1"}, "teacher.base_url"),
    ({"base_url": "http://user:pass@a/v1"}, "teacher.base_url"),
    ({"base_url": "http://a:999999/v1"}, "teacher.base_url"),
    ({"base_url": "http://a/v1\r\nX: y"}, "teacher.base_url"),
    ({"prompt": "which?"}, "teacher.prompt"),
    ({"max_cost": 1.0}, "teacher.max_cost"),
    ({"votes": 8}, "teacher.votes"),
    ({"top_logprobs": 21}, "teacher.top_logprobs"),
    ({"system": "Be brief.", "endpoint": "completions"}, "teacher.system"),
]


@pytest.mark.parametrize(
    ("labels", "words", "named"),
    [
        (["a", "b"], {"A": "good"}, "'A', which is no label"),
        ([":)", ":("], {}, "':)' and ':('"),
        (["A", "A*", "B"], {}, "'A' and 'A*'"),
        (["a", "b"], {"a": "Good", "b": "good."}, "'Good' and 'good.'"),
    ],
)
def test_words_that_answers_cannot_be_known_by_are_told_before_any_is_paid(
    labels: list[str], words: dict[str, str], named: str
) -> None:
    with pytest.raises(StageFailed) as caught:
        speak_by_asking(SimpleNamespace(labels=labels), teacher(words=words))
    assert caught.value.reason == "spec_invalid"
    assert named in caught.value.message


@pytest.mark.parametrize(("change", "field"), BAD, ids=[str(change) for change, _ in BAD])
def test_bad_settings_are_told(change: dict, field: str) -> None:
    with pytest.raises(SpecInvalid) as caught:
        teacher(**change)
    assert caught.value.details[0]["field"] == field


LANGUAGE = {"kind": "causal_lm", "prompt": "q", "text": "a"}


@pytest.mark.parametrize("prompt", [None, "Text: {text}"])
def test_a_prompt_without_the_second_text_is_told(prompt: str | None) -> None:
    with pytest.raises(SpecInvalid) as caught:
        load_spec(
            SPEC
            | {"task": {"kind": "text_classification", "pair": "b"}, "teacher": SPEC["teacher"] | {"prompt": prompt}}
        )
    assert [detail["field"] for detail in caught.value.details] == ["teacher.prompt"]
    assert "'{pair}'" in caught.value.details[0]["message"]


def test_a_language_model_learns_what_an_api_writes() -> None:
    spec = load_spec(SPEC | {"task": LANGUAGE})
    assert [stage.kind for stage in spec.stages] == ["generate", "finetune", "export", "evaluate"]
    assert spec.stages[1].of == "student"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"task": {"kind": "causal_lm"}}, "set task.prompt"),
        ({"stages": [{"kind": "answer"}]}, "use 'generate' instead"),
        ({"stages": [{"kind": "distill"}]}, "'distill' needs the answers of a teacher"),
        (
            {"teacher": {"kind": "label_space", "model": "m", "prompt": "{text}"}, "stages": [{"kind": "generate"}]},
            "'label_space' teacher writes no texts",
        ),
    ],
)
def test_what_an_api_cannot_do_for_a_language_model_is_told(change: dict, why: str) -> None:
    with pytest.raises(SpecInvalid) as caught:
        load_spec(SPEC | {"task": LANGUAGE} | change)
    assert any(why in detail["message"] for detail in caught.value.details), caught.value.details


def test_only_what_is_asked_is_content() -> None:
    stage = load_spec(SPEC).stages[0]
    seen = [load_spec(SPEC | {"teacher": SPEC["teacher"] | change}).seen_by(stage) for change in CHANGES]
    assert seen[0] == seen[1] != seen[2]
    assert load_spec(SPEC).seen_by(load_spec(SPEC).stages[1])["teacher"] == {"kind": "model", "model": "teacher"}


CHANGES = [{}, {"secret": "key", "concurrency": 2, "max_requests": 5, "tries": 1}, {"prompt": "{text}?"}]
