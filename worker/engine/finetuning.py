"""Fine-tuning on the labels."""

from typing import TYPE_CHECKING, Any

from worker.engine.context import StageContext
from worker.engine.objective import Objective, Term
from worker.engine.optimization import open_pooler
from worker.engine.students import load_student
from worker.engine.training import Trainer
from worker.kernels.divergences import cross_entropy

if TYPE_CHECKING:
    from worker.methods.stages.finetune import Finetune


def finetune(ctx: StageContext, settings: "Finetune") -> dict[str, Any]:
    """Trains the teacher or the student on the labels; returns the stage's summary."""
    model = ctx.load_model("teacher") if settings.of == "teacher" else load_student(ctx)
    tokenizer = ctx.load_tokenizer("student" if settings.of == "student" and ctx.has_input("student") else "teacher")
    if settings.open_pooler and model.has_new_head:
        open_pooler(model)
    term = Term("cross_entropy", 1.0, lambda logits_BC, _, labels_B: cross_entropy(logits_BC, labels_B))
    trainer = Trainer(ctx, model, tokenizer, settings, Objective([term]))
    summary = trainer.run()
    trainer.save(settings.of)
    return summary
