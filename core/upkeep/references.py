"""Which rows refer to which stored bytes: the one list of roots.

What keeps a reference from being lost:

- Who refers to new bytes has published them, or put their manifest, less than `collect_after_s` ago; either makes them
  as young as that moment.
- Who copies a reference locks the row that it copies from (data set, model, job) until it commits, and who drops a
  reference locks that row, too. So one look at all roots sees the original or the copy.
"""

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, NamedTuple, cast

from sqlalchemy import Connection, text

from core import db
from core.models.refs import MODEL_ROLES
from core.storage import Blob

if TYPE_CHECKING:
    import psycopg

MANIFESTS = f"""
    select manifest_id, tenant_id, 'model ' || id as place from models
    union all
    select manifest_id, tenant_id, 'commit ' || oid || ' to ' || name from commits
    union all
    select manifest_id, tenant_id, 'file ' || id from files where manifest_id is not null
    union all
    select manifest_id, tenant_id, 'part of ' || file_id from file_parts
    union all
    select manifest_id, tenant_id, 'artifact ' || job_id || '/' || name from artifacts
    union all
    select output.value, s.tenant_id, 'stage ' || s.job_id || '/' || s.ordinal || ' ' || output.key
      from stages s join jobs j on j.id = s.job_id cross join lateral jsonb_each_text(s.outputs) output
     where j.deleted_at is null
    union all
    select inputs #>> array[role, 'manifest_id'], tenant_id, role || ' of ' || id
      from jobs cross join unnest(array{sorted(MODEL_ROLES)}) role
     where deleted_at is null and inputs #>> array[role, 'manifest_id'] is not null
"""
BLOBS = """
    select file ->> 'sha256' as sha256, cast(file ->> 'size_bytes' as bigint) as size_bytes, id as manifest_id,
           'manifest ' || id as place
      from manifests cross join lateral jsonb_path_query(files, '$[*]') file
    union all
    select split ->> 'sha256', cast(split ->> 'size_bytes' as bigint), null, 'data set ' || id
      from datasets cross join lateral jsonb_path_query(splits, '$.*') split
    union all
    select split ->> 'sha256', cast(split ->> 'size_bytes' as bigint), null, 'data of ' || id
      from jobs cross join lateral jsonb_path_query(inputs, '$.data.*') split
     where deleted_at is null
    union all
    select s.log_sha256, s.log_size_bytes, null, 'log of ' || s.job_id || '/' || s.ordinal
      from stages s join jobs j on j.id = s.job_id
     where s.log_sha256 is not null and j.deleted_at is null
    union all
    select sha256, size_bytes, null, 'checkpoint ' || job_id || '/' || ordinal || '/' || step from checkpoints
    union all
    select file ->> 'sha256', cast(file ->> 'size_bytes' as bigint), null,
           'checkpoint ' || job_id || '/' || ordinal || '/' || step
      from checkpoints c cross join lateral jsonb_path_query(to_jsonb(c) -> 'finished', '$[*]') file
"""  # a backup may be of a schema from before that column
SORTED_BLOBS = f"""
    select sha256, max(size_bytes) from ({BLOBS}) as blobs
     where sha256 is not null and size_bytes is not null
     group by sha256 order by sha256 collate "C"
"""


class Totals(NamedTuple):
    """How much a list of blobs names."""

    num_blobs: int
    num_bytes: int


@contextmanager
def snapshot() -> Iterator[Connection]:
    """Yields a connection that sees the database as of one moment and can't write."""
    options = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
    with db.get_engine().connect().execution_options(**options) as connection, connection.begin():
        connection.execute(text("set local idle_in_transaction_session_timeout = 0"))  # a large file takes its time
        yield connection


def driver_of(connection: Connection) -> "psycopg.Connection[Any]":
    """Returns the driver's connection, for COPY."""
    return cast("psycopg.Connection[Any]", connection.connection.driver_connection)


def stream_blobs(connection: Connection) -> Generator[Blob]:
    """Yields every blob that a row refers to, once and in order; the server sorts, so nothing is held here."""
    with driver_of(connection).cursor() as cursor, cursor.copy(f"copy ({SORTED_BLOBS}) to stdout") as rows:
        for sha256, size_bytes in rows.rows():
            yield Blob(str(sha256), int(size_bytes))


def list_lines(blobs: Iterable[Blob]) -> Iterator[bytes]:
    """Yields one line a blob, as `read_list` reads them."""
    for sha256, size_bytes in blobs:
        yield f"{sha256}\t{size_bytes}\n".encode()


def read_list(file: IO[bytes]) -> Iterator[Blob]:
    """Yields the blobs of a list from its beginning."""
    file.seek(0)
    for line in file:
        sha256, _, size_bytes = line.partition(b"\t")
        yield Blob(sha256.decode(), int(size_bytes))


def count_list(file: IO[bytes]) -> Totals:
    """Returns how much a list names."""
    num_blobs = num_bytes = 0
    for blob in read_list(file):
        num_blobs += 1
        num_bytes += blob.size_bytes
    return Totals(num_blobs, num_bytes)


def without(stored: Iterable[str], blobs: Iterable[Blob]) -> Iterator[str]:
    """Yields what is stored but none of the blobs; both are in order."""
    wanted = (blob.sha256 for blob in blobs)
    current = next(wanted, "")
    for sha256 in stored:
        while current and current < sha256:
            current = next(wanted, "")
        if current != sha256:
            yield sha256


def find_places(connection: Connection, shas: list[str]) -> dict[str, list[str]]:
    """Returns for each of some blobs the rows that lead to it; a blob without one is left out."""
    query = text(
        f"""
        select blobs.sha256, coalesce(manifests.place, blobs.place)
          from ({BLOBS}) as blobs left join ({MANIFESTS}) as manifests using (manifest_id)
         where blobs.sha256 = any(:shas) order by 1, 2
        """
    )
    places: dict[str, list[str]] = {}
    for sha256, place in connection.execute(query, {"shas": shas}).tuples():
        places.setdefault(sha256, []).append(place)
    return places
