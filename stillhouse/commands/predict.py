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
    top: Annotated[int, typer.Option(min=1, help="How many labels to show of each text.")] = 1,
    as_json: Json = False,
) -> None:
    """Give texts labels, or a number, with a downloaded ONNX model. No server is needed.

    stillhouse predict build/tickets/onnx_int8 "my parcel is late"
    cat tickets.txt | stillhouse predict build/tickets/onnx_int8 --top 3 --json
    """
    try:
        from stillhouse.classifier import Classifier
    except ModuleNotFoundError as error:
        raise ClientError(f"'{error.name}' is not installed. Run: pip install 'stillhouse[predict]'") from error
    if not texts and sys.stdin.isatty():
        raise InvalidInput("No text was given. Write it after the folder, or pipe texts in, one a line.")
    classifier = Classifier(folder)
    lines = texts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    found = [(text, classifier.classify(*text.split("\t", 1))[:top]) for text in lines]
    if as_json:
        print_json(
            [
                {"text": text, "labels": [{"label": label, classifier.gives: p} for label, p in labels]}
                for text, labels in found
            ]
        )
        return
    rows = [(label, f"{number:.3f}", text) for text, labels in found for label, number in labels]
    print_table(("LABEL", classifier.gives.upper(), "TEXT"), rows, "No text.")
