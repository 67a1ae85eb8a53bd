"""Distillation from the teacher's answers."""

from typing import TYPE_CHECKING, Any

from worker.engine.context import StageContext
from worker.engine.objective import Objective, make_terms
from worker.engine.students import load_student
from worker.engine.training import Trainer

if TYPE_CHECKING:
    from worker.methods.stages.distill import Distill


def distill(ctx: StageContext, settings: "Distill") -> dict[str, Any]:
    """Trains the student on the labels and the teacher's answers; returns the stage's summary."""
    teacher = ctx.load_model("teacher").to(ctx.device)
    if teacher.has_new_head:
        ctx.warn(
            "teacher_untrained",
            "The teacher has no head for these classes: its answers are random. Put a finetune stage before distill.",
        )
    tokenizer = ctx.load_tokenizer("student" if ctx.has_input("student") else "teacher")
    objective = Objective(make_terms(ctx, settings.losses), is_sum=settings.reduction == "sum")
    trainer = Trainer(ctx, load_student(ctx), tokenizer, settings, objective)
    trainer.teacher, trainer.mask_probability = teacher, settings.mask_probability
    teacher_scores = trainer.score_validation(teacher) if trainer.validation_data else None
    summary = trainer.run()
    trainer.save("student")
    if teacher_scores and summary["validation"]:
        compare(ctx, teacher_scores, summary["validation"])
    return {**summary, "teacher_validation": teacher_scores}


def compare(ctx: StageContext, teacher: dict[str, float], student: dict[str, float]) -> None:
    """Warns when the teacher is no better than its student: its answers then teach little."""
    if teacher["accuracy"] <= student["accuracy"]:
        ctx.warn(
            "teacher_no_better",
            f"The teacher's validation accuracy ({teacher['accuracy']:.4f}) is no better than the student's "
            f"({student['accuracy']:.4f}); train the teacher longer, or choose a better one.",
            teacher_accuracy=teacher["accuracy"],
            student_accuracy=student["accuracy"],
        )
