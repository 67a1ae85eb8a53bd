"""`stillhouse models`."""

from pathlib import Path
from typing import Annotated

import typer

from stillhouse.commands.output import Json, ago, print_fields, print_json, print_table, say, size
from stillhouse.commands.session import connect
from stillhouse.uploads import left_out, model_files

app = typer.Typer(no_args_is_help=True, help="Push, list and delete teacher models.")
Name = Annotated[str, typer.Argument(metavar="MODEL", help="The model's id or name.")]


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A Hugging Face folder: safetensors, config.json and tokenizer.")],
    name: Annotated[str, typer.Argument(help="The name that specs use.")],
    as_json: Json = False,
) -> None:
    """Upload a model folder.

    Weights must be safetensors: formats that can hold code are refused. Files that are no part of a model stay here.

      stillhouse models push ./minilm minilm-l6
    """
    files = model_files(folder)
    for path in left_out(folder, files):
        say(f"not sent: {path}")
    with connect() as client:
        model = client.models.push(folder, name, files=files)
    if as_json:
        print_json(model)
    else:
        say(f"pushed {model.name}: {len(files)} files, {size(model.size_bytes)} ({model.id})")


@app.command("list")
def list_models(as_json: Json = False) -> None:
    """List your models, newest first."""
    with connect() as client:
        models = list(client.models.list())
    if as_json:
        print_json(models)
        return
    rows = [(model.name, size(model.size_bytes), ago(model.created_at), model.id) for model in models]
    print_table(
        ("NAME", "SIZE", "CREATED", "ID"), rows, "No models yet. `stillhouse models push FOLDER NAME` sends one."
    )


@app.command()
def show(name: Name, as_json: Json = False) -> None:
    """Show one model: its architecture and files."""
    with connect() as client:
        model = client.models.get(name)
    if as_json:
        print_json(model)
        return
    print_fields(model.model_dump(exclude={"files"}))
    print_table(("FILE", "SIZE", "SHA256"), [(f.path, size(f.size_bytes), f.sha256) for f in model.files], "")


@app.command()
def delete(name: Name, as_json: Json = False) -> None:
    """Delete a model. Jobs that used it keep their results."""
    with connect() as client:
        client.models.delete(name)
    print_json({"deleted": name}) if as_json else say(f"deleted {name}")
