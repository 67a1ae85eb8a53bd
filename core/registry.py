"""The methods that there are: one file, one frozen class, which is request schema, documentation and builder at once.

A file `worker/methods/<family>/<kind>.py` defines one subclass of a family of `core.methods`; defining it registers it.
Nothing here imports those files by name: `discover()` finds them, so that a new method edits no existing file.
"""

import importlib
import pkgutil
from functools import cache
from typing import Any, ClassVar

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from core.strict import StrictModel, suggest

METHODS_PACKAGE = "worker.methods"


class Method(StrictModel):
    """One way to do one thing. Subclasses set `kind: Literal["x"] = "x"` in a file `x.py`."""

    family: ClassVar[str] = ""

    kind: str

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        kind = cls.model_fields["kind"].default
        if isinstance(kind, str):
            _REGISTRY.setdefault(cls.family, {})[kind] = cls


_REGISTRY: dict[str, dict[str, type[Method]]] = {}


@cache
def discover() -> None:
    """Imports every method file once, which registers them."""
    package = importlib.import_module(METHODS_PACKAGE)
    for module in pkgutil.walk_packages(package.__path__, f"{METHODS_PACKAGE}."):
        importlib.import_module(module.name)


def list_families() -> list[str]:
    """Returns the names of all families."""
    discover()
    return sorted(_REGISTRY)


def list_methods(family: str) -> dict[str, type[Method]]:
    """Returns the methods of a family by kind."""
    discover()
    return dict(sorted(_REGISTRY.get(family, {}).items()))


class OneOf:
    """Marks a field typed as a family: its values are any registered method of it, told apart by `kind`.

    The schema is built when it is first used, so that it holds every method that `discover()` finds. With a default,
    `kind` may be left out; with `only`, the name of a flag of the family, it holds those that have it.
    """

    def __init__(self, default: str | None = None, only: str | None = None) -> None:
        self.default, self.only = default, only

    def __get_pydantic_core_schema__(self, source: type[Method], handler: GetCoreSchemaHandler) -> CoreSchema:
        known = {k: cls for k, cls in list_methods(source.family).items() if not self.only or getattr(cls, self.only)}
        choices = {kind: handler.generate_schema(cls) for kind, cls in known.items()}

        def known_kind(value: Any) -> Any:
            if self.default and isinstance(value, dict) and "kind" not in value:
                value = {"kind": self.default, **value}
            kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
            if kind is None:
                names = {"known": ", ".join(choices)}
                raise PydanticCustomError("missing_kind", "the field 'kind' is missing; known: {known}", names)
            if not isinstance(kind, str) or kind not in choices:
                found = {"kind": str(kind), "hint": suggest(str(kind), choices)}
                raise PydanticCustomError("unknown_kind", "unknown kind '{kind}'; {hint}", found)
            return value

        union = core_schema.tagged_union_schema(choices, discriminator="kind")
        return core_schema.no_info_before_validator_function(known_kind, union)
