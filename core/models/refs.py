"""How a spec names a model."""

import re
from typing import Annotated, NamedTuple

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

MODEL_ROLES = frozenset(
    {"teacher", "base", *(f"{kind}_{number}" for kind in ("teacher", "alone") for number in range(1, 9))}
)
MODEL_REF = re.compile(
    r"^(hub:[\w.-]+/[\w.-]+(@[\w.-]+)?|job:job_[0-9a-f]{32}(/[\w.-]+){0,2}|([\w.-]+/)?[A-Za-z0-9][\w.-]{0,95})$"
)


class ModelSource(NamedTuple):
    """A model that a spec names, the field that does, and the one task of several that it is of, if it is of one."""

    field: str
    ref: str
    part: str | None = None


def _check(value: str) -> str:
    if not MODEL_REF.match(value):
        raise PydanticCustomError(
            "model_ref",
            "'{ref}' names no model; write 'name', 'tenant/name', 'job:<id>' or 'hub:org/name@revision'",
            {"ref": value},
        )
    return value


ModelRef = Annotated[
    str,
    AfterValidator(_check),
    Field(
        description="A model of yours (`name` or `tenant/name`), the output of a job (`job:<id>`, "
        "`job:<id>/<artifact>` or, of several models, `job:<id>/<artifact>/<folder>`), or a hub model "
        "(`hub:org/name@revision`).",
        examples=["acme/minilm-l6", "hub:org/name@main"],
    ),
]
