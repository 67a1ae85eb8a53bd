"""Named entities: words and their rows, scores against seqeval, and a whole job on WNUT-17 through the real child."""

import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from seqeval.metrics import f1_score
from seqeval.metrics.sequence_labeling import get_entities
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForTokenClassification, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from core.errors import StageFailed
from stillhouse.classifier import Classifier
from stillhouse.errors import InvalidInput
from tests import pico
from tests.engine_bench import Bench, Finished, make_spec
from worker.engine.entities import count_entities, find_entities
from worker.engine.loading import load_tokenizer, save_tokenizer
from worker.engine.scores import f1_of
from worker.engine.words import Sentences, encode_words, read_after_space, read_sentences

WNUT = Path(__file__).parents[3] / "shared" / "data" / "wnut17"
TAGS = ["O", "B-person", "I-person", "B-place", "I-place"]
LABELS = sorted({"O", "B-login", "B-refund", "B-delivery"})
TASK = {"kind": "token_classification"}
FAST = {"epochs": 10, "learning_rate": 3e-3, "head_learning_rate": 1e-2, "batch_size": 16}
CPU = torch.device("cpu")


@given(st.lists(st.lists(st.tuples(st.sampled_from(TAGS), st.sampled_from(TAGS)), min_size=1), min_size=1))
def test_entities_and_their_f1_are_those_of_seqeval(texts: list[list[tuple[str, str]]]) -> None:
    labelled, predicted = ([[pair[side] for pair in text] for text in texts] for side in (0, 1))
    for tags in labelled:
        assert find_entities(tags) == set(get_entities(tags))
    found = f1_of(count_entities(labelled, predicted).sum(axis=0))
    with np.errstate(all="ignore"):
        assert found == pytest.approx(f1_score(labelled, predicted, zero_division=0))


def test_a_row_is_a_words_first_piece(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(pico.write_model(tmp_path))
    tokenizer.model_max_length = 7
    words = [["refund", "my", "xyz", "late"], ["parcel"], ["box"] * 9]
    assert tokenizer("late").input_ids[1:-1] != tokenizer("my").input_ids[1:-1]
    split = encode_words(Sentences(words, [[0, 1, 2, 0], [2], [1] * 9]), tokenizer, ["input_ids", "attention_mask"])
    assert (len(split), split.num_rows, split.num_cut) == (3, 14, 1)
    batch = split.batch(np.array([2, 0]), CPU)
    assert batch.row_numbers.tolist() == [5, 6, 7, 8, 9, 0, 1, 2, 3]
    assert batch.row_labels.tolist() == [1] * 5 + [0, 1, 2, 0]
    places = batch.is_row.nonzero()[:, 1].tolist()
    assert places == [1, 2, 3, 4, 5, 1, 2, 3, 4]
    assert (batch.rows[:, 0] == -1).all()
    assert np.concatenate(split.numbers).tolist() == list(range(10))


@pytest.mark.parametrize("is_sequence", [False, True])
def test_words_of_a_byte_level_tokenizer_stand_after_a_space_also_when_it_is_loaded_again(
    is_sequence: bool, tmp_path: Path
) -> None:
    raw = Tokenizer(models.BPE({"m": 0, "y": 1, "Ġ": 2, "my": 3, "Ġmy": 4, "<e>": 5}, [("m", "y"), ("Ġ", "my")]))
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = pre_tokenizers.Split(Regex(r" ?\w+"), "isolated")
    raw.pre_tokenizer = pre_tokenizers.Sequence([split, by_bytes]) if is_sequence else by_bytes
    kind = Qwen2Tokenizer if is_sequence else PreTrainedTokenizerFast
    ends = dict.fromkeys(("pad_token", "eos_token", "unk_token"), "<e>")
    kind(tokenizer_object=raw, add_prefix_space=False, **ends).save_pretrained(tmp_path)
    for _ in range(2):
        tokenizer = load_tokenizer(tmp_path)
        read_after_space(tokenizer)
        assert tokenizer.convert_ids_to_tokens(tokenizer([["my"]], is_split_into_words=True).input_ids[0]) == ["Ġmy"]
        save_tokenizer(tokenizer, tmp_path)


def test_a_tokenizer_without_bytes_stays_as_it_is() -> None:
    for split in (None, pre_tokenizers.Whitespace()):
        raw = Tokenizer(models.WordLevel({"my": 0}, unk_token="my"))
        if split:
            raw.pre_tokenizer = split
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, add_prefix_space=False)
        read_after_space(tokenizer)
        assert tokenizer.add_prefix_space is False
        assert tokenizer.convert_ids_to_tokens(tokenizer([["my"]], is_split_into_words=True).input_ids[0]) == ["my"]


def test_words_without_pieces_have_no_place(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(pico.write_model(tmp_path))
    split = encode_words(Sentences([["late", "\u200b", "box"]], [[0, 1, 2]]), tokenizer, ["input_ids"])
    batch = split.batch(np.array([0]), CPU)
    assert batch.row_numbers.tolist() == [0, 2]
    assert batch.row_labels.tolist() == [0, 2]


def test_rows_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"tokens": ["a"], "tags": ["O"]}\n{"tokens": ["a", "b"], "tags": ["O"]}\n')
    with pytest.raises(StageFailed, match=r"line 2: ValueError 2 words have 1 tags"):
        read_sentences(path, {"tokens": "tokens", "tags": "tags"}, ["O"])


def run(bench: Bench, spec: dict[str, Any], ordinal: int, **changes: Any) -> Finished:
    finished = bench.succeed(spec, ordinal, **changes)
    bench.adopt(finished, ordinal, spec["stages"][ordinal]["kind"])
    return finished


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Texts whose telling words are entities of their class."""
    bench = Bench(tmp_path_factory.mktemp("bench")).lay()
    pico.write_entities(bench.inputs / "data")
    return bench


@pytest.mark.parametrize("losses", [["forward_kl"], ["forward_kl", "relations"]], ids=["ahead", "online"])
def test_a_student_begins_words_as_its_teacher_learned_to(bench: Bench, losses: list[str], tmp_path: Path) -> None:
    """Both come from one folder, whose bytes begin words otherwise until a tagger has read with them."""
    bench = bench.copy(tmp_path / "job")
    for role in ("teacher", "base"):
        shutil.rmtree(bench.inputs / role, ignore_errors=True)
        pico.write_bytewise_model(bench.inputs / role)
    few = FAST | {"epochs": 3}
    distill = {"kind": "distill", **few, "deletion_probability": 0.3, "losses": [{"kind": kind} for kind in losses]}
    spec = make_spec(
        [{"kind": "finetune", **few}, distill], task=TASK, student={"kind": "pretrained", "model": "small"}
    )
    done = bench.succeed_all(spec, labels=LABELS)
    assert done[1].log.count("the teacher answered") == (3 if len(losses) == 1 else 0)


@pytest.mark.parametrize("answers", [[], [{"kind": "answer"}]], ids=["ahead", "kept"])
def test_a_job_goes_from_teacher_to_report(bench: Bench, tmp_path: Path, answers: list[dict[str, Any]]) -> None:
    bench = bench.copy(tmp_path / "job")
    stages = [
        {"kind": "finetune", **FAST},
        *answers,
        {"kind": "distill", **FAST, "losses": [{"kind": "forward_kl"}]},
        {"kind": "export"},
        {"kind": "evaluate", "latency_samples": 10},
    ]
    spec = make_spec(stages, task=TASK)
    done = [run(bench, spec, ordinal, labels=LABELS) for ordinal in range(len(stages))]
    rows = {row["name"]: row for row in done[-1].last["summary"]["models"]}
    assert list(rows) == ["teacher", "student", "safetensors", "onnx", "onnx_int8"]
    for row in rows.values():
        assert row["f1"] > 0.95
        assert row["f1_ci"][0] <= row["f1"] <= row["f1_ci"][1]
    folder = bench.inputs / "safetensors"
    model, tokenizer = (
        AutoModelForTokenClassification.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    words = ["please", "my", "parcel", "password"]
    with torch.no_grad():
        logits = model(**tokenizer(words, is_split_into_words=True, return_tensors="pt")).logits[0, 1:-1]
    assert [model.config.id2label[int(index)] for index in logits.argmax(-1)] == ["O", "O", "B-delivery", "B-login"]
    card = (bench.inputs / "report" / "MODEL_CARD.md").read_text()
    assert "pipeline_tag: token-classification" in card
    with pytest.raises(InvalidInput, match="gives each word a tag"):
        Classifier(bench.inputs / "onnx")


@pytest.mark.skipif(not WNUT.is_dir(), reason=f"WNUT-17 is not at {WNUT}")
def test_wnut17_goes_through(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    pico.write_model(bench.inputs / "teacher")
    (bench.inputs / "data").mkdir()
    for split, count in (("train", 400), ("validation", 60), ("test", 80)):
        with (WNUT / f"{split}.jsonl").open() as lines:
            (bench.inputs / "data" / f"{split}.jsonl").write_text("".join(islice(lines, count)))
    kinds = ("person", "location", "group", "corporation", "product", "creative-work")
    labels = sorted(["O", *(f"{head}-{kind}" for kind in kinds for head in "BI")])
    stages = [
        {"kind": "finetune", "epochs": 1},
        {"kind": "distill", "epochs": 1},
        {"kind": "evaluate", "latency_samples": 10},
    ]
    spec = make_spec(stages, task=TASK)
    done = [run(bench, spec, ordinal, labels=labels) for ordinal in range(3)]
    losses = [value for _, value in done[0].series("loss/total")]
    assert losses[-1] < losses[0]
    rows = {row["name"]: row for row in done[-1].last["summary"]["models"]}
    assert rows["student"]["accuracy"] > 0.8  # most words are outside; these models know no word of the texts
