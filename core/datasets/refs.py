"""How a spec names data."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from core.methods import SPLITS
from core.strict import StrictModel, one_message

DATA_REF = re.compile(r"^[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,63}$")


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and "/" not in value


def _or_name(schema: dict[str, Any]) -> None:
    whole = dict(schema)
    schema.clear()
    *others, last = whole["properties"]
    used = f"A data set; its {', '.join(others)} and {last} splits are used."
    name = {"type": "string", "description": used}
    names = {"type": "object", "additionalProperties": name, "description": "A data set for each task, by its name."}
    schema |= {"description": whole.get("description", ""), "anyOf": [whole, name, names]}


def _known_form(value: str | dict[str, str]) -> str | dict[str, str]:
    for ref in [value] if isinstance(value, str) else value.values():
        if not DATA_REF.match(ref):
            raise PydanticCustomError("data_ref", "'{ref}' names no split; write 'dataset/split'", {"ref": ref})
    return value


SplitRef = Annotated[
    str | dict[str, str],
    one_message("data_ref", "name a split as 'dataset/split', or one for each task of a 'multi_task'"),
    AfterValidator(_known_form),
]


class TrainingData(StrictModel):
    """The splits to train with, each as `dataset/split`; of several tasks one for each, by its name."""

    model_config = ConfigDict(json_schema_extra=_or_name)

    train: SplitRef = Field(description="Split to train on.", examples=["tickets/train"])
    validation: SplitRef | None = Field(
        None, description="Split to watch while training.", examples=["tickets/validation"]
    )

    @model_validator(mode="before")
    @classmethod
    def _from_names(cls, data: Any) -> Any:
        if isinstance(data, str):
            return {split: f"{data}/{split}" for split in cls.model_fields}
        if isinstance(data, dict) and data and not data.keys() & {*SPLITS} and all(map(_is_name, data.values())):
            return {split: {task: f"{name}/{split}" for task, name in data.items()} for split in cls.model_fields}
        return data

    def refs(self) -> dict[str, str]:
        """Returns the splits by the path of their files, which is `train`, or `train/sentiment` of a task."""
        return {path: ref for split in type(self).model_fields for path, ref in self.refs_of(split).items()}

    def refs_of(self, split: str) -> dict[str, str]:
        """Returns those of one split; nothing if there is none."""
        found: str | dict[str, str] | None = getattr(self, split)
        if isinstance(found, dict):
            return {f"{split}/{task}": ref for task, ref in found.items()}
        return {split: found} if found else {}

    def content(self) -> dict[str, Any]:
        """Returns the splits under names that tell nothing: what is in them is told by their bytes."""
        found: dict[str, Any] = {}
        for path in self.refs():
            split, _, task = path.partition("/")
            found[split] = f"data/{split}" if not task else found.get(split, {}) | {task: f"data/{split}"}
        return found


class DataSpec(TrainingData):
    """The splits to use, each as `dataset/split`; of several tasks one for each, by its name."""

    test: SplitRef | None = Field(None, description="Split to measure on at the end.", examples=["tickets/test"])
