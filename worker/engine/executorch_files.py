"""Programs of ExecuTorch, for phones."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.exir.error import ExportError
from executorch.runtime import Runtime
from torch import Tensor
from torch.export import Dim

from core.errors import StageFailed
from worker.engine.context import StageContext
from worker.engine.exporting import Reference, get_reference, measure_agreement, write_companions
from worker.engine.inference import Answer
from worker.engine.tracing import Logits

if TYPE_CHECKING:
    from worker.methods.exporters.executorch import Executorch


def write_executorch(ctx: StageContext, settings: "Executorch", folder: Path) -> dict[str, float]:
    """Writes the student as a program of ExecuTorch, and returns its agreement with the student.

    Raises:
        StageFailed: `export_unsupported` when the graph cannot be exported, `goal_missed` when too few labels agree.
    """
    reference = get_reference(ctx)
    (folder / "model.pte").write_bytes(_lower(ctx, reference))
    write_companions(ctx, reference, folder)
    answers = ctx.task.logits(open_executorch(folder), reference.data, ctx.check_stop)
    return measure_agreement(ctx, reference, answers, "executorch", settings.min_agreement)


def _lower(ctx: StageContext, reference: Reference) -> bytes:
    """Returns the program for one text of any length up to the longest that the tokenizer leaves."""
    batch = next(iter(reference.data.shuffled(1, [0], 0, torch.device("cpu"))))
    names, longest = list(batch.inputs), reference.tokenizer.model_max_length
    wrapper = Logits(reference.model, names, ctx.task.heads).eval()
    num_tokens = Dim("num_tokens", min=2, max=longest)
    try:
        with torch.no_grad():
            program = torch.export.export(
                wrapper, tuple(batch.inputs.values()), dynamic_shapes={"inputs": ({1: num_tokens},) * len(names)}
            )
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    except (ExportError, RuntimeError, TypeError, ValueError) as error:
        message = f"A '{reference.model.config.model_type}' cannot be lowered: {str(error).splitlines()[0]}"
        raise StageFailed("export_unsupported", message, suggestion="Leave the form executorch out.") from error
    return bytes(lowered.buffer)


def open_executorch(folder: Path) -> Answer:
    """Returns the folder's program as a function from inputs to logits, one text after the other."""
    program = Runtime.get().load_program(folder / "model.pte")
    forward = program.load_method("forward")

    def answer(inputs: dict[str, Tensor]) -> Tensor:
        texts = zip(*(ids_BT.split(1) for ids_BT in inputs.values()), strict=True)
        return torch.cat([forward.execute(text)[0].clone() for text in texts])

    return answer
