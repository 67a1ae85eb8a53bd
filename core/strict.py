"""Strict models: what a client may write, and the one clear message where it wrote something else."""

import difflib
from collections.abc import Iterable
from typing import Any, LiteralString

from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError


def suggest(found: str, known: Iterable[str]) -> str:
    """Returns "did you mean …?" for a near miss, else the list of what is known."""
    names = sorted(known)
    near = difflib.get_close_matches(found, names, n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(names)}"


def is_deeper(data: Any, most: int) -> bool:
    """Returns whether lists and mappings lie inside each other on more than so many levels; it goes level by level."""
    level = [data]
    for _ in range(most):
        nested = [node.values() if isinstance(node, dict) else node for node in level if isinstance(node, dict | list)]
        level = [child for children in nested for child in children]
        if not level:
            return False
    return True


class StrictModel(BaseModel):
    """A frozen model that refuses unknown fields and says which known one was probably meant."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    raise PydanticCustomError(
                        "unknown_field",
                        "unknown field '{field}'; {hint}",
                        {"field": str(key), "hint": suggest(str(key), cls.model_fields)},
                    )
        return data


def one_message(type: LiteralString, message: LiteralString) -> WrapValidator:
    """Returns what gives a union one message, where pydantic would give one for each of its types."""

    def validate(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        try:
            return check(value)
        except ValidationError as error:
            raise PydanticCustomError(type, message) from error

    return WrapValidator(validate)
