"""Data sets through the API: every format, and everything that can be wrong with a file."""

import io
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.datasets.reading import RowProblem, read_lines
from core.settings import get_settings
from core.storage import get_store
from tests.api import SPLITS, Api, jsonl, num_blobs, rows


def test_a_data_set_is_stored_and_described(api: Api) -> None:
    answer = api.push_dataset()
    assert answer.status_code == 201, answer.text
    assert answer.headers["Location"] == "/v1/datasets/tickets"
    found = answer.json()
    train = found["splits"]["train"]
    assert (train["num_rows"], train["columns"]) == (30, {"text": "string", "label": "string"})
    assert train["label_counts"] == {"delivery": 10, "login": 10, "refund": 10}
    assert found["report"]["warnings"] == []
    for ref in ("tickets", found["id"]):
        assert api("GET", f"/v1/datasets/{ref}").json() == found
    tenant = _tenant_name(api)
    assert api("GET", f"/v1/datasets/{tenant}/tickets").json() == found
    assert api("GET", f"/v1/datasets/{tenant}x/tickets").status_code == 404
    page = api(
        "GET", f"/v1/datasets/{tenant}/tickets/preview", params={"split": "test", "limit": 4, "offset": 3}
    ).json()
    assert page == {"data": rows(9, start=200)[3:7], "num_rows": 9, "next_offset": 7}
    assert api("GET", "/v1/datasets/tickets/preview", params={"split": "tset"}).json()["error"]["param"] == "split"
    assert api("DELETE", "/v1/datasets/tickets").status_code == 204
    assert api("GET", "/v1/datasets/tickets").status_code == 404


def _tenant_name(api: Api) -> str:
    api.push_model("probe")
    return str(api("GET", "/v1/models/probe").json()["name"].split("/")[0])


def test_csv_and_parquet_become_the_same_rows(api: Api) -> None:
    import pyarrow
    from pyarrow import parquet

    found = [{"text": 'a "quoted", long\nticket é', "label": "a"}, {"text": "second", "label": "b"}]
    csv = '\ufefftext,label\r\n"a ""quoted"", long\nticket é",a\r\nsecond,b\r\n'.encode()
    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(found), sink)
    files = [
        ("train", ("t.csv", csv)),
        ("validation", ("v.parquet", sink.getvalue())),
        ("test", ("t.jsonl", jsonl(found))),
    ]
    answer = api("POST", "/v1/datasets", data={"name": "three"}, files=files)
    assert answer.status_code == 201, answer.text
    assert len({split["sha256"] for split in answer.json()["splits"].values()}) == 1


def test_warnings_tell_of_duplicates_leaks_and_imbalance(api: Api) -> None:
    train = jsonl([*rows(60), *rows(60)[:1], *rows(1, ("rare",), 500)])
    answer = api.push_dataset(splits={"train": train, "test": jsonl(rows(3))})
    assert answer.status_code == 201
    found = {(w["split"], w["code"]) for w in answer.json()["report"]["warnings"]}
    assert found == {("train", "duplicates"), ("train", "imbalance"), ("test", "leak")}


GOOD = rows(4710)
WIDE = {f"{n}{'y' * 250}": 1 for n in range(20)}
BAD_FILES = {
    "bad utf-8": (jsonl(rows(4)) + b'{"text": "caf\xe9", "label": "a"}\n', 5, "", "bad UTF-8 at byte 14"),
    "malformed json": (jsonl(rows(2)) + b'{"text": "x", label: "a"}\n', 3, "", "malformed JSON at column"),
    "not an object": (b'["text", "label"]\n', 1, "", "not an object"),
    "NaN": (b'{"text": "x", "label": NaN}\n', 1, "", "NaN is no JSON value"),
    "missing field": (jsonl([*GOOD, {"text": "no label"}]), 4711, "label", "missing field 'label'"),
    "extra field": (jsonl([*rows(3), rows(1)[0] | {"x": 1}]), 4, "x", "unexpected field 'x'"),
    "many extra fields": (
        jsonl([WIDE, WIDE | {str(n): 1 for n in range(100_000)}]),
        2,
        "7",
        "unexpected field '7'",
    ),
    "text no string": (jsonl([*rows(3), {"text": 7, "label": "login"}]), 4, "text", "found integer, not a string"),
    "empty text": (jsonl([*rows(3), {"text": " ", "label": "login"}]), 4, "text", "the text is empty"),
    "huge text": (jsonl([*rows(3), {"text": "x" * 10**6, "label": "login"}]), 4, "text", "1,000,000 characters"),
    "label a list": (jsonl([*rows(3), {"text": "x", "label": ["a"]}]), 4, "label", "found list as label"),
    "surrogate": (jsonl(rows(3)) + b'{"text": "\\ud800", "label": "login"}\n', 4, "", "UTF-8 JSON"),
    "too deep": (b"[" * 100_000 + b"\n", 1, "", "nested too deeply"),
    "deeper than a preview": (
        jsonl(rows(3)) + b'{"text": "x", "label": "a", "m": ' + b"[" * 70 + b"]" * 70 + b"}\n",
        4,
        "",
        "nested too deeply",
    ),
    "empty file": (b"", None, "", "the file is empty"),
    "no rows": (b"\n\n", None, "", "the file has no rows"),
    "one class": (jsonl(rows(9, ("only",))), None, "label", "one class only ('only')"),
    "gzip": (b"\x1f\x8b" + bytes(50), 1, "", "packed with gzip"),
    "parquet inside": (b"PAR1" + bytes(50), 1, "", "a Parquet file, not jsonl"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_with_place_and_cure(api: Api, name: str) -> None:
    data, line, field, message = BAD_FILES[name]
    before = num_blobs()
    answer = api.push_dataset(splits=SPLITS | {"train": data})
    assert answer.status_code == 422, answer.text
    error = answer.json()["error"]
    assert error["code"] == "dataset_invalid"
    match = [d for d in error["details"] if d["line"] == line and d["field"] == field and message in d["message"]]
    assert match, error["details"][:3]
    assert match[0]["file"] == "train.jsonl"
    assert num_blobs() == before
    assert api("GET", "/v1/datasets").json()["data"] == []


CSV_FILES = {
    "cells": (b"text,label\nx,a\ny,b,c\n", 3, "the row has 3 cells and the header 2"),
    "quotes": (b'text,label\nx,a\n"y"z,b\n', 3, "malformed CSV"),
    "utf-8": (b"text,label\nx,a\ncaf\xe9,b\n", 3, "bad UTF-8"),
    "twice": (b"text,text\nx,a\n", 1, "two columns have this name"),
    "twice of many": (b",".join(b"c%d" % n for n in range(200_000)) + b",c7\nx,a\n", 1, "two columns have this name"),
    "nameless": (b"text,\nx,a\n", 1, "a column has no name"),
    "header only": (b"text,label\n", None, "the file has no rows"),
    "a row without end": (
        b"text,label\n" + b'"a\n",' * 3_400_000,
        3_355_445,
        "the row is longer than 16,777,216 bytes",
    ),
}


@pytest.mark.parametrize("name", CSV_FILES)
def test_bad_csv_is_refused(api: Api, name: str) -> None:
    data, line, message = CSV_FILES[name]
    answer = api("POST", "/v1/datasets", data={"name": "x"}, files=[("train", ("t.csv", data))])
    assert answer.status_code == 422
    assert any(d["line"] == line and message in d["message"] for d in answer.json()["error"]["details"]), answer.text


def as_parquet(table: Any) -> bytes:
    from pyarrow import parquet

    sink = io.BytesIO()
    parquet.write_table(table, sink)
    return sink.getvalue()


def test_nested_and_repeated_values_of_parquet_are_those_of_its_own_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow

    monkeypatch.setattr("core.datasets.reading.MAX_ROWS_BYTES", 100_000)

    rows = [
        {
            "text": "same" * 500,
            "labels": ["a", None, "b"] * (n % 3),
            "n": n,
            "at": None,
            "deep": {"x": ["é"], "y": Decimal("1.5")},
        }
        for n in range(2500)
    ]
    kind = pyarrow.map_(pyarrow.string(), pyarrow.string())
    pairs = pyarrow.array([[("a", "é" * n)] * (n % 4) for n in range(2500)], kind)
    table = pyarrow.Table.from_pylist(rows).append_column("pairs", pairs)
    (tmp_path / "t.parquet").write_bytes(as_parquet(table))
    assert [line.row for line in read_lines(tmp_path / "t.parquet", "parquet")] == table.to_pylist()


def test_parquet_that_unpacks_to_far_more_than_was_sent_is_refused(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow

    def repeat(value: Any, times: int) -> Any:
        return pyarrow.DictionaryArray.from_arrays(np.zeros(times, dtype=np.int32), [value])

    def as_table(text: Any, **others: Any) -> bytes:
        return as_parquet(pyarrow.table({"text": text, "label": repeat("a", len(text)), **others}))

    many = pyarrow.ListArray.from_arrays([0, 50_000_001], pyarrow.array(np.zeros(50_000_001, dtype=np.int8)))
    bad = {
        "longer than 16,777,216 bytes": as_table(repeat("x" * 17_000_000, 1024)),
        "values in a row group": as_table(pyarrow.array(["x"]), many=many),
        "JSON Lines": as_table(repeat("x" * 10_000, 5000)),
        "values of a fixed size": as_table(
            pyarrow.array(["x"] * 1024), same=pyarrow.array([b"x" * 65_536] * 1024, pyarrow.binary(65_536))
        ),
    }
    settings = get_settings().model_copy(update={"max_upload_bytes": 1_000_000})
    monkeypatch.setattr("core.datasets.checking.get_settings", lambda: settings)
    for why, data in bad.items():
        assert len(data) < 1_000_000
        answer = api("POST", "/v1/datasets", data={"name": "x"}, files=[("train", ("t.parquet", data))])
        assert answer.status_code == 422, answer.text
        assert why in answer.json()["error"]["message"]


LIMITED = """
import sys
from core.datasets import parquet
parquet.MAX_MEMORY_BYTES = 600 * 1024**2
sys.exit(parquet.main())
"""


@pytest.mark.parametrize("program", [LIMITED, "import os; os.kill(os.getpid(), 9)"], ids=["too large", "killed"])
def test_parquet_is_unpacked_where_it_takes_no_memory_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    import pyarrow
    from pyarrow import parquet

    text = pyarrow.array(["x" * 65_536] * 6000)  # of which the file has next to nothing
    parquet.write_table(
        pyarrow.table({"text": text}),
        tmp_path / "t.parquet",
        compression="zstd",
        use_dictionary=False,
        data_page_size=2**30,
    )
    assert (tmp_path / "t.parquet").stat().st_size < 1_000_000
    monkeypatch.setattr("core.datasets.reading.UNPACK", [sys.executable, "-c", program])
    [line] = read_lines(tmp_path / "t.parquet", "parquet")
    assert line == (1, RowProblem("the file unpacks to more than fits into memory; write it with smaller row groups"))


def test_a_first_row_without_fields_is_refused(api: Api) -> None:
    data = b"{}\n" + jsonl(rows(3))
    answer = api("POST", "/v1/datasets", data={"name": "x"}, files=[("train", ("t.jsonl", data))])
    assert answer.status_code == 422
    assert "line 1: the row has no fields" in answer.json()["error"]["message"]


def test_broken_parquet_is_refused(api: Api) -> None:
    data = b"PAR1" + bytes(100) + b"PAR1"
    answer = api("POST", "/v1/datasets", data={"name": "x"}, files=[("train", ("t.parquet", data))])
    assert answer.status_code == 422
    assert "malformed Parquet" in answer.json()["error"]["message"]


def test_labels_that_train_lacks_are_named(api: Api) -> None:
    answer = api.push_dataset(splits=SPLITS | {"test": jsonl(rows(6, ("refund", "spam")))})
    detail = answer.json()["error"]["details"][0]
    assert (answer.status_code, detail["file"], detail["field"]) == (422, "test.jsonl", "label")
    assert "label 'spam' is not in train" in detail["message"]


def test_many_problems_are_counted_and_twenty_shown(api: Api) -> None:
    bad = jsonl([{"text": "x", "label": "a"}] + [{"text": ""}] * 100)
    error = api.push_dataset(splits={"train": bad}).json()["error"]
    assert len(error["details"]) == 20
    assert "201 problems in all" in error["message"]  # 100 texts and 100 labels, and one class only


def test_columns_may_be_named(api: Api) -> None:
    data = {"train": jsonl([{"utterance": r["text"], "intent": r["label"]} for r in rows(9)])}
    good = api.push_dataset("good", data, text="utterance", label="intent")
    assert good.json()["splits"]["train"]["label_counts"] == {"delivery": 3, "login": 3, "refund": 3}
    bad = api.push_dataset("bad", data, text="utterence")
    assert "did you mean 'utterance'?" in bad.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "files", "param"),
    [
        ({"name": "../x"}, [("train", ("t.jsonl", SPLITS["train"]))], "name"),
        ({}, [("train", ("t.jsonl", SPLITS["train"]))], "name"),
        ({"name": "x", "lable": "y"}, [("train", ("t.jsonl", SPLITS["train"]))], "lable"),
        ({"name": "x"}, [("train", ("t.txt", b"x"))], None),
        ({"name": "x"}, [("train", ("t.jsonl.gz", b"x"))], None),
        ({"name": "x"}, [("tr/ain", ("t.jsonl", SPLITS["train"]))], "tr/ain"),
        ({"name": "x"}, [("train", ("a.jsonl", b"{}")), ("train", ("b.jsonl", b"{}"))], "train"),
    ],
)
def test_bad_forms_are_refused(api: Api, fields: dict, files: list, param: str | None) -> None:
    before = num_blobs()
    answer = api("POST", "/v1/datasets", data=fields, files=files)
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, param), answer.text
    assert num_blobs() == before


def test_a_name_is_given_once_and_the_loser_leaves_nothing(api: Api) -> None:
    assert api.push_dataset().status_code == 201
    before = num_blobs()
    again = api.push_dataset(splits={"train": jsonl(rows(33))})
    assert (again.status_code, again.json()["error"]["code"]) == (409, "conflict")
    assert num_blobs() == before


def test_a_used_data_set_stays(api: Api) -> None:
    job_id = api.make_job()
    answer = api("DELETE", "/v1/datasets/tickets")
    assert answer.status_code == 409
    assert job_id in answer.json()["error"]["message"]
    assert api("DELETE", "/v1/models/minilm").status_code == 409
    api("POST", f"/v1/jobs/{job_id}/cancel")
    assert api("DELETE", "/v1/datasets/tickets").status_code == 204
    assert api("DELETE", "/v1/models/minilm").status_code == 204


@pytest.mark.parametrize("path", ["datasets/tickets", "models/minilm"])
def test_of_two_deletions_at_once_one_finds_nothing(api: Api, path: str) -> None:
    api.push_dataset()
    api.push_model()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: api("DELETE", f"/v1/{path}").status_code, range(8)))
    assert sorted(answers) == [204] + 7 * [404]


def test_a_form_cut_in_the_middle_leaves_nothing(api: Api) -> None:
    boundary = "frontier"
    part = f'--{boundary}\r\nContent-Disposition: form-data; name="train"; filename="t.jsonl"\r\n\r\n'
    body = part.encode() + SPLITS["train"][:200]
    before = num_blobs()
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    answer = api("POST", "/v1/datasets", headers=headers, content=body)
    assert (answer.status_code, num_blobs()) == (422, before)
    assert "cut off" in answer.json()["error"]["message"]
    wrong = api("POST", "/v1/datasets", json={"name": "x"})
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (415, "unsupported_media_type")


def test_lists_page(api: Api) -> None:
    names = [f"d{n}" for n in range(5)]
    for name in names:
        api.push_dataset(name, {"test": jsonl(rows(3))})
    first = api("GET", "/v1/datasets", params={"limit": 3}).json()
    second = api("GET", "/v1/datasets", params={"limit": 3, "after": first["next_cursor"]}).json()
    assert [d["name"] for d in first["data"] + second["data"]] == names[::-1]
    assert second["next_cursor"] is None


def test_rows_whose_bytes_are_gone_are_no_unknown_ones(api: Api) -> None:
    splits = api.push_dataset(splits={"train": jsonl(rows(30, start=9000))}).json()["splits"]
    get_store().drop(splits["train"]["sha256"])
    answer = api("GET", "/v1/datasets/tickets/preview", params={"split": "train"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "blob_damaged"), answer.text


def test_previews_are_bounded(api: Api) -> None:
    long = [{"text": "x" * 90_000 + str(n), "label": str(n % 2)} for n in range(40)]
    api.push_dataset("long", {"train": jsonl(long)})
    seen, offset = 0, 0
    while offset is not None:
        answer = api("GET", "/v1/datasets/long/preview", params={"limit": 100, "offset": offset})
        assert len(answer.content) < 1_200_000
        seen += len(answer.json()["data"])
        offset = json.loads(answer.content)["next_offset"]
    assert seen == 40
