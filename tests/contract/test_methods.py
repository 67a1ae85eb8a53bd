"""What holds for every method of every family."""

import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticUndefined

from core.registry import METHODS_PACKAGE, Method, list_families, list_methods

ROOT = Path(__file__).parents[2]
METHODS = [(family, kind, cls) for family in list_families() for kind, cls in list_methods(family).items()]
every_method = pytest.mark.parametrize(
    ("family", "kind", "cls"), METHODS, ids=[f"{family}/{kind}" for family, kind, _ in METHODS]
)


def test_every_file_is_a_method() -> None:
    files = {
        (path.parent.name, path.stem)
        for path in (ROOT / "worker" / "methods").rglob("*.py")
        if path.name != "__init__.py"
    }
    assert files == {(family, kind) for family, kind, _ in METHODS}


@every_method
def test_the_file_is_named_after_the_kind(family: str, kind: str, cls: type[Method]) -> None:
    assert cls.__module__ == f"{METHODS_PACKAGE}.{family}.{kind}"
    assert cls.family == family
    assert inspect.getdoc(importlib.import_module(cls.__module__))


@every_method
def test_the_docstring_says_what_it_does(family: str, kind: str, cls: type[Method]) -> None:
    text = cls.__dict__.get("__doc__")
    assert text
    assert text.splitlines()[0].endswith((".", ":"))


@every_method
def test_every_field_is_described(family: str, kind: str, cls: type[Method]) -> None:
    for name, field in cls.model_fields.items():
        assert name == "kind" or (field.description and field.description.endswith(".")), name


@every_method
def test_the_schema_is_valid_and_holds_the_defaults(family: str, kind: str, cls: type[Method]) -> None:
    schema = cls.model_json_schema()
    Draft202012Validator.check_schema(schema)
    assert schema["properties"]["kind"]["const"] == kind
    if any(field.is_required() for field in cls.model_fields.values()):
        return
    settings = cls().model_dump(mode="json")
    Draft202012Validator(schema).validate(settings)
    assert cls.model_validate(json.loads(json.dumps(settings))) == cls()


@every_method
def test_what_has_defaults_can_be_left_out(family: str, kind: str, cls: type[Method]) -> None:
    required = [name for name, field in cls.model_fields.items() if field.is_required()]
    if not required:
        assert cls.model_validate({"kind": kind}).kind == kind
        return
    with pytest.raises(ValidationError) as caught:
        cls.model_validate({"kind": kind})
    assert {error["loc"][0] for error in caught.value.errors()} == set(required)


@every_method
def test_it_is_frozen_and_refuses_what_it_does_not_know(family: str, kind: str, cls: type[Method]) -> None:
    with pytest.raises(ValidationError, match="unknown field 'no_such_field'"):
        TypeAdapter(cls).validate_python({"kind": kind, "no_such_field": 1})
    assert cls.model_config["frozen"]


@every_method
def test_a_number_has_bounds(family: str, kind: str, cls: type[Method]) -> None:
    for name, field in cls.model_fields.items():
        if field.annotation in (int, float):
            assert field.metadata, f"{name} takes any number"
        assert field.default is not PydanticUndefined or field.is_required() or field.default_factory, name


def test_finding_the_methods_imports_no_heavy_library() -> None:
    code = (
        "import sys, core.registry; core.registry.discover();"
        "print([n for n in ('torch', 'transformers', 'numpy', 'onnx', 'onnxruntime') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
