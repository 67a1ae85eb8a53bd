"""`/v1/keys`."""

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Path
from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field

from app.deps import DbSession, KeyKeeper
from app.envelope import errors
from core.tenants.keys import Scope, create_key, list_keys, revoke_key
from core.tenants.models import ApiKey

router = APIRouter(prefix="/v1/keys", tags=["keys"], responses=errors(401, 403, 422, 503))


def _only_text(value: Any) -> Any:
    """Pydantic takes numbers for seconds, or milliseconds, since 1970; nobody means either here."""
    if isinstance(value, int | float):
        raise ValueError("write the time as text, such as 2030-01-31T12:00:00Z")
    return value


class NewKey(BaseModel):
    """A key to make."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(
        min_length=1, max_length=120, pattern=r"^[^\x00]*$", description="What the key is for.", examples=["ci"]
    )
    scopes: list[Scope] = Field(
        ["read", "write"],
        min_length=1,
        max_length=8,
        description="`read` lists and downloads, `write` creates and deletes.",
    )
    expires_at: Annotated[AwareDatetime, BeforeValidator(_only_text)] | None = Field(
        None, description="When the key stops working; never, if not given."
    )


class KeyView(BaseModel):
    """A key, without its text."""

    id: str
    name: str
    scopes: list[str]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None


class CreatedKey(KeyView):
    """A new key with its text, which is shown this once."""

    key: str = Field(description="Send it as `Authorization: Bearer <key>`; it cannot be shown again.")


class KeyList(BaseModel):
    """All keys of the tenant, newest first."""

    data: list[KeyView]


def _view(key: ApiKey) -> KeyView:
    return KeyView.model_validate(key, from_attributes=True)


@router.get("", operation_id="list_keys")
def list_all(session: DbSession, principal: KeyKeeper) -> KeyList:
    """Lists your tenant's keys; their texts are not stored."""
    return KeyList(data=[_view(key) for key in list_keys(session, principal.tenant_id)])


@router.post("", status_code=201, operation_id="create_key", responses=errors(400, 413))
def create(new: NewKey, session: DbSession, principal: KeyKeeper) -> CreatedKey:
    """Makes a key and shows its text, this once."""
    key, text = create_key(session, principal.tenant_id, new.name, list(new.scopes), new.expires_at)
    session.refresh(key)
    return CreatedKey(**_view(key).model_dump(), key=text)


@router.delete("/{key_id}", operation_id="revoke_key", responses=errors(404))
def revoke(
    key_id: Annotated[str, Path(max_length=64, description="The key's id, not its text.")],
    session: DbSession,
    principal: KeyKeeper,
) -> KeyView:
    """Revokes a key at once; revoking it again changes nothing."""
    return _view(revoke_key(session, principal.tenant_id, key_id))
