"""What the data set operations answer."""

from datetime import datetime
from typing import Any

from pydantic import BaseModel, Field


class SplitView(BaseModel):
    """One split."""

    num_rows: int
    size_bytes: int = Field(description="Bytes as stored, in JSON Lines.")
    sha256: str
    columns: dict[str, str] = Field(description="Column names and the JSON type of their values.")
    text_column: str | None
    label_column: str | None
    label_counts: dict[str, int] = Field(description="Rows of each class; empty without a label column.")


class DatasetView(BaseModel):
    """A data set."""

    id: str = Field(examples=["ds_0197f0c2a1b37cc0a1b2c3d4e5f60718"])
    name: str = Field(examples=["tickets"])
    splits: dict[str, SplitView]
    report: dict[str, Any] = Field(description="What the upload's validation found, with warnings.")
    created_at: datetime


class DatasetPage(BaseModel):
    """A page of data sets, newest first."""

    data: list[DatasetView]
    next_cursor: str | None


class Preview(BaseModel):
    """Some rows of a split."""

    data: list[dict[str, Any]]
    num_rows: int = Field(description="Rows in the whole split.")
    next_offset: int | None = Field(description="Where the next page begins, or null at the end.")
