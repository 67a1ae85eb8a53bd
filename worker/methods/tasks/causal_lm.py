"""Causal language modelling."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from core.datasets.checking import check_row
from core.methods import RowProblem, Task, Teacher

if TYPE_CHECKING:
    from worker.engine.context import StageContext
    from worker.engine.language import LanguageModelling


class CausalLM(Task):
    """Continues texts, token by token.

    The texts of a split, each with the tokenizer's end token after it, make one stream, which is cut into blocks of
    `block_tokens`; every token but the first is predicted once. With a prompt column only the text after the prompt is
    learned and measured. A row whose column `is_cut` is true has no end token after it.
    """

    forms: ClassVar[tuple[str, ...]] = (
        "safetensors",
        "onnx",
        "onnx_fp16",
        "onnx_int8",
        "onnx_int4",
        "gguf",
        "compressed_tensors",
    )
    graph_types: ClassVar[tuple[str, ...]] = (
        "gemma",
        "gpt2",
        "gpt_neox",
        "llama",
        "mistral",
        "phi3",
        "qwen2",
        "qwen3",
        "smollm3",
    )
    shares_tokens: ClassVar[bool] = True

    kind: Literal["causal_lm"] = "causal_lm"
    text: str = Field("text", description="Column that holds the text, or what follows the prompt.")
    prompt: str | None = Field(None, description="Column that holds the prompt, which is read and not learned.")
    chat: bool = Field(
        False,
        description="Read prompt and text as a user's words and an assistant's answer, in the tokenizer's chat form.",
    )
    block_tokens: int = Field(
        512,
        ge=8,
        le=131_072,
        description="Tokens of one example; at most what the model has positions for. A student hears kept answers if "
        "this is no more than both models have.",
    )

    @model_validator(mode="after")
    def _chat_needs_prompt(self) -> Self:
        if self.chat and self.prompt is None:
            raise PydanticCustomError("chat", "a chat needs the column of what the user says; set task.prompt", {})
        return self

    def stage_defaults(self) -> dict[str, dict[str, Any]]:
        """Returns the losses of a distillation, and that a search leaves the tokens that data lack: to write them."""
        losses = [{"kind": "cross_entropy"}, {"kind": "forward_kl", "temperature": 1.0}]
        return {"distill": {"losses": losses}, "search": {"trim": False}}

    def columns(self) -> dict[str, str]:
        """Returns the columns by role."""
        return {"text": self.text} | ({"prompt": self.prompt} if self.prompt else {})

    def default_stages(self, teacher: Teacher) -> list[dict[str, Any]]:
        """Returns the stages of a spec that names none; a student learns what a teacher behind an API writes."""
        if teacher.api() is None:
            return super().default_stages(teacher)
        learned = [{"kind": "generate"}, {"kind": "finetune", "of": "student"}]
        return [*learned, *super().default_stages(teacher)[-2:]]

    def _default_forms(self) -> list[str]:
        """Returns what every language model has."""
        return ["safetensors"]

    def read_labels(self, row: dict[str, Any]) -> tuple[list[RowProblem], list[str]]:
        """Returns what is wrong with the text and the prompt; they have no labels."""
        wrong = check_row(row, self.text, None)
        if self.prompt and not isinstance(row.get(self.prompt), str):
            found = f"found {row.get(self.prompt)!r:.60}; write the prompt as a string, an empty one where none is"
            wrong.append(RowProblem(found, self.prompt))
        return wrong, []

    def build(self, ctx: "StageContext") -> "LanguageModelling":
        """Returns the language modelling run."""
        from worker.engine.language import LanguageModelling

        return LanguageModelling(ctx, self)
