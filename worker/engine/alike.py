"""Two models that read texts as the same tokens: the one may then hear what the other says of each, as it comes."""

from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from core.errors import StageFailed
from worker.engine.loading import input_names, is_same_tokenizer, limit_length
from worker.engine.teaching import AnswersOnline, Deletion

if TYPE_CHECKING:
    from worker.engine.classification import Classification
    from worker.engine.context import StageContext
    from worker.engine.multitask import MultiTask
    from worker.methods.stages.distill import Distill

TYPES = "token_type_ids"


def read_alike(
    task: "Classification | MultiTask",
    teacher: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    student: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    max_length: int,
) -> bool:
    """Returns whether two models read every text as the same tokens and inputs; the student then reads no further.

    What it reads is what the teacher is given, which may have fewer places, or take no types where all of them are 0.
    """
    for _, tokenizer in (teacher, student):
        task.settle_tokenizer(tokenizer)
    if not is_same_tokenizer(teacher[1], student[1]):
        return False
    names, own_names = (set(input_names(*reader)) for reader in (student, teacher))
    if names ^ own_names and not (names ^ own_names == {TYPES} and _has_one_type(student[1], pairs=task.reads_pairs)):
        return False
    if names > own_names:
        teacher[0].register_forward_pre_hook(_without_types, with_kwargs=True)
    limit_length(teacher[0], student[1], max_length)
    return True


def _has_one_type(tokenizer: PreTrainedTokenizerBase, *, pairs: bool) -> bool:
    """Returns whether all tokens of an example have type 0, which is what a model takes them for without types."""
    texts = ["a", "a"] if pairs else ["a"]
    return not any(tokenizer(*texts, return_token_type_ids=True)[TYPES])


def _without_types(_: Any, args: tuple[Any, ...], inputs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {name: ids for name, ids in inputs.items() if name != TYPES}


def answer_online(
    task: "Classification | MultiTask",
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: "Distill",
) -> AnswersOnline:
    """Returns a teacher that answers each batch, so that its layers can be compared with the student's.

    Raises:
        StageFailed: `vocab_incompatible` where the two read texts as other tokens.
    """
    ctx = task.ctx
    teacher = ctx.load_teacher()
    if not read_alike(task, (teacher, ctx.load_tokenizer("teacher")), (student, tokenizer), settings.max_length):
        message = "The layers of two models that read texts as other tokens cannot be compared."
        raise StageFailed("vocab_incompatible", message, suggestion="Leave the losses on layers out.")
    return AnswersOnline(ctx, teacher, make_deletion(ctx, settings))


def make_deletion(ctx: "StageContext", settings: "Distill") -> Deletion:
    """Returns which tokens the student does not read."""
    return Deletion(settings.deletion_probability, settings.deletion_epochs, ctx.seed)
