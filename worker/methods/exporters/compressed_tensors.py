"""A folder of compressed-tensors."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from core.agreement import Agreement
from core.methods import Exporter, ModelFacts, Stage

if TYPE_CHECKING:
    from worker.engine.context import StageContext

BITS = (4, 8)


class CompressedTensors(Exporter):
    """Writes a folder with the codes that a `quantize` stage made, of this job or another, for vLLM and `transformers`.

    Matrices of the layers keep their codes of 4 or 8 bits (`pack-quantized`, which llm-compressor writes, too). All
    else is stored in `dtype`; so are embeddings on a grid, as few readers take their codes. The folder is loaded again
    by `transformers` and compared with the student; vLLM is not run. The worker needs the extra `compressed_tensors`.

    vLLM is fast for groups of 32, 64 or 128, or one for all of a row, and for 8 bits only with `symmetric: true`. It
    multiplies by queries, keys and values at once, which must have the same bits: leave `sensitive_share` out for it.
    `transformers` needs the package `compressed-tensors`; a folder whose grids are not symmetric it loads only with
    `quantization_config=CompressedTensorsConfig(dequantize=True)`.
    """

    bytes_per_parameter: ClassVar[float] = 1.0  # 4 bits in the layers, 16 in the embeddings
    model_types: ClassVar[tuple[str, ...]] = (
        "albert",
        "bert",
        "deberta",
        "deberta-v2",
        "distilbert",
        "electra",
        "gemma",
        "llama",
        "mistral",
        "mpnet",
        "phi3",
        "qwen2",
        "qwen3",
        "roberta",
        "smollm3",
        "xlm-roberta",
    )
    is_default: ClassVar[bool] = False
    is_measured: ClassVar[bool] = False

    kind: Literal["compressed_tensors"] = "compressed_tensors"
    dtype: Literal["float16", "float32"] = Field(
        "float16",
        description="Type of all that has no codes. The scales are numbers of half precision, and exact in both.",
    )
    min_agreement: Agreement = 0.99

    def check(self, earlier: list[Stage], base: ModelFacts | None) -> list[str]:
        """Returns whether no stage, or model to start from, has codes that it has a place for."""
        made = next((stage.content() for stage in earlier if stage.kind == "quantize"), {})
        bits = [made["bits"]] if made else base.grid_bits if base else []
        if not bits or {*bits} - {*BITS}:
            whose = "those of 'quantize'" if made else "those of the student's model"
            found = f"{whose} have {min(bits)}" if bits else "no stage makes any"
            return [f"it stores codes of 4 or 8 bits, and {found}; put a 'quantize' with such `bits` before it"]
        if made and made["sensitive_share"] and not made["symmetric"]:
            return ["grids of two sizes are loaded again only if symmetric; set `symmetric` of 'quantize' to true"]
        return []

    def build(self, ctx: "StageContext") -> Callable[[Path], dict[str, float]]:
        """Returns a callable that writes the form into a folder, checks it, and returns what the check measured."""
        from worker.engine.extras import needing

        with needing("compressed_tensors"):
            from worker.engine.compressed_tensors_files import write_compressed_tensors

        return lambda folder: write_compressed_tensors(ctx, self, folder)
