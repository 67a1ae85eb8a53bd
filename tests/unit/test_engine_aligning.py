"""A teacher and a student with different tokens: where they meet, what is heard there, and whole jobs of them."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tests import pico
from tests.engine_bench import Bench, make_spec
from worker.engine import devices
from worker.engine.aligning import AnswersAcross, Stream
from worker.engine.blocks import NOWHERE, Blocks, read_starts, read_stream
from worker.engine.loading import load_tokenizer
from worker.engine.next_tokens import predict_next
from worker.kernels.divergences import sorted_distance
from worker.kernels.heads import HeadSignal

TASK = {"kind": "causal_lm", "block_tokens": 32}
STUDENT = {"kind": "pretrained", "model": "base"}
FAST = {"epochs": 8, "learning_rate": 5e-3, "batch_size": 8}
TEXTS = ["my parcel is late", "  refund my money please", "the parcel\n\nis the refund", "please"]
CPU = torch.device("cpu")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def by_letters(end: str = "<end>") -> PreTrainedTokenizerFast:
    """Returns a tokenizer with a token for each letter, spaces too, and one that begins every text."""
    letters = sorted({*"abcdefghijklmnopqrstuvwxyz \n"})
    raw = Tokenizer(models.WordLevel({c: i for i, c in enumerate([end, "<unk>", "<go>", *letters])}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    raw.decoder = decoders.Fuse()
    raw.post_processor = TemplateProcessing(single="<go> $A", special_tokens=[("<go>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token=end, bos_token="<go>")


def by_bytes(texts: list[str]) -> PreTrainedTokenizerFast:
    """Returns a tokenizer as GPT-2 has, whose tokens begin with the space before them."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=290, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>")


@pytest.fixture(scope="module")
def by_words(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(pico.write_language_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "has_fast_bf16", lambda _: False)


@pytest.mark.parametrize("kind", ["words", "letters", "bytes"])
def test_a_token_begins_at_the_first_of_its_letters(kind: str, tmp_path: Path, by_words: Any) -> None:
    texts = [*TEXTS, "naïve 🙂 café"]
    tokenizer = {"words": by_words, "letters": by_letters(), "bytes": by_bytes(TEXTS)}[kind]
    path = write(tmp_path / "train.jsonl", [{"q": "is the", "a": text} for text in texts])
    columns = {"prompt": "q", "text": "a"}
    ids_S, starts_S = read_stream(path, columns, tokenizer)[0], read_starts(path, columns, tokenizer)
    assert len(ids_S) == len(starts_S)
    known = starts_S[starts_S != NOWHERE]
    assert (np.diff(known) > 0).all()
    split = "".join(f"is the\x00{text}\x01" for text in texts)  # as the letters are counted: one more for each end
    for token, start in zip(ids_S, starts_S, strict=True):
        shown = tokenizer.decode([int(token)]).strip()
        if token == tokenizer.eos_token_id:
            assert split[start] == "\x01"
        elif start != NOWHERE and shown and "\ufffd" not in shown and token != tokenizer.unk_token_id:
            assert split[start : start + len(shown)] == shown
    ends = np.flatnonzero(ids_S == tokenizer.eos_token_id)
    assert len(ends) == len(texts)


@pytest.mark.usefixtures("exact")
def test_the_same_tokens_hear_what_the_teacher_says_beside_them(tmp_path: Path, by_words: Any) -> None:
    """Aligned with itself a teacher says at every place what it says online, whatever the blocks and prompts."""
    path = write(tmp_path / "train.jsonl", [{"q": "the refund", "a": text} for text in TEXTS])
    columns = {"prompt": "q", "text": "a"}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()
    ids_S, is_learned_S = read_stream(path, columns, by_words)
    stream = Stream(ids_S, read_starts(path, columns, by_words))
    teaching = AnswersAcross(model, stream, stream, predict_next)
    batch = Blocks(ids_S, is_learned_S, 7).batch(np.array([2, 0, 1]), CPU)
    student_NC = torch.randn(int(batch.is_row.sum()), 40)
    with torch.no_grad():
        online = HeadSignal(predict_next(model, batch.inputs, batch.is_row))
        torch.testing.assert_close(
            sorted_distance(*teaching.answer(batch).compare(student_NC, 2.0)),
            sorted_distance(*online.compare(student_NC, 2.0)),
        )


@pytest.mark.usefixtures("exact")
def test_each_is_heard_after_the_same_letters(tmp_path: Path, by_words: Any) -> None:
    """The oracle goes through one text letter by letter and asks the teacher about the words before each."""
    text = "my parcel is late please"
    path = write(tmp_path / "train.jsonl", [{"text": text}])
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()
    letters = by_letters()
    streams = [
        Stream(read_stream(path, {"text": "text"}, t)[0], read_starts(path, {"text": "text"}, t))
        for t in (by_words, letters)
    ]
    teaching = AnswersAcross(model, *streams, predict_next)
    ids_S = streams[1].ids_S
    batch = Blocks(ids_S, np.ones(len(ids_S), dtype=bool), len(ids_S)).batch(np.array([0]), CPU)
    student_NC = torch.zeros(len(ids_S) - 1, 31)
    log_p_NC, log_q_NC = teaching.answer(batch).compare(student_NC, 1.0)
    assert log_p_NC.shape == log_q_NC.shape == (len(ids_S) - 1, 40)
    assert log_q_NC.exp().sum(-1).tolist() == pytest.approx([1.0] * len(student_NC))
    num_heard = 0
    for place, log_p_C in enumerate(log_p_NC):  # the first place is the token that begins the text
        before = text[:place]
        if before.endswith(" ") or before == text:
            num_heard += 1
            words = torch.tensor([by_words(before)["input_ids"]])
            with torch.no_grad():
                expected_C = model(words).logits[0, -1].log_softmax(-1)
            torch.testing.assert_close(log_p_C, expected_C)
        else:
            torch.testing.assert_close(log_p_C, log_q_NC[place])
    assert num_heard == len(text.split())


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A teacher that knows words, and a student to be that knows letters."""
    bench = Bench(tmp_path_factory.mktemp("bench")).lay_language()
    learned = bench.succeed(make_spec([{"kind": "finetune", **FAST}], task=TASK), 0, "teacher", labels=[])
    bench.adopt(learned, 0, "finetune")
    letters = by_letters()
    torch.manual_seed(1)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(letters), bos_token_id=0, eos_token_id=0, **sizes)).save_pretrained(
        bench.inputs / "base"
    )
    letters.save_pretrained(bench.inputs / "base")
    return bench


def test_a_student_of_letters_learns_from_a_teacher_of_words(taught: Bench, tmp_path: Path) -> None:
    bench = taught.copy(tmp_path / "bench")
    losses = [{"kind": "cross_entropy"}, {"kind": "uld"}]
    stages = [{"kind": "distill", **FAST, "losses": losses}, {"kind": "evaluate", "latency_samples": 10}]
    distil, evaluate = bench.succeed_all(make_spec(stages, task=TASK, student=STUDENT), labels=[])
    values = [value for _, value in distil.series("loss/uld")]
    assert np.mean(values[-5:]) < 0.7 * np.mean(values[:5])
    assert "the teacher is heard at" in distil.log
    assert distil.last["summary"]["teacher_validation"] is None
    teacher, student = evaluate.last["summary"]["models"]
    assert (teacher["kl_to_teacher"], student["kl_to_teacher"], student["agreement"]) == (0.0, None, None)
    model = AutoModelForCausalLM.from_pretrained(bench.inputs / "student").eval()
    tokenizer = load_tokenizer(bench.inputs / "student")
    columns, path = {"text": "text"}, bench.inputs / "data" / "test.jsonl"
    blocks, total = Blocks(*read_stream(path, columns, tokenizer), 32), 0.0
    for batch in blocks.in_order(CPU):
        with torch.no_grad():
            logits_BTC = model(**batch.inputs).logits
        total += torch.nn.functional.cross_entropy(logits_BTC[batch.is_row], batch.row_labels, reduction="sum").item()
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert student["bits_per_byte"] == pytest.approx(total / math.log(2) / sum(map(len, texts)), rel=1e-4)
    assert 0 < teacher["bits_per_byte"] < student["bits_per_byte"]


@pytest.mark.parametrize(
    ("stage", "task", "named"),
    [
        ({"losses": [{"kind": "uld"}], "on_policy": {"new_tokens": 4, "prompt_tokens": 4}}, TASK, "on_policy"),
        ({"losses": [{"kind": "uld"}]}, TASK | {"prompt": "prompt", "chat": True}, "task.chat"),
        ({"losses": [{"kind": "uld"}, {"kind": "reverse_kl"}]}, TASK, "teacher's tokenizer"),
    ],
)
def test_what_needs_the_same_tokens_is_refused(
    taught: Bench, stage: dict[str, Any], task: dict[str, Any], named: str, tmp_path: Path
) -> None:
    spec = make_spec([{"kind": "distill", **stage}], task=task, student=STUDENT)
    finished = taught.copy(tmp_path / "bench").run(spec, 0, labels=[])
    assert finished.last["reason"] == "vocab_incompatible"
    assert named in finished.last["suggestion"]
