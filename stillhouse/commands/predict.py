"""`stillhouse predict`: a downloaded ONNX model on a text, without the server."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from stillhouse.commands.output import Json, print_json, print_table
from stillhouse.errors import ClientError, InvalidInput


def predict(
    folder: Annotated[Path, typer.Argument(help="A downloaded `onnx` or `onnx_int8` folder.")],
    texts: Annotated[
        list[str] | None,
        typer.Argument(help="Texts; without any, one a line from stdin. Of a pair, the second comes after a tab."),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Of a model of several tasks, the one to answer for; all of them without it.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many labels to show of each text.")] = 1,
    as_json: Json = False,
) -> None:
    """Give texts labels, or a number, with a downloaded ONNX model. No server is needed.

    stillhouse predict build/tickets/onnx_int8 "my parcel is late"
    cat tickets.txt | stillhouse predict build/tickets/onnx_int8 --top 3 --json
    """
    if not texts and sys.stdin.isatty():
        raise InvalidInput("No text was given. Write it after the folder, or pipe texts in, one a line.")
    try:
        from stillhouse.classifier import Classifier

        classifier = Classifier(folder)
    except ModuleNotFoundError as error:
        raise ClientError(f"'{error.name}' is not installed. Run: pip install 'stillhouse[predict]'") from error
    try:
        lines = texts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    except UnicodeDecodeError as error:
        raise InvalidInput("What was piped in is not UTF-8 text.") from error
    heads = classifier.choose(task)
    found = [
        (text, name, labels[:top])
        for text in lines
        for name, labels in classifier.classify_all(*text.split("\t", 1)).items()
        if name in heads
    ]
    if as_json:
        print_json(
            [
                {"text": text}
                | ({"task": name} if name else {})
                | {"labels": [{"label": label, heads[name].gives: number} for label, number in labels]}
                for text, name, labels in found
            ]
        )
        return
    rows = [
        (*([name] if name else []), label, f"{number:.3f}", text)
        for text, name, labels in found
        for label, number in labels
    ]
    gives = {head.gives for head in heads.values()}
    number = gives.pop() if len(gives) == 1 else "number"
    print_table((*(["TASK"] if any(heads) else []), "LABEL", number.upper(), "TEXT"), rows, "No text.")
