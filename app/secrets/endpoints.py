"""`/v1/secrets`."""

from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Path
from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator
from pydantic_core import PydanticCustomError

from app.deps import DbSession, Reader, Writer
from app.envelope import errors
from core.tenants.models import Secret
from core.tenants.secrets import delete_secret, list_secrets, put_secret

router = APIRouter(prefix="/v1/secrets", tags=["secrets"], responses=errors(401, 403, 422, 503))
Name = Annotated[
    str,
    Path(pattern=r"^[A-Za-z0-9][\w.-]{0,95}$", description="The secret's name.", examples=["openai-key"]),
]


class NewSecret(BaseModel):
    """A secret's value."""

    model_config = ConfigDict(extra="forbid")

    value: SecretStr = Field(
        min_length=1,
        max_length=8192,
        description="What is kept; it cannot be read again.",
        examples=["sk-0123456789"],
        json_schema_extra={"pattern": "^[!-~]+$"},
    )

    @field_validator("value")
    @classmethod
    def _fits_a_header(cls, value: SecretStr) -> SecretStr:
        """A file's last line break is no part of a key; what no HTTP header can hold would fail in a worker."""
        text = value.get_secret_value().strip()
        if not text or not all("!" <= letter <= "~" for letter in text):
            raise PydanticCustomError(
                "secret", "a key is of ASCII's letters, digits and signs, without blanks in it", {}
            )
        return SecretStr(text)


class SecretView(BaseModel):
    """A secret, without its value."""

    name: str
    changed_at: datetime


class SecretList(BaseModel):
    """All secrets of the tenant, by name."""

    data: list[SecretView]


def _view(secret: Secret) -> SecretView:
    return SecretView(name=secret.name, changed_at=secret.changed_at)


@router.get("", operation_id="list_secrets")
def list_all(session: DbSession, principal: Reader) -> SecretList:
    """Lists your tenant's secrets; their values are never shown."""
    return SecretList(data=[_view(secret) for secret in list_secrets(session, principal.tenant_id)])


@router.put("/{secret_name}", operation_id="put_secret", responses=errors(400, 413))
def put(secret_name: Name, new: NewSecret, session: DbSession, principal: Writer) -> SecretView:
    """Stores a secret under a name, in place of an earlier one; a job's spec refers to it by that name."""
    return _view(put_secret(session, principal.tenant_id, secret_name, new.value.get_secret_value()))


@router.delete("/{secret_name}", status_code=204, operation_id="delete_secret", responses=errors(404))
def delete(secret_name: Name, session: DbSession, principal: Writer) -> None:
    """Deletes a secret; a job that needs it fails from then on."""
    delete_secret(session, principal.tenant_id, secret_name)
