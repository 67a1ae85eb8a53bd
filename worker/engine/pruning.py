"""Students with parts left out."""

from typing import TYPE_CHECKING, Any

from worker.engine.changes import Reader, compare
from worker.engine.context import StageContext
from worker.engine.narrowing import narrow
from worker.engine.students import choose_layers, keep_layers, load_student, load_student_tokenizer

if TYPE_CHECKING:
    from worker.methods.stages.prune import Prune


def prune(ctx: StageContext, settings: "Prune") -> dict[str, Any]:
    """Leaves parts out of the student, the layers first; returns the stage's summary.

    Raises:
        StageFailed: `spec_invalid` where the architecture cannot have these sizes.
    """
    model, tokenizer = load_student(ctx), load_student_tokenizer(ctx)
    pruned = model
    if settings.num_layers:
        pruned = keep_layers(pruned, choose_layers(ctx, pruned, tokenizer, settings.num_layers, "importance"))
    if settings.is_narrower:
        pruned = narrow(ctx, pruned, tokenizer, settings)
    ctx.task.save_model(pruned, tokenizer, ctx.output("student"))
    return compare(ctx, Reader(model, tokenizer), Reader(pruned, tokenizer))
