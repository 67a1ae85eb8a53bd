"""Specs from files, and changes to them."""

import pytest

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


@pytest.mark.parametrize("change", ["seed", "=1", "stages.2.epochs=1", "stages.x=1", "teacher.model.x=1", "seed=[1"])
def test_a_change_that_fits_nowhere_is_refused(change: str) -> None:
    with pytest.raises(InvalidInput):
        with_changes(SPEC, [change])


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"a: [1", "neither valid YAML nor JSON"), (b"- 1", "must hold a mapping"), (b"\xff\xfe\xfa", "UTF-8")],
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
