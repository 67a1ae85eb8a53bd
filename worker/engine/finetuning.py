"""Fine-tuning on the labels."""

from typing import TYPE_CHECKING, Any

from worker.engine.context import StageContext
from worker.engine.objective import label_objective
from worker.engine.optimization import open_pooler
from worker.engine.students import load_student, load_student_tokenizer
from worker.engine.training import Trainer

if TYPE_CHECKING:
    from worker.methods.stages.finetune import Finetune


def finetune(ctx: StageContext, settings: "Finetune") -> dict[str, Any]:
    """Trains the teacher or the student on the labels; returns the stage's summary."""
    if settings.of == "teacher":
        model, tokenizer = ctx.load_model("teacher"), ctx.load_tokenizer("teacher")
    else:
        model, tokenizer = load_student(ctx), load_student_tokenizer(ctx)
    if settings.open_pooler and model.has_new_head:
        open_pooler(model)
    trainer = Trainer(ctx, model, tokenizer, settings, label_objective(ctx))
    summary = trainer.run()
    trainer.save(settings.of)
    return summary
