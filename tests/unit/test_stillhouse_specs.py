"""Specs from files, and changes to them."""

from pathlib import Path

import pytest

from core.jobs.spec import parse_mapping
from stillhouse.errors import InvalidInput
from stillhouse.specs import load_spec, with_changes

SPEC = {"teacher": {"model": "a"}, "stages": [{"kind": "finetune"}, {"kind": "distill", "epochs": 6}]}


@pytest.mark.parametrize(
    ("change", "path", "value"),
    [
        ("stages.1.epochs=2", ("stages", 1, "epochs"), 2),
        ("seed=7", ("seed",), 7),
        ("name=try 2", ("name",), "try 2"),
        ("student.keep=[0, 5]", ("student", "keep"), [0, 5]),
        ("metadata.a=x=y", ("metadata", "a"), "x=y"),
        ("stages.0.dropout=null", ("stages", 0, "dropout"), None),
        ("stages.0.learning_rate=1e-4", ("stages", 0, "learning_rate"), 1e-4),
        ("stages.0.pattern=2:4", ("stages", 0, "pattern"), "2:4"),
    ],
)
def test_a_change_sets_one_value_and_leaves_the_rest(change: str, path: tuple, value: object) -> None:
    changed = with_changes(SPEC, [change])
    found = changed
    for key in path:
        found = found[key]
    assert found == value
    assert changed["teacher"] == {"model": "a"}
    assert SPEC["stages"][1]["epochs"] == 6, "the given spec was changed"


@pytest.mark.parametrize(
    "change", ["seed", "=1", "stages.2.epochs=1", "stages.x=1", "stages.²=1", "teacher.model.x=1", "seed=[1"]
)
def test_a_change_that_fits_nowhere_is_refused(change: str) -> None:
    with pytest.raises(InvalidInput):
        with_changes(SPEC, [change])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1", "neither valid YAML nor JSON"),
        (b"- 1", "must hold a mapping"),
        (b"\xff\xfe\xfa", "UTF-8"),
        (b"a: !!int ''", "neither valid YAML nor JSON"),
        (b"words: {true: x}", "the key True is no text; put it in quotes"),
        (b"a: {1: x}", "the key 1 is no text"),
        (b"? [1]\n: 2", "neither valid YAML nor JSON"),
    ],
)
def test_a_file_that_is_no_spec_is_refused(tmp_path, content: bytes, message: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=message):
        load_spec(path)
    with pytest.raises(InvalidInput, match="Cannot read"):
        load_spec(tmp_path / "none.yaml")


def test_json_is_a_spec_too(tmp_path) -> None:
    path = tmp_path / "job.json"
    path.write_text('{"teacher": {"model": "a"}}')
    assert load_spec(str(path)) == {"teacher": {"model": "a"}}
    path.write_text('{\n\t"a": 1e-4\n}')  # tabs, which YAML does not take
    assert load_spec(path) == {"a": 1e-4}


VALUES = """
a: [1, -2, 0, 007, 0x1F, 0o17, 1_000, 1., .5, 1e-4, 3E5, +.5e1, .inf, -.INF, 1:30, 2:4, 12e, 1.2.3]
b: [yes, no, on, off, y, n, true, False, TRUE, null, ~, Null, none]
d:
c: [2026-01-01, 2025-13-01, 2026-01-01T10:00:00Z, "1", '1e-4', !!str 1, !!float 1]
yes: no
2026-01-01: x
"""


def test_the_server_reads_it_alike(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(VALUES)
    found = load_spec(path)
    assert found == parse_mapping(VALUES.encode(), "")
    assert found["a"][9:11] == [1e-4, 3e5]
    assert found["a"][-4:] == ["1:30", "2:4", "12e", "1.2.3"]
    assert found["b"][:4] == ["yes", "no", "on", "off"]
    assert found["c"][:2] == ["2026-01-01", "2025-13-01"]
    assert found["yes"] == "no"


def test_a_file_may_repeat_itself(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("stages:\n- &first {kind: finetune, epochs: 2}\n- {<<: *first, kind: distill}\n")
    assert load_spec(path) == {"stages": [{"kind": "finetune", "epochs": 2}, {"kind": "distill", "epochs": 2}]}
