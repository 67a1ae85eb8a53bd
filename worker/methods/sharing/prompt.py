"""Prompts that are learned."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from core.compressing import Adaptee, Adapter
from core.methods import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from worker.engine.context import StageContext

ENCODERS = ("bert", "roberta", "xlm-roberta", "distilbert", "modernbert")
DECODERS = ("gpt2", "llama", "mistral", "qwen2", "qwen3")


class Prompt(Adapter):
    """Trains vectors that are read before every text, in the place of embeddings of words, and the head.

    A prompt is no weight of the model and cannot become one: the model stays as it is, with the prompt beside it. It
    starts as the embeddings of random words.

    Paper: Lester, Al-Rfou, Constant 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", section 2; starts
    from words: section 3.2 (`SampledVocab`).

    Deviation: of a classifier the head is trained, too, where the paper has a text-to-text model.
    """

    is_merged: ClassVar[bool] = False

    kind: Literal["prompt"] = "prompt"
    tokens: int = Field(20, ge=1, le=1024, description="How many vectors; so many positions are not left for the text.")

    def check_model(self, adaptee: Adaptee) -> list[Problem]:
        """Returns that no prompt is known for such a model, or that it leaves too few positions."""
        start, longest = adaptee.start, adaptee.longest
        known = ENCODERS if adaptee.is_classifier else DECODERS
        if start.model_type not in known:
            why = f"'{start.model_type}' takes no prompt here; known: {', '.join(known)}; or use 'lora'"
            return [Problem("kind", why)]
        room = start.num_positions
        if room is None or self.tokens + longest <= room:
            return []
        why = f"the {adaptee.role} has {room} positions, and {longest} are for the text; choose fewer of either"
        return [Problem("tokens", why)]

    def build(self, ctx: "StageContext") -> Callable[["PreTrainedModel"], Any]:
        """Returns what makes the library's config for a model."""

        def configure(model: "PreTrainedModel") -> Any:
            from peft import PromptTuningConfig

            from worker.engine.adapters import find_head, find_task_type

            # the library adds modules of these two names itself, as a whole
            head = [name for name in find_head(model) if name.partition(".")[0] not in {"classifier", "score"}]
            return PromptTuningConfig(
                task_type=find_task_type(model),
                num_virtual_tokens=self.tokens,
                token_dim=model.config.hidden_size,  # DistilBERT's it does not find
                num_layers=model.config.num_hidden_layers,
                num_attention_heads=model.config.num_attention_heads,
                prompt_tuning_init="SAMPLE_VOCAB",
                modules_to_save=head or None,
            )

        return configure
