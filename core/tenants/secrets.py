"""Secrets of a tenant, such as the key of a teacher's API: stored encrypted, and never shown again.

Encryption is Fernet (AES-128-CBC with HMAC-SHA256) of `cryptography`, under the server's `STILLHOUSE_SECRET_KEY`.
"""

from typing import TYPE_CHECKING

from sqlalchemy import delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from core.errors import NotFound, Unavailable
from core.settings import get_settings
from core.tenants.models import Secret

if TYPE_CHECKING:
    from cryptography.fernet import MultiFernet

MAX_LISTED = 1000


def put_secret(session: Session, tenant_id: str, name: str, value: str) -> Secret:
    """Stores a secret, in place of one of that name. Raises Unavailable when this server has no key for secrets."""
    row = {"tenant_id": tenant_id, "name": name, "ciphertext": encrypt(value)}
    statement = insert(Secret).values(row)
    changed = {"ciphertext": statement.excluded.ciphertext, "changed_at": func.now()}
    statement = statement.on_conflict_do_update(index_elements=["tenant_id", "name"], set_=changed)
    return session.scalars(statement.returning(Secret), execution_options={"populate_existing": True}).one()


def list_secrets(session: Session, tenant_id: str) -> list[Secret]:
    """Returns the tenant's secrets by name."""
    query = select(Secret).where(Secret.tenant_id == tenant_id).order_by(Secret.name)
    return list(session.scalars(query.limit(MAX_LISTED)))


def read_secret(session: Session, tenant_id: str, name: str) -> str:
    """Returns a secret's value. Raises NotFound, or Unavailable when it was encrypted under another key."""
    row = session.get(Secret, (tenant_id, name))
    if row is None:
        raise NotFound(f"There is no secret '{name}' in your tenant; set it with `stillhouse secrets set {name}`.")
    return decrypt(row.ciphertext, f"secret '{name}'")


def delete_secret(session: Session, tenant_id: str, name: str) -> None:
    """Deletes a secret. Raises NotFound."""
    statement = delete(Secret).where(Secret.tenant_id == tenant_id, Secret.name == name).returning(Secret.name)
    if session.execute(statement).first() is None:
        raise NotFound(f"There is no secret '{name}' in your tenant.")


def encrypt(value: str) -> str:
    """Returns what only this server can read. Raises Unavailable when it has no key for secrets."""
    return _box().encrypt(value.encode()).decode()


def decrypt(ciphertext: str, what: str) -> str:
    """Returns what was encrypted; `what` names it where it cannot be. Raises Unavailable then."""
    from cryptography.fernet import InvalidToken

    try:
        return _box().decrypt(ciphertext.encode()).decode()
    except InvalidToken as error:
        raise Unavailable(
            f"The {what} was encrypted under a key that this server does not have; set it again."
        ) from error


def _box() -> "MultiFernet":
    """Returns what encrypts with the first of the server's keys, and decrypts with any of them."""
    from cryptography.fernet import Fernet, MultiFernet

    keys = [key.strip() for key in (get_settings().secret_key or "").split(",") if key.strip()]
    if not keys:
        raise Unavailable(
            "This server keeps no secrets, as it has no STILLHOUSE_SECRET_KEY; its operator makes one with "
            '`python -c "from cryptography.fernet import Fernet; print(Fernet.generate_key().decode())"`.'
        )
    try:
        return MultiFernet([Fernet(key) for key in keys])
    except ValueError as error:
        raise Unavailable("STILLHOUSE_SECRET_KEY is no Fernet key: 32 bytes in URL-safe base64.") from error
