"""A model for KServe."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from worker.methods.exporters.triton import Triton

if TYPE_CHECKING:
    from worker.engine.context import StageContext


class Kserve(Triton):
    """Writes what KServe's Triton runtime serves: `model/` for the storage, and an `InferenceService` to apply.

    Put the folder `model` where the cluster reads, and its address into `storageUri`.

    Source: KServe, "Triton Inference Server runtime".
    """

    kind: Literal["kserve"] = "kserve"  # type: ignore[assignment]
    name: str = Field(
        "model",
        max_length=50,
        pattern=r"^[a-z]([a-z0-9-]*[a-z0-9])?$",
        description="Name of the `InferenceService`: lower-case letters, digits and hyphens.",
    )
    storage_uri: str = Field(
        "s3://your-bucket/models",
        min_length=1,
        max_length=2000,
        pattern=r"^[a-z][a-z0-9+.-]*://[^\s\"]+$",
        description="Where the folder above `model` will be.",
        examples=["gs://acme/models", "pvc://models/tickets"],
    )
    memory: str = Field("1Gi", pattern=r"^[1-9]\d{0,9}(Ki|Mi|Gi)?$", description="Memory that a replica asks for.")
    cpu: str = Field("2", pattern=r"^[1-9]\d{0,5}m?$", description="Processors that a replica asks for.")

    def build(self, ctx: "StageContext") -> Callable[[Path], dict[str, float]]:
        """Returns a callable that writes the folder and returns what the check of the graph measured."""
        from worker.engine.serving import write_kserve

        return lambda folder: write_kserve(ctx, self, folder)
