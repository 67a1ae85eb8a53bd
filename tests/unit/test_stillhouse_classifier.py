"""Parts of the classifier of a downloaded form."""

import json
from pathlib import Path

import pytest

from stillhouse.classifier import _max_tokens


@pytest.mark.parametrize(
    ("tokenizer", "config", "found"),
    [
        ({"model_max_length": 1024}, {"max_position_embeddings": 8192}, 1024),
        ({"model_max_length": 1e30}, {"max_position_embeddings": 514}, 514),
        ({"model_max_length": 64}, {}, 64),
        ({}, {}, 512),
    ],
)
def test_a_text_is_cut_where_it_was_when_measured(tokenizer: dict, config: dict, found: int, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert _max_tokens(tmp_path) == found
