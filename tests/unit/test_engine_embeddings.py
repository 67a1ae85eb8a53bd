"""Training of the rows that the data use is training of all of them, and leaves an ordinary model."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification as Classifier
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedConfig

from tests import pico
from tests.engine_bench import FAST, Bench, make_spec
from tests.unit.test_engine_models import CONFIGS, LLAMA, make
from worker.engine.embeddings import UsedRows, train_used_rows, whole_rows
from worker.engine.loading import load_tokenizer

USED = np.array([0, 2, 3, 5, 7, 11, 13])


@pytest.mark.parametrize("config", [*CONFIGS, LLAMA], ids=lambda config: config.model_type)
def test_it_learns_what_the_whole_embedding_does(config: PreTrainedConfig, tmp_path: Path) -> None:
    """The oracle is the same model with all its rows, by AdamW without decay, which alone reaches unused rows."""
    whole = make(config).eval()
    part = copy.deepcopy(whole)
    train_used_rows(part, USED)
    assert isinstance(part.get_input_embeddings(), UsedRows)
    ids_BT = torch.from_numpy(USED)[torch.randint(1, len(USED), (3, 9), generator=torch.Generator().manual_seed(1))]
    ids_BT[0, 5:] = 0  # padding
    inputs = {"input_ids": ids_BT, "attention_mask": (ids_BT != 0).long(), "labels": torch.tensor([0, 1, 0])}
    for model in (whole, part):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        for _ in range(4):
            optimizer.zero_grad()
            model(**inputs).loss.backward()
            optimizer.step()
    others_BT = torch.arange(4, 40).reshape(3, 12)
    with torch.no_grad():
        expected = whole(input_ids=others_BT, attention_mask=torch.ones_like(others_BT)).logits
        found = part(input_ids=others_BT, attention_mask=torch.ones_like(others_BT)).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    whole_rows(part)
    assert type(part.get_input_embeddings()) is torch.nn.Embedding
    assert part.get_input_embeddings().padding_idx == whole.get_input_embeddings().padding_idx
    part.save_pretrained(tmp_path)
    again, info = Classifier.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=1e-4, atol=1e-4)


def test_what_saves_nothing_or_is_the_last_layer_stays_whole() -> None:
    model = make(CONFIGS[0])
    train_used_rows(model, np.arange(31))  # of 60
    assert not isinstance(model.get_input_embeddings(), UsedRows)
    tied = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=2))
    train_used_rows(tied, USED)
    assert not isinstance(tied.get_input_embeddings(), UsedRows)


def test_a_stage_moves_the_rows_that_its_texts_use_and_no_other(tmp_path: Path) -> None:
    bench = Bench(tmp_path).lay()
    words = {label: sentence.split()[0] for label, sentence in pico.WORDS.items()}
    rows = [{"text": f"{word} {word}", "label": label} for label, word in words.items()] * 8
    for split in ("train", "validation"):
        (bench.inputs / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    finished = bench.succeed(make_spec([{"kind": "finetune", **FAST, "epochs": 1}]))
    before, after = (
        Classifier.from_pretrained(folder).get_input_embeddings().weight
        for folder in (bench.inputs / "teacher", finished.outputs / "teacher")
    )
    tokenizer = load_tokenizer(bench.inputs / "teacher")
    moved = torch.nonzero((before != after).any(dim=-1)).flatten().tolist()
    assert set(tokenizer.convert_tokens_to_ids([*words.values()])) <= set(moved)
    assert set(moved) <= {*tokenizer.convert_tokens_to_ids([*words.values()]), *tokenizer.all_special_ids}


@pytest.mark.parametrize(
    ("special", "word", "failure"),
    [
        ({"additional_special_tokens": ["<never>"]}, "", None),
        ({"additional_special_tokens": ["<said>"]}, "<said> ", "The train split has the token '<said>'"),
        ({"pad_token": "<fill>"}, "", "Texts are filled up with the token '<fill>'"),
    ],
)
def test_tokens_that_the_model_lacks_are_told_where_they_are_read(
    special: dict[str, Any], word: str, failure: str | None, tmp_path: Path
) -> None:
    bench = Bench(tmp_path).lay()
    tokenizer = load_tokenizer(bench.inputs / "teacher")
    tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(bench.inputs / "teacher")
    path = bench.inputs / "data" / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row | {"text": word + row["text"]}) + "\n" for row in rows))
    finished = bench.run(make_spec([{"kind": "finetune", **FAST, "epochs": 1}]))
    assert finished.last["type"] == ("error" if failure else "result"), finished.log
    if failure:
        assert finished.last["reason"] == "vocab_incompatible"
        assert finished.last["message"] == f"{failure}, which the model lacks."
        assert "resize_token_embeddings" in finished.last["suggestion"]
