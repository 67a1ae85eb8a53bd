"""Models through the API: what is accepted, what is refused by content, and how bytes come back."""

import hashlib
import io
import json
import pickle
import struct
import zipfile

import pytest

from tests.api import Api, model_files, num_blobs, safetensors


def test_a_model_is_stored_and_comes_back(api: Api) -> None:
    files = model_files()
    answer = api.push_model(files=files)
    assert answer.status_code == 201, answer.text
    found = answer.json()
    assert found["name"].endswith("/minilm")
    assert found["facts"]["num_parameters"] == 60
    assert found["facts"]["num_layers"] == 6
    assert {f["path"]: f["sha256"] for f in found["files"]} == {
        path: hashlib.sha256(data).hexdigest() for path, data in files.items()
    }
    for ref in ("minilm", found["id"], found["name"]):
        assert api("GET", f"/v1/models/{ref}").json() == found
        for path, data in files.items():
            assert api("GET", f"/v1/models/{ref}/files/{path}").content == data
        assert api("HEAD", f"/v1/models/{ref}/download").status_code == 200
    assert [m["name"] for m in api("GET", "/v1/models").json()["data"]] == [found["name"]]
    assert api("GET", "/v1/models/minilm/files/nothing.json").status_code == 404
    assert api.push_model().status_code == 409
    assert api("DELETE", "/v1/models/minilm").status_code == 204
    assert api("GET", "/v1/models/minilm").status_code == 404


class _Evil:
    def __reduce__(self) -> tuple:
        return print, ("executed",)


def _zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(_Evil()))
    return out.getvalue()


def _header(header: object, data: bytes = b"") -> bytes:
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def _tensor(**changes: object) -> bytes:
    return _header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes}, bytes(4))


BAD = {
    "pickle renamed": ({"model.safetensors": pickle.dumps(_Evil())}, "a Python pickle"),
    "old pickle renamed": ({"vocab.txt": pickle.dumps(_Evil(), 0)}, "a Python pickle"),
    "zip renamed": ({"model.safetensors": _zip()}, "a zip archive"),
    "bin": ({"pytorch_model.bin": b"x"}, "not accepted"),
    "python": ({"modeling.py": b"print(1)"}, "not accepted"),
    "hdf5": ({"a.json": b"\x89HDF\r\n"}, "an HDF5 file"),
    "numpy": ({"a.txt": b"\x93NUMPY"}, "a NumPy file"),
    "gguf": ({"model.safetensors": b"GGUF" + bytes(50)}, "a GGUF file"),
    "auto_map": (
        {"config.json": b'{"model_type": "bert", "auto_map": {"AutoModel": "x.Y"}}'},
        "'auto_map' would run code",
    ),
    "nested": (
        {"tokenizer_config.json": b'{"a": [{"trust_remote_code": true}]}'},
        "'trust_remote_code' would run code",
    ),
    "no model_type": ({"config.json": b"{}"}, "no 'model_type'"),
    "quantised": (
        {"config.json": b'{"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}}'},
        "the weights are codes of few bits",
    ),
    "config no json": ({"config.json": b"{"}, "no valid JSON"),
    "config a list": ({"config.json": b"[]"}, "must hold a JSON object"),
    "parent": ({"../evil.json": b"{}"}, "must be relative"),
    "inner parent": ({"a/../../evil.json": b"{}"}, "must be relative"),
    "absolute": ({"/etc/evil.json": b"{}"}, "must be relative"),
    "backslash": ({"a\\..\\b.json": b"{}"}, "must be relative"),
    "text with NUL": ({"vocab.txt": b"a\x00b"}, "no text"),
    "sentencepiece": ({"tokenizer.model": b"\x0a\xff\xff"}, "no sentencepiece model"),
    "short": ({"model.safetensors": b"\x00"}, "no possible header length"),
    "long header": ({"model.safetensors": struct.pack("<Q", 2**40) + b"{}"}, "no possible header length"),
    "header no json": ({"model.safetensors": struct.pack("<Q", 2) + b"{{"}, "no valid JSON"),
    "dtype": ({"model.safetensors": _tensor(dtype="F31")}, "unknown dtype"),
    "negative": ({"model.safetensors": _tensor(shape=[-1])}, "impossible shape"),
    "float side": ({"model.safetensors": _tensor(shape=[1.0])}, "impossible shape"),
    "overflow": ({"model.safetensors": _tensor(shape=[2**62, 2**62])}, "another size"),
    "offsets": ({"model.safetensors": _tensor(data_offsets=[4, 8])}, "gap or overlaps"),
    "cut off": ({"model.safetensors": safetensors({"a": (4, 4)})[:-8]}, "may be cut off"),
    "trailing": ({"model.safetensors": safetensors({"a": (4, 4)}) + b"x"}, "may be cut off"),
    "pickle in place of a length": (
        {"model.safetensors": b"\x80\x02G\0\0\0\0\0{12" + pickle.dumps(_Evil(), 0)},
        "a Python pickle",
    ),
    "large config": ({"config.json": b'{"a": "' + b"x" * 4_200_000 + b'"}'}, "a config.json has at most 4,194,304"),
    "name longer than a disk takes": ({"é" * 130 + ".json": b"{}"}, "the path must be"),
    "no config": ({"config.json": None}, "the file is missing"),
    "no tokenizer": ({"tokenizer.json": None}, "no tokenizer"),
    "no weights": ({"model.safetensors": None}, "no weights"),
    "shard missing": (
        {"model.safetensors": None, "model.safetensors.index.json": b'{"weight_map": {"a": "model-1.safetensors"}}'},
        "the file is missing",
    ),
}


@pytest.mark.parametrize("start", [b"\x80\x02", b"\x80\x05", b"PK"])
def test_a_length_that_begins_as_another_files_magic_is_a_length(api: Api, start: bytes) -> None:
    plain = safetensors({"embeddings": (10, 4), "pooler": (4, 4), "bias": (4,)})
    length, wanted = struct.unpack("<Q", plain[:8])[0], int.from_bytes(start, "little")
    padded = struct.pack("<Q", wanted) + plain[8 : 8 + length] + b" " * (wanted - length) + plain[8 + length :]
    assert padded.startswith(start)
    answer = api.push_model(files=model_files() | {"model.safetensors": padded})
    assert answer.status_code == 201, answer.text


@pytest.mark.parametrize("name", BAD)
def test_bad_models_are_refused_by_content(api: Api, name: str) -> None:
    changes, message = BAD[name]
    files = {path: data for path, data in (model_files() | changes).items() if data is not None}
    before = num_blobs()
    answer = api.push_model(files=files)
    assert answer.status_code == 422, answer.text
    error = answer.json()["error"]
    assert error["code"] == "model_invalid"
    assert any(message in detail["message"] for detail in error["details"]), error
    assert num_blobs() == before
    assert api("GET", "/v1/models").json()["data"] == []


def test_a_file_where_others_have_a_folder_is_refused(api: Api) -> None:
    files = model_files() | {"more.json": b"{}", "more.json/part.json": b"{}"}
    answer = api.push_model("x", files)
    assert answer.status_code == 422
    [detail] = answer.json()["error"]["details"]
    assert (detail["file"], "a folder of this name" in detail["message"]) == ("more.json", True)


def test_a_path_twice_and_stray_fields_are_refused(api: Api) -> None:
    parts = [("files", (path, data)) for path, data in model_files().items()]
    twice = api("POST", "/v1/models", data={"name": "x"}, files=[*parts, parts[0]])
    assert "occurs twice" in twice.json()["error"]["message"]
    stray = api("POST", "/v1/models", data={"name": "x"}, files=[*parts, ("weights", ("a.json", b"{}"))])
    assert stray.json()["error"]["param"] == "weights"
    assert api("POST", "/v1/models", data={"name": "x"}, files=[("files", ("", b""))]).status_code == 422


def test_shards_are_counted_by_their_index(api: Api) -> None:
    files = model_files()
    del files["model.safetensors"]
    files["model-1.safetensors"] = safetensors({"a": (3, 3)})
    files["model-2.safetensors"] = safetensors({"b": (5,)})
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    assert api.push_model(files=files).json()["facts"]["num_parameters"] == 14
    index["weight_map"]["c"] = "model-2.safetensors"
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    assert "tensor 'c' is missing" in api.push_model("again", files).json()["error"]["message"]


def test_real_safetensors_are_read(api: Api) -> None:
    import numpy as np
    from safetensors.numpy import save

    data = save({"w": np.ones((3, 7), np.float16), "empty": np.zeros((0, 4), np.int64), "s": np.array(1, np.float32)})
    answer = api.push_model(files=model_files() | {"model.safetensors": data})
    assert answer.status_code == 201, answer.text
    assert answer.json()["facts"]["num_parameters"] == 22


@pytest.fixture
def url(api: Api) -> str:
    api.push_model()
    return "/v1/models/minilm/files/model.safetensors"


DATA = model_files()["model.safetensors"]
SIZE = len(DATA)
SHA = hashlib.sha256(DATA).hexdigest()


def test_head_equals_get_and_the_etag_is_the_sha256(api: Api, url: str) -> None:
    got, head = api("GET", url), api("HEAD", url)
    assert got.headers["ETag"] == f'"{SHA}"'
    assert {k: v for k, v in head.headers.items() if k != "x-request-id"} == {
        k: v for k, v in got.headers.items() if k != "x-request-id"
    }
    assert (head.content, got.content) == (b"", DATA)
    for tag in (f'"{SHA}"', f'W/"{SHA}"', "*", f'"x", "{SHA}"'):
        same = api("GET", url, headers={"If-None-Match": tag})
        assert (same.status_code, same.content) == (304, b"")
    assert api("GET", url, headers={"If-None-Match": '"x"'}).status_code == 200


@pytest.mark.parametrize(
    ("header", "start", "end"),
    [
        ("bytes=0-9", 0, 10),
        ("bytes=10-", 10, SIZE),
        ("bytes=-7", SIZE - 7, SIZE),
        (f"bytes=5-{SIZE * 9}", 5, SIZE),
        (f"bytes=-{SIZE * 9}", 0, SIZE),
        (f"bytes=0-0,{SIZE}-", 0, 1),
    ],
)
def test_one_range_is_206(api: Api, url: str, header: str, start: int, end: int) -> None:
    answer = api("GET", url, headers={"Range": header})
    assert answer.status_code == 206
    assert answer.content == DATA[start:end]
    assert answer.headers["Content-Range"] == f"bytes {start}-{end - 1}/{SIZE}"
    assert int(answer.headers["Content-Length"]) == end - start


def test_several_ranges_are_multipart(api: Api, url: str) -> None:
    answer = api("GET", url, headers={"Range": "bytes=0-3, 8-9,-2"})
    assert answer.status_code == 206
    assert int(answer.headers["Content-Length"]) == len(answer.content)
    boundary = answer.headers["Content-Type"].split("boundary=")[1].encode()
    parts = [
        part.split(b"\r\n\r\n", 1)[1].removesuffix(b"\r\n") for part in answer.content.split(b"--" + boundary)[1:-1]
    ]
    assert parts == [DATA[0:4], DATA[8:10], DATA[-2:]]


@pytest.mark.parametrize(
    "headers",
    [
        {"Range": "lines=0-9"},
        {"Range": "bytes=a-9"},
        {"Range": "bytes=9-5"},
        {"Range": "bytes=-"},
        {"Range": "bytes=" + ",".join(["0-1"] * 6)},
        {"Range": "bytes=" + ",".join(["0-1"] * 5000)},
        {"Range": "bytes=0-1", "If-Range": '"stale"'},
        {"Range": "bytes=0-1", "If-Range": "Wed, 21 Oct 2015 07:28:00 GMT"},
        {"Range": f"bytes=0-{SIZE},0-{SIZE}"},
    ],
)
def test_other_ranges_give_the_whole_file(api: Api, url: str, headers: dict) -> None:
    answer = api("GET", url, headers=headers)
    assert (answer.status_code, answer.content) == (200, DATA)


def test_if_range_with_the_current_etag_resumes(api: Api, url: str) -> None:
    answer = api("GET", url, headers={"Range": "bytes=4-", "If-Range": f'"{SHA}"'})
    assert (answer.status_code, answer.content) == (206, DATA[4:])


@pytest.mark.parametrize("header", [f"bytes={SIZE}-", "bytes=-0", f"bytes={SIZE}-{SIZE + 5},-0"])
def test_ranges_outside_are_416(api: Api, url: str, header: str) -> None:
    answer = api("GET", url, headers={"Range": header})
    assert (answer.status_code, answer.headers["Content-Range"]) == (416, f"bytes */{SIZE}")
    assert answer.json()["error"]["code"] == "range_not_satisfiable"


def test_html_never_runs_as_a_page_of_the_server(api: Api) -> None:
    api.push_model()
    headers = api("GET", "/v1/models/minilm/files/README.md").headers
    assert headers["Content-Disposition"].startswith("attachment")
    assert headers["Content-Security-Policy"] == "sandbox"
    assert headers["X-Content-Type-Options"] == "nosniff"
