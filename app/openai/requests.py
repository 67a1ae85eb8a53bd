"""What OpenAI's client asks for, and the spec that it stands for here."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from core.errors import Invalid

Number = Annotated[float, Field(gt=0, le=10_000)] | Literal["auto"]
Count = Annotated[int, Field(ge=1, le=4096)] | Literal["auto"]


class Strict(BaseModel):
    """A part of a request; what is not known is refused, not ignored."""

    model_config = ConfigDict(extra="forbid")


class Hyperparameters(Strict):
    """How to train; what is `auto` has this server's default."""

    n_epochs: Number = "auto"
    batch_size: Count = "auto"
    learning_rate_multiplier: Number = "auto"


class Supervised(Strict):
    """Fine-tuning on the file."""

    hyperparameters: Hyperparameters = Hyperparameters()


class Distillation(Strict):
    """Learning from another model: `L = CE + λ·T²·KL(teacher‖student)`; `model` is the student."""

    teacher: str = Field(description="The model to learn from, as `model` names one.")
    lambda_kl: float = Field(1.0, gt=0, le=1000, description="λ: the weight of the divergence from the teacher.")
    temperature: float | None = Field(None, gt=0, le=100, description="T; without one the task's default.")
    finetune_teacher: bool = Field(True, description="Train the teacher on the file first.")
    hyperparameters: Hyperparameters = Hyperparameters()


class Method(Strict):
    """`supervised` or `distillation`, with its settings under the same name."""

    type: Literal["supervised", "distillation"] = "supervised"
    supervised: Supervised = Supervised()
    distillation: Distillation | None = None


class FineTuneRequest(Strict):
    """The body that makes a job."""

    model: str = Field(min_length=1, max_length=300)
    training_file: str = Field(max_length=100)
    validation_file: str | None = Field(None, max_length=100)
    suffix: str | None = Field(None, min_length=1, max_length=64, pattern=r"^[\w .:/-]+$")
    seed: int | None = Field(None, ge=0, lt=2**31)
    metadata: dict[str, str] | None = Field(None, max_length=16)
    method: Method = Method()
    hyperparameters: Hyperparameters = Hyperparameters()
    integrations: list[dict[str, Any]] | None = None
    pipeline: dict[str, dict[str, Any]] | list[dict[str, Any]] = Field(
        [], description="Stages of this server after the training, as `{prune: {…}, quantize: {…}}` or as a list."
    )

    def trains(self) -> Hyperparameters:
        """Returns how to train: the older clients say it beside the method."""
        if self.method.distillation is not None and self.method.type == "distillation":
            return self.method.distillation.hyperparameters
        if "method" in self.model_fields_set:
            return self.method.supervised.hyperparameters
        return self.hyperparameters

    def stages(self) -> list[dict[str, Any]]:
        """Returns what comes after the training."""
        if isinstance(self.pipeline, list):
            return self.pipeline
        return [{"kind": kind, **settings} for kind, settings in self.pipeline.items()]


def make_spec(asked: FineTuneRequest, models: dict[str, str], task: dict[str, Any], data: str) -> dict[str, Any]:
    """Returns the spec of a job of this server; `models` maps each model that is named to what specs call it.

    Raises Invalid where a distillation names no teacher.
    """
    training = _settings(asked.trains())
    splits = {"train": f"{data}/train"} | ({"validation": f"{data}/validation"} if asked.validation_file else {})
    spec = {
        "name": asked.suffix or "fine-tune",
        "task": task,
        "data": splits,
        "seed": asked.seed or 0,
        "metadata": asked.metadata or {},
    }
    if asked.method.type == "supervised":
        student = {"kind": "teacher_layers", "keep": [0]}  # which nothing makes, unless the pipeline does
        tune = {"kind": "finetune", **training}
        return spec | {"teacher": {"model": models[asked.model]}, "student": student, "stages": [tune, *asked.stages()]}
    learned = asked.method.distillation
    if learned is None:
        raise Invalid("A distillation names its teacher: method.distillation.teacher.", param="method.distillation")
    divergence = {"kind": "forward_kl", "weight": learned.lambda_kl}
    if learned.temperature is not None:
        divergence["temperature"] = learned.temperature
    first = [{"kind": "finetune", **training}] if learned.finetune_teacher else []
    distil = {"kind": "distill", "losses": [{"kind": "cross_entropy"}, divergence], **training}
    return spec | {
        "teacher": {"model": models[learned.teacher]},
        "student": {"kind": "pretrained", "model": models[asked.model]},
        "stages": [*first, distil, *asked.stages()],
    }


def _settings(found: Hyperparameters) -> dict[str, Any]:
    """The multiplier of the rate needs the default, which the spec's own reading fills in later."""
    names = {"epochs": found.n_epochs, "batch_size": found.batch_size}
    return {name: value for name, value in names.items() if value != "auto"}
