"""Schema migrations and the one function that runs them."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alembic.config import Config


def get_config() -> "Config":
    """Returns Alembic's configuration of this folder."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    return config


def upgrade(revision: str = "head") -> None:
    """Brings the database of the settings to a revision."""
    from alembic import command

    command.upgrade(get_config(), revision)


def has(revision: str) -> bool:
    """Tells whether there is a revision of that name."""
    from alembic.script import ScriptDirectory

    return revision in {script.revision for script in ScriptDirectory.from_config(get_config()).walk_revisions()}


def head() -> str:
    """Returns the newest revision."""
    from alembic.script import ScriptDirectory

    return ScriptDirectory.from_config(get_config()).get_current_head() or ""
