"""Compares every row with the bytes that it names, and every blob with the rows that name it."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from tempfile import TemporaryFile
from typing import IO, Any, Literal, NamedTuple

from sqlalchemy import Connection, text

from core.settings import get_settings
from core.storage import SHA256, ArtifactStore, Blob
from core.upkeep.lock import keeping
from core.upkeep.references import (
    BLOBS,
    MANIFESTS,
    count_list,
    find_places,
    list_lines,
    read_list,
    snapshot,
    stream_blobs,
    without,
)

Kind = Literal["missing", "damaged", "orphaned", "impossible"]
Progress = Callable[[int, int], None]  # bytes done, bytes in all
MAX_NAMED = 1_000  # problems of one kind that are named; more are counted

# Each query returns what is wrong; the text says what is wrong with it.
IMPOSSIBLE = {
    "refers to a manifest that does not exist": f"""
        select roots.place || ': ' || roots.manifest_id from ({MANIFESTS}) as roots
          left join manifests on manifests.id = roots.manifest_id where manifests.id is null""",
    "refers to a manifest of another tenant": f"""
        select roots.place || ': ' || roots.manifest_id from ({MANIFESTS}) as roots
          join manifests on manifests.id = roots.manifest_id where manifests.tenant_id <> roots.tenant_id""",
    "is not the manifest that its sha256 and size name": """
        select id from manifests cross join lateral (
            select coalesce(string_agg(line, '' order by line collate "C"), '') as lines, coalesce(sum(size), 0) as size
              from (select (file ->> 'sha256') || '  ' || (file ->> 'path') || chr(10) as line,
                           cast(file ->> 'size_bytes' as bigint) as size
                      from jsonb_path_query(files, '$[*]') file) as files) as content
         where encode(sha256(convert_to(lines, 'UTF8')), 'hex') <> sha256 or size <> size_bytes""",
    "names no blob, or none of a size": f"""
        select place from ({BLOBS}) as blobs where (sha256 ~ '^[0-9a-f]{{64}}$' and size_bytes >= 0) is not true""",
    "has two sizes in different rows": f"""
        select sha256 from ({BLOBS}) as blobs group by sha256 having min(size_bytes) <> max(size_bytes)""",
    "is of a stage that does not exist": """
        select 'checkpoint ' || job_id || '/' || ordinal || '/' || step from checkpoints c
         where not exists (select from stages s where s.job_id = c.job_id and s.ordinal = c.ordinal)""",
    "succeeded without one of its stages": """
        select id from jobs where state = 'succeeded' and deleted_at is null
           and exists (select from stages s where s.job_id = id and s.state not in ('succeeded', 'cached'))""",
    "has gaps in its events": """
        select id from jobs
          left join (select job_id, count(*) as n, max(seq) as last from events group by job_id) as seen on job_id = id
         where deleted_at is null and (coalesce(n, 0) <> event_seq or coalesce(last, 0) <> event_seq)""",
}


class Problem(NamedTuple):
    """Something wrong: with a blob, which `places` lead to, or with a row."""

    kind: Kind
    subject: str
    message: str
    places: list[str]


@dataclass
class Report:
    """What a check looked at and found; of many problems of one kind the first are named, and all are counted."""

    num_blobs: int
    num_bytes: int
    problems: list[Problem] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    num_put_aside: int = 0
    num_in_damaged: int = 0

    @property
    def is_clean(self) -> bool:
        """Whether nothing is wrong."""
        return not self.counts

    def add(self, kind: Kind, subject: str, message: str) -> None:
        """Adds a problem."""
        self.counts[kind] += 1
        if self.counts[kind] <= MAX_NAMED:
            self.problems.append(Problem(kind, subject, message, []))

    def to_json(self) -> dict[str, Any]:
        """Returns the report as JSON shows it."""
        problems = [problem._asdict() for problem in self.problems]
        return asdict(self) | {"problems": problems, "counts": dict(self.counts), "is_clean": self.is_clean}


def check(
    store: ArtifactStore, *, quick: bool = False, repair: bool = False, on_progress: Progress = lambda *_: None
) -> Report:
    """Returns what is wrong with rows and bytes; nobody deletes bytes meanwhile, all else goes on.

    Args:
        store: The storage of the settings' database.
        quick: Compares sizes only; bytes are not read.
        repair: Moves damaged blobs to `<root>/damaged`. No row is changed and nothing deleted: a damaged blob becomes a
            missing one, which can be stored anew, and the stage cache does not offer what is missing.
        on_progress: Is told of bytes that were looked at.
    """
    with keeping(), TemporaryFile() as names:
        before = store.now() - get_settings().collect_after_s
        with snapshot() as connection:
            names.writelines(list_lines(stream_blobs(connection)))
            report = Report(*count_list(names))
            for subject, message in list_impossible(connection):
                report.add("impossible", subject, message)
        _check_blobs(store, names, report, quick=quick, repair=repair, on_progress=on_progress)
        for sha256 in without(store.list_blobs(), read_list(names)):
            if store.is_older(sha256, before):
                report.add("orphaned", sha256, "no row refers to it; the next collection deletes it")
        with snapshot() as connection:
            _find_places(connection, report)
    report.num_in_damaged = store.count_damaged()
    return report


def list_impossible(connection: Connection) -> Iterator[tuple[str, str]]:
    """Yields rows that cannot be, each with what is wrong."""
    for message, query in IMPOSSIBLE.items():
        for subject in connection.scalars(text(query)):
            yield str(subject), message


def judge(store: ArtifactStore, blob: Blob, *, quick: bool) -> tuple[Kind, str] | None:
    """Returns what is wrong with a blob, or None. Raises PermissionError for bytes that we may not read."""
    try:
        sha256, size_bytes = store.measure(blob.sha256, quick=quick)
    except FileNotFoundError:
        return "missing", "the storage does not have it"
    except PermissionError:
        raise
    except OSError as error:
        return "damaged", f"it cannot be read: {error.strerror}"
    if sha256 != blob.sha256:
        return "damaged", f"its bytes have the sha256 {sha256[:12]}…"
    if size_bytes != blob.size_bytes:
        return "damaged" if quick else "impossible", f"it has {size_bytes} bytes, and its row says {blob.size_bytes}"
    return None


def _check_blobs(
    store: ArtifactStore, names: IO[bytes], report: Report, *, quick: bool, repair: bool, on_progress: Progress
) -> None:
    done = 0
    for blob in read_list(names):
        if wrong := judge(store, blob, quick=quick):
            report.add(wrong[0], blob.sha256, wrong[1])
            if repair and wrong[0] == "damaged" and store.put_aside(blob.sha256):
                report.num_put_aside += 1
        done += blob.size_bytes
        on_progress(done, report.num_bytes)


def _find_places(connection: Connection, report: Report) -> None:
    """Adds who refers to a blob with which something is wrong; one whose rows are gone meanwhile is no problem."""
    named = [p for p in report.problems if p.kind != "orphaned" and SHA256.fullmatch(p.subject)]
    places = find_places(connection, [problem.subject for problem in named]) if named else {}
    gone = [problem for problem in named if problem.subject not in places]
    report.counts -= Counter(problem.kind for problem in gone)
    report.problems = [
        problem._replace(places=places.get(problem.subject, [])) for problem in report.problems if problem not in gone
    ]
