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


def test_metadata_of_jobs_that_are_there_becomes_rows(empty_database) -> None:
    migrations.upgrade("0003")
    with empty_database.begin() as connection:
        connection.execute(text("insert into tenants (id, name) values ('t', 't')"))
        connection.execute(
            text(
                "insert into jobs (id, tenant_id, name, labels, spec, spec_sha256, inputs, queue) "
                """values ('j', 't', '', '{"team": "nlp", "n": "1"}', '{}', '', '{}', 'cpu')"""
            )
        )
    migrations.upgrade()
    with empty_database.begin() as connection:
        found = connection.execute(text("select tenant_id, key, value, job_id from job_labels order by key")).all()
    assert found == [("t", "n", "1", "j"), ("t", "team", "nlp", "j")]


def test_every_row_belongs_to_a_tenant() -> None:
    ownerless = {"tenants"}
    for name, table in db.Base.metadata.tables.items():
        assert name in ownerless or "tenant_id" in table.columns, name
