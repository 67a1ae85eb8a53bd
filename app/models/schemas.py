"""What the model operations answer."""

from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field

from core.models.facts import ModelFacts
from core.storage import ManifestFile


class ModelSummary(BaseModel):
    """A model without its list of files."""

    model_config = ConfigDict(protected_namespaces=())

    id: str = Field(examples=["mdl_0197f0c2a1b37cc0a1b2c3d4e5f60718"])
    name: str = Field(description="`tenant/name`, as job specs may say it.", examples=["acme/minilm-l6"])
    sha256: str = Field(description="Digest of the list of files.")
    size_bytes: int = Field(description="Bytes of all files.")
    num_files: int
    facts: ModelFacts = Field(description="Kind and size, read from config.json and the weights' headers.")
    created_at: datetime


class ModelView(ModelSummary):
    """A model with its files."""

    files: list[ManifestFile]


class ModelPage(BaseModel):
    """A page of models, newest first."""

    data: list[ModelSummary]
    next_cursor: str | None
