"""`stillhouse datasets`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from stillhouse.commands.output import Json, ago, print_fields, print_json, print_table, say
from stillhouse.commands.session import connect, parse_pairs
from stillhouse.errors import InvalidInput

app = typer.Typer(no_args_is_help=True, help="Push, look at and delete data sets.")
Name = Annotated[str, typer.Argument(metavar="DATASET", help="The data set's id or name.")]
File = Annotated[Path | None, typer.Option(help="JSON Lines, CSV or Parquet.")]


@app.command()
def push(
    name: Annotated[str, typer.Argument(help="The name that specs use.")],
    train: File = None,
    validation: File = None,
    test: File = None,
    split: Annotated[list[str] | None, typer.Option(help="Any other split, as name=file; repeatable.")] = None,
    text: Annotated[str | None, typer.Option(help="Column of the text, if not `text`.")] = None,
    label: Annotated[str | None, typer.Option(help="Column of the class, if not `label`.")] = None,
    as_json: Json = False,
) -> None:
    """Upload a data set, one file a split. The server checks every row and names file, line and field of a problem.

    stillhouse datasets push tickets --train train.jsonl --validation validation.jsonl --test test.jsonl
    stillhouse datasets push tickets --train train.csv --split holdout=holdout.parquet
    """
    named = {"train": train, "validation": validation, "test": test}
    splits = {key: path for key, path in named.items() if path is not None}
    splits |= {key: Path(path) for key, path in parse_pairs(split or [], "holdout=holdout.csv").items()}
    if not splits:
        raise InvalidInput("No file was named. Give at least --train FILE.")
    with connect() as client:
        dataset = client.datasets.push(name, splits, text=text, label=label)
    print_json(dataset) if as_json else say(f"pushed {dataset.name}: {', '.join(splits)} ({dataset.id})")


@app.command("list")
def list_datasets(as_json: Json = False) -> None:
    """List your data sets, newest first."""
    with connect() as client:
        datasets = list(client.datasets.list())
    if as_json:
        print_json(datasets)
        return
    rows = [(dataset.name, dataset.id, ago(dataset.created_at)) for dataset in datasets]
    print_table(("NAME", "ID", "CREATED"), rows, "No data sets yet. `stillhouse datasets push` sends one.")


@app.command()
def show(name: Name, as_json: Json = False) -> None:
    """Show one data set: its splits, columns and labels."""
    with connect() as client:
        dataset = client.datasets.get(name)
    if as_json:
        print_json(dataset)
        return
    print_fields({"name": dataset.name, "id": dataset.id, "created": dataset.created_at})
    rows = [
        (name, split.num_rows, split.text_column, split.label_column, len(split.label_counts))
        for name, split in dataset.splits.items()
    ]
    print_table(("SPLIT", "ROWS", "TEXT", "LABEL", "CLASSES"), rows, "")
    for warning in dataset.report.get("warnings", []):
        say(f"warning: {warning.get('message', warning)}")


@app.command()
def preview(
    name: Name,
    split: Annotated[str, typer.Option(help="Which split.")] = "train",
    rows: Annotated[int, typer.Option(min=1, max=100, help="How many rows.")] = 10,
    as_json: Json = False,
) -> None:
    """Show the first rows of a split.

    stillhouse datasets preview tickets --split test --rows 3
    """
    with connect() as client:
        found = client.datasets.preview(name, split, limit=rows)
    if as_json:
        print_json(found)
        return
    for row in found.data:
        typer.echo(json.dumps(row, ensure_ascii=False))


@app.command()
def delete(name: Name, as_json: Json = False) -> None:
    """Delete a data set. Jobs that used it keep their results."""
    with connect() as client:
        client.datasets.delete(name)
    print_json({"deleted": name}) if as_json else say(f"deleted {name}")
