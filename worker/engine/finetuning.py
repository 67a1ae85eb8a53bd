"""Fine-tuning on the labels."""

from typing import TYPE_CHECKING, Any

from worker.engine.context import StageContext
from worker.engine.objective import label_objective
from worker.engine.optimization import open_pooler
from worker.engine.quantizing import find_wanted
from worker.engine.students import load_either
from worker.engine.training import Trainer

if TYPE_CHECKING:
    from worker.methods.stages.finetune import Finetune


def finetune(ctx: StageContext, settings: "Finetune") -> dict[str, Any]:
    """Trains the teacher or the student on the labels; returns the stage's summary."""
    model, tokenizer = load_either(ctx, settings.of)
    if settings.open_pooler and model.has_new_head:
        open_pooler(model)
    wanted = find_wanted(ctx) if settings.of == "student" else None
    trainer = Trainer(ctx, model, tokenizer, settings, label_objective(ctx), wanted=wanted)
    summary = trainer.run()
    trainer.save(settings.of)
    return summary
