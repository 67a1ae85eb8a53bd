"""Fine-tuning on the labels."""

from typing import TYPE_CHECKING, Any

from worker.engine import ranks
from worker.engine.context import StageContext
from worker.engine.loading import save_trunk
from worker.engine.objective import label_objective
from worker.engine.optimization import open_pooler
from worker.engine.quantizing import NO_GRIDS, find_grids
from worker.engine.students import load_either
from worker.engine.training import Trainer

if TYPE_CHECKING:
    from worker.methods.stages.finetune import Finetune
    from worker.methods.stages.intermediate import Intermediate


def finetune(ctx: StageContext, settings: "Finetune") -> dict[str, Any]:
    """Trains the teacher or the student on the labels; returns the stage's summary."""
    trainer = make_trainer(ctx, settings)
    summary = trainer.run()
    trainer.save(settings.of)
    return summary


def train_trunk(ctx: StageContext, settings: "Intermediate") -> dict[str, Any]:
    """Trains the teacher or the student on the task of this stage, and keeps its trunk; returns the stage's summary."""
    trainer = make_trainer(ctx, settings)
    summary = trainer.run()
    if ranks.number() == 0:
        save_trunk(trainer.model, trainer.tokenizer, ctx.output(settings.of))
    return summary


def make_trainer(ctx: StageContext, settings: "Finetune") -> Trainer:
    """Returns the training of a model on labels."""
    model, tokenizer = load_either(ctx, settings.of)
    if settings.open_pooler and model.has_new_head:
        open_pooler(model)
    on_grids = find_grids(ctx) if settings.of == "student" else NO_GRIDS
    return Trainer(ctx, model, tokenizer, settings, label_objective(ctx), on_grids=on_grids)
