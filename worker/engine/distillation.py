"""Distillation from the teacher's answers."""

from typing import TYPE_CHECKING, Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from core.errors import StageFailed
from core.losses import FeatureLoss
from worker.engine.context import StageContext
from worker.engine.features import Features
from worker.engine.objective import Objective, make_term, name_losses
from worker.engine.quantizing import find_grids
from worker.engine.rollouts import Rollouts
from worker.engine.students import load_student, load_student_tokenizer
from worker.engine.teaching import Teaching
from worker.engine.training import Trainer
from worker.engine.uncertainty import find_uncertainty
from worker.engine.watching import Watched

if TYPE_CHECKING:
    from worker.engine.language import LanguageModelling
    from worker.methods.stages.distill import Distill


def distill(ctx: StageContext, settings: "Distill") -> dict[str, Any]:
    """Trains the student on the labels and the teacher's answers; returns the stage's summary."""
    student, tokenizer = load_student(ctx), load_student_tokenizer(ctx)
    teaching = ctx.task.teach(student, tokenizer, settings)
    trainer = make_trainer(ctx, settings, student, tokenizer, teaching)
    teacher_scores = teaching.score(trainer.validation_data)
    summary = trainer.run()
    trainer.save("student")
    if teacher_scores and summary["validation"]:
        compare(ctx, teacher_scores, summary["validation"])
    return {**summary, "teacher_validation": teacher_scores}


def make_trainer(
    ctx: StageContext,
    settings: "Distill",
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    teaching: Teaching,
) -> Trainer:
    """Returns the training of a student that hears these answers."""
    losses = name_losses(settings.losses)
    terms = [make_term(ctx, name, loss) for name, loss in losses.items() if not isinstance(loss, FeatureLoss)]
    compared = [(name, loss) for name, loss in losses.items() if isinstance(loss, FeatureLoss)]
    return Trainer(
        ctx,
        student,
        tokenizer,
        settings,
        Objective(terms, settings.reduction, find_uncertainty(ctx)),
        teaching,
        Features(ctx, compared, Watched(student), teaching.layers) if compared and teaching.layers else None,
        make_rollouts(ctx, student, tokenizer, settings),
        find_grids(ctx),
    )


def make_rollouts(
    ctx: StageContext, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: "Distill"
) -> Rollouts | None:
    """Returns the student's own texts, if it is to learn from them."""
    if settings.on_policy is None:
        return None
    task = cast("LanguageModelling", ctx.task)
    found = task.prompts(ctx.get_split("train"), student, tokenizer, settings.on_policy)
    prompts = [ids for ids in found if len(ids)]
    if not prompts:
        raise StageFailed("dataset_invalid", "No row of the training split has a prompt to go on after.")
    return Rollouts(ctx, prompts, tokenizer, settings.on_policy, settings.batch_size, task.num_common)


def compare(ctx: StageContext, teacher: dict[str, float], student: dict[str, float]) -> None:
    """Warns when the teacher is no better than its student: its answers then teach little."""
    name = ctx.task.headline
    if ctx.task.rank(teacher)[0] <= ctx.task.rank(student)[0]:
        ctx.warn(
            "teacher_no_better",
            f"The teacher's validation {name} ({teacher[name]:.4f}) is no better than the student's "
            f"({student[name]:.4f}); train the teacher longer, or choose a better one.",
            **{f"teacher_{name}": teacher[name], f"student_{name}": student[name]},
        )
