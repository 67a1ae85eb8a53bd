"""API keys: `sk_<id>_<secret>`, shown once, stored as a hash.

A secret has 256 random bits, so a plain SHA-256 suffices: there is nothing to guess from a dictionary.
"""

import hashlib
import hmac
import secrets
from datetime import UTC, datetime, timedelta
from typing import Literal, NamedTuple, get_args

from sqlalchemy import Connection, bindparam, func, or_, select, update
from sqlalchemy.orm import Session

from core.errors import Invalid, NotFound, Unauthenticated
from core.ids import new_id
from core.tenants.models import ApiKey, Tenant

Scope = Literal["read", "write", "keys"]
LAST_USED_STEP = timedelta(minutes=1)  # one write a minute tells enough
SCOPES: tuple[str, ...] = get_args(Scope)
IS_STALE = or_(ApiKey.last_used_at.is_(None), ApiKey.last_used_at < func.now() - LAST_USED_STEP)
FIND = (  # every request asks this, so it is put together once
    select(
        ApiKey.id,
        ApiKey.tenant_id,
        ApiKey.secret_sha256,
        ApiKey.scopes,
        ApiKey.expires_at,
        ApiKey.revoked_at,
        Tenant.name,
        (ApiKey.expires_at <= func.now()).label("expired"),
        IS_STALE.label("stale"),
    )
    .join(Tenant, Tenant.id == ApiKey.tenant_id)
    .where(ApiKey.id == bindparam("key_id"))
)


class Principal(NamedTuple):
    """Who makes a request."""

    tenant_id: str
    tenant_name: str
    key_id: str
    scopes: frozenset[str]


def ensure_tenant(session: Session, name: str) -> Tenant:
    """Returns the tenant of that name, made if it did not exist."""
    tenant = session.scalar(select(Tenant).where(Tenant.name == name))
    if tenant is None:
        tenant = Tenant(id=new_id("tnt"), name=name)
        session.add(tenant)
        session.flush()
    return tenant


def create_key(
    session: Session, tenant_id: str, name: str, scopes: list[str], expires_at: datetime | None = None
) -> tuple[ApiKey, str]:
    """Returns the new key's row and its text, which is shown this once and never stored."""
    unknown = sorted(set(scopes) - set(SCOPES))
    if unknown or not scopes:
        raise Invalid(f"unknown scopes {unknown}; choose among {', '.join(SCOPES)}", param="scopes")
    secret = secrets.token_hex(32)
    key = ApiKey(
        id=new_id("key"),
        tenant_id=tenant_id,
        name=name,
        secret_sha256=_hash(secret),
        scopes=sorted(set(scopes)),
        expires_at=expires_at,
    )
    session.add(key)
    session.flush()
    return key, f"sk_{key.id.removeprefix('key_')}_{secret}"


def authenticate(session: Session | Connection, text: str) -> Principal:
    """Returns who the key's text stands for. Raises Unauthenticated, saying why."""
    parts = text.split("_")
    if len(parts) != 3 or parts[0] != "sk":
        raise Unauthenticated("This is no Stillhouse API key; it should look like sk_<id>_<secret>.")
    row = session.execute(FIND, {"key_id": f"key_{parts[1]}"}).one_or_none()
    if row is None or not hmac.compare_digest(row.secret_sha256, _hash(parts[2])):
        raise Unauthenticated("This API key is unknown.")
    if row.revoked_at is not None:
        raise Unauthenticated("This API key was revoked; ask for a new one.")
    if row.expired:
        raise Unauthenticated(
            f"This API key expired at {row.expires_at.astimezone(UTC):%Y-%m-%d %H:%M} UTC; ask for a new one."
        )
    if row.stale:
        _touch(session, row.id)
    return Principal(row.tenant_id, row.name, row.id, frozenset(row.scopes))


def is_valid(session: Session, key_id: str) -> bool:
    """Tells whether a key that was good still is."""
    is_over = or_(ApiKey.revoked_at.is_not(None), ApiKey.expires_at <= func.now())
    return session.scalar(select(ApiKey.id).where(ApiKey.id == key_id, is_over.is_not(True))) is not None


def _touch(session: Session | Connection, key_id: str) -> None:
    """Notes that a key is in use, unless another request is at it: a thousand at once must not wait in line."""
    free = select(ApiKey.id).where(ApiKey.id == key_id, IS_STALE).with_for_update(skip_locked=True)
    touch = update(ApiKey).where(ApiKey.id == free.scalar_subquery()).values(last_used_at=func.now())
    session.execute(touch, execution_options={"synchronize_session": False})


def sign(session: Session, key_id: str, text: str) -> str:
    """Returns what only this server can make of a text and a key, for addresses that are used without the key itself.

    Raises Unauthenticated where the key is no longer good.
    """
    key = session.get(ApiKey, key_id)
    if key is None or not is_valid(session, key_id):
        raise Unauthenticated()
    return hmac.new(key.secret_sha256.encode(), text.encode(), "sha256").hexdigest()


def list_keys(session: Session, tenant_id: str) -> list[ApiKey]:
    """Returns the tenant's keys, newest first."""
    return list(session.scalars(select(ApiKey).where(ApiKey.tenant_id == tenant_id).order_by(ApiKey.id.desc())))


def revoke_key(session: Session, tenant_id: str, key_id: str) -> ApiKey:
    """Returns the key, now revoked. Raises NotFound."""
    key = session.scalar(
        update(ApiKey)
        .where(ApiKey.tenant_id == tenant_id, ApiKey.id == key_id)
        .values(revoked_at=func.coalesce(ApiKey.revoked_at, func.now()))
        .returning(ApiKey)
    )
    if key is None:
        raise NotFound(f"There is no key '{key_id}' in your tenant.")
    return key  # type: ignore[no-any-return]


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
