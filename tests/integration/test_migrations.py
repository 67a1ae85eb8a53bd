"""Migrations go up, down and up, and end where the tables are declared."""

import pytest
from alembic import command
from sqlalchemy import create_engine, inspect, make_url, text

import migrations
from core import db
from core.settings import get_settings


@pytest.fixture
def empty_database(monkeypatch: pytest.MonkeyPatch):
    """The settings point at a new, empty database for the time of the test."""
    url = make_url(get_settings().database_url)
    name = f"{url.database}_migrations"
    admin = create_engine(url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f'create database "{name}"'))
    engine = create_engine(url.set(database=name))
    monkeypatch.setattr(db, "get_engine", lambda: engine)
    yield engine
    engine.dispose()
    with admin.connect() as connection:
        connection.execute(text(f'drop database "{name}"'))
    admin.dispose()


def test_up_down_up(empty_database) -> None:
    migrations.upgrade()
    assert "jobs" in inspect(empty_database).get_table_names()
    command.downgrade(migrations.get_config(), "base")
    assert set(inspect(empty_database).get_table_names()) <= {"alembic_version"}
    migrations.upgrade()
    command.check(migrations.get_config())


def test_every_row_belongs_to_a_tenant() -> None:
    ownerless = {"tenants"}
    for name, table in db.Base.metadata.tables.items():
        assert name in ownerless or "tenant_id" in table.columns, name
