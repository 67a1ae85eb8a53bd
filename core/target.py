"""What a user may ask for in place of settings."""

from pydantic import Field

from core.strict import StrictModel


class Target(StrictModel):
    """How small and fast the student is to be, and how much it is to keep of what its teacher knows."""

    min_retained: float = Field(
        0.97,
        gt=0,
        le=1,
        description="Least share that the form keeps of the teacher's score: of its accuracy, F1, or correlation; of a "
        "language model, of the probability that it gives a token, which is the teacher's perplexity over its own.",
    )
    max_bytes: int | None = Field(
        None, ge=1, description="Most bytes of the form, all its files together.", examples=[10_000_000]
    )
    max_p95_ms: float | None = Field(
        None,
        gt=0,
        description="Time within which it answers 95 of 100 texts, or as a language model reads blocks, one at a time "
        "on the worker's processor, in ms. What is measured must be a tenth faster, as other moments may be slower.",
        examples=[5.0],
    )
    runtime: str = Field(
        "onnxruntime-cpu-2t",
        pattern=r"^onnxruntime-cpu-[1-9]\d?t$",
        description="What will run it, and with how many threads.",
    )
    max_trials: int = Field(8, ge=1, le=100, description="Most students that are trained.")
    max_search_seconds: int | None = Field(
        None, ge=1, description="No new student is trained after so many seconds; what was found until then counts."
    )
