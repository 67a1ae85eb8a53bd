"""`stillhouse fsck`, `backup` and `restore`: for the operator, beside the database."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from stillhouse import upkeep
from stillhouse.commands.output import Json, print_json, print_table, say, size, stderr

if TYPE_CHECKING:
    from core.upkeep.checking import Report

PROBLEMS = 1
DataDir = Annotated[
    Path | None,
    typer.Option(
        help="Folder of `stillhouse up`, also while it runs. Default: as there. With STILLHOUSE_DATABASE_URL and "
        "STILLHOUSE_STORAGE_DIR set, those are used instead."
    ),
]


def fsck(
    quick: Annotated[bool, typer.Option("--quick", help="Compare sizes only, without reading the bytes.")] = False,
    repair: Annotated[bool, typer.Option("--repair", help="Move damaged blobs aside. Deletes nothing.")] = False,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Check that every stored byte is there and sound, and that rows and bytes agree. Jobs may run meanwhile.

    --repair moves damaged blobs to the storage's `damaged` folder, where nobody reads them, and changes no row. A blob
    that is moved aside or missing comes back under every row that names it as soon as the same bytes are stored anew:
    upload the model or data set again, or submit the job again. Its stage then runs, because results whose bytes are
    missing are not taken over.

    Exit codes: 0 clean, 1 problems found, 2 nothing to check there, 5 it could not be checked.

    stillhouse fsck
    stillhouse fsck --quick --json
    stillhouse fsck --data-dir /srv/stillhouse --repair
    """
    with _bar("check") as on_progress:
        report = upkeep.check(data_dir, quick=quick, repair=repair, on_progress=on_progress)
    _show(report, as_json)


def backup(
    dest: Annotated[Path, typer.Argument(help="Folder for backups; blobs that it has already are not copied again.")],
    keep: Annotated[int | None, typer.Option(min=1, help="How many of the newest stay there. Default: all.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read what is there already, too, and copy again what is damaged.")
    ] = False,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Back up the database and every stored byte that it refers to, as of one moment. Jobs may run meanwhile.

    Exit codes: 0 fine, 1 made, but the storage lacks bytes, 2 a wrong folder, 5 it could not be made.

    stillhouse backup /mnt/backup/stillhouse
    stillhouse backup /mnt/backup/stillhouse --keep 7 --verify
    """
    with _bar("backup") as on_progress:
        made = upkeep.backup(data_dir, dest.absolute(), keep, on_progress, verify=verify)
    if as_json:
        print_json(made)
    else:
        num_rows = sum(table.num_rows for table in made.tables)
        say(f"made {made.name}: {num_rows} rows, {made.blobs.num_rows} blobs, {size(made.num_bytes)}")
        for sha256 in made.lost:
            say(f"not in it, for the storage does not have its bytes: {sha256}; `stillhouse fsck` says whose they are")
    if made.lost:
        raise typer.Exit(PROBLEMS)


def restore(
    source: Annotated[Path, typer.Argument(help="Folder that `stillhouse backup` wrote to.")],
    name: Annotated[str | None, typer.Option(help="Name of a backup. Default: the newest.")] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder for `stillhouse up`, new or empty. Default: as there. With STILLHOUSE_DATABASE_URL and "
            "STILLHOUSE_STORAGE_DIR set, those are used instead."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Bring a backup back into an empty database and storage, check it, and migrate it to this version.

    Jobs that ran when the backup was made go on as soon as there are workers. An interrupted restore can be run again.

    Exit codes: 0 fine, 1 problems found, 2 no backup there or not empty here, 5 damaged, or it could not be done.

    stillhouse restore /mnt/backup/stillhouse --data-dir /srv/stillhouse
    """
    with _bar("restore") as on_progress:
        report = upkeep.restore(data_dir, source.absolute(), name, on_progress)
    _show(report, as_json)


def _show(report: "Report", as_json: bool) -> None:
    if as_json:
        print_json(report.to_json())
    else:
        rows = [(p.kind, p.subject, p.message, ", ".join(p.places)) for p in report.problems]
        print_table(("PROBLEM", "WITH", "WHAT", "REFERRED TO BY"), rows, "No problems.")
        counts = "".join(f", {number} {kind}" for kind, number in report.counts.items())
        say(f"{report.num_blobs} blobs, {size(report.num_bytes)}{counts}")
        if report.num_put_aside:
            say(f"{report.num_put_aside} damaged blobs moved aside")
        if report.num_in_damaged:
            say(f"{report.num_in_damaged} files in the folder `damaged`: delete them when you need them no more")
    if not report.is_clean:
        raise typer.Exit(PROBLEMS)


@contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a function that is told of bytes done and bytes in all, shown as a bar on a terminal."""
    columns = (TextColumn(title), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    progress = Progress(*columns, console=stderr(), transient=True, disable=not sys.stderr.isatty())
    task = progress.add_task(title, total=None, note="")

    def move(done: int, total: int) -> None:
        progress.update(task, completed=done, total=total, note=f"{size(done)} of {size(total)}")

    with progress:
        yield move
