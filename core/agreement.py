"""How far a form must agree with the student that it is made of."""

from typing import Annotated

from pydantic import Field

Agreement = Annotated[
    float,
    Field(
        gt=0,
        le=1,
        description="Least accepted share of validation texts with the student's label, or of tokens that a language "
        "model puts first like the student, or, of a regression, correlation with its numbers.",
    ),
]
