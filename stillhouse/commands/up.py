"""`stillhouse up`."""

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from stillhouse.commands.output import Json, print_json, say, stdout
from stillhouse.errors import ClientError, InvalidInput
from stillhouse.folders import default_data_dir


def up(
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where everything is kept. Default: $STILLHOUSE_DATA_DIR, ~/.local/share/stillhouse, "
            "or /var/lib/stillhouse for root."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: 8500, or the next free one.")] = None,
    workers: Annotated[int, typer.Option(min=0, max=64, help="Worker processes; each runs one job at a time.")] = 1,
    as_json: Json = False,
) -> None:
    """Start the whole stack on this machine and keep it running until Ctrl-C.

    Database, broker, API and workers are children of this process and end with it. With STILLHOUSE_DATABASE_URL or
    STILLHOUSE_REDIS_URL set, those servers are used in place of embedded ones.

    Exit codes: 0 stopped as asked, 2 another instance has the data folder or the port is taken, 5 something failed.

      stillhouse up
      stillhouse up --workers 2 --port 9000
      stillhouse up --data-dir /srv/stillhouse --json
    """
    try:
        from stillhouse.local import AlreadyRunning, LocalError, Options, PortTaken, Stack, stop_on_signals
    except ModuleNotFoundError as error:
        raise ClientError(f"'{error.name}' is not installed. Run: pip install 'stillhouse[local]'") from error
    folder = (data_dir or default_data_dir()).expanduser().absolute()
    stack = Stack(Options(folder, host, port, workers), say)
    stop_on_signals(stack)
    try:
        stack.start()
        if not stack.stopping:
            page = f"{stack.url}/#key={stack.api_key}"  # what follows the # stays in the browser
            facts = {"page": page, "api_key": stack.api_key, "logs": str(stack.logs)}
            _announce(stack.describe() | facts, folder, as_json)
            stack.run()
            say("stopping …")
    except (AlreadyRunning, PortTaken) as error:
        raise InvalidInput(str(error)) from error
    except (LocalError, ModuleNotFoundError) as error:
        raise ClientError(str(error)) from error
    finally:
        stack.stop()


def _announce(facts: dict[str, object], folder: Path, as_json: bool) -> None:
    if as_json:
        print_json(facts)
        return
    console = stdout()
    console.print(Text("Stillhouse is ready.", style="bold green"))
    for name, value in (
        ("page", facts["page"]),
        ("address", f"{facts['url']}    (its reference: {facts['url']}/docs)"),
        ("API key", facts["api_key"]),
        ("data", facts["data_dir"]),
        ("logs", facts["logs"]),
    ):
        console.print(Text(f"  {name:<8} {value}"))
    if folder == default_data_dir().expanduser().absolute():
        how = "The command line on this machine finds it by itself."
    else:
        how = f"For the command line: export STILLHOUSE_DATA_DIR={shlex.quote(str(folder))}"
    console.print(Text(f"{how} Ctrl-C stops it.", style="dim"), soft_wrap=True)
