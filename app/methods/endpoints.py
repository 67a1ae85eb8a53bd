"""`/v1/methods`: the shop window, straight from the registry."""

from functools import cache
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, Field, TypeAdapter

from app.deps import Reader
from app.envelope import errors
from core.errors import NotFound
from core.registry import Method, list_families, list_methods
from core.strict import suggest

router = APIRouter(prefix="/v1/methods", tags=["methods"], responses=errors(401, 403, 422, 503))


class MethodView(BaseModel):
    """One method."""

    family: str = Field(examples=["losses"])
    kind: str = Field(examples=["forward_kl"])
    description: str
    defaults: dict[str, Any] = Field(description="Settings that need not be given, with their values.")
    required: list[str] = Field(description="Settings that must be given.")
    json_schema: dict[str, Any] = Field(description="JSON Schema of the settings.")


class MethodList(BaseModel):
    """Every method, by family."""

    data: dict[str, list[MethodView]]


@cache
def _view(cls: type[Method]) -> MethodView:
    fields = cls.model_fields.items()
    defaults = {name: field.get_default(call_default_factory=True) for name, field in fields if not field.is_required()}
    return MethodView(
        family=cls.family,
        kind=cls.model_fields["kind"].default,
        description=cls.__doc__ or "",
        defaults=TypeAdapter(dict[str, Any]).dump_python(defaults, mode="json"),
        required=[name for name, field in fields if field.is_required()],
        json_schema=cls.model_json_schema(),
    )


@router.get("", operation_id="list_methods")
def list_all(_: Reader) -> MethodList:
    """Lists every method that a job spec can name, with its JSON schema and defaults."""
    families = {name: [_view(method) for method in list_methods(name).values()] for name in list_families()}
    return MethodList(data=families)


@router.get("/{family}/{kind}", operation_id="get_method", responses=errors(404))
def get_one(family: str, kind: str, _: Reader) -> MethodView:
    """Shows one method."""
    families = list_families()
    if family not in families:
        raise NotFound(f"There is no family '{family}'; {suggest(family, families)}.")
    methods = list_methods(family)
    if kind not in methods:
        raise NotFound(f"There is no method '{kind}' in '{family}'; {suggest(kind, methods)}.")
    return _view(methods[kind])
