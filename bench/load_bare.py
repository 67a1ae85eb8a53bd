"""What the ratios of load.py are to: FastAPI with one route that inserts a row and one that selects one.

Same framework, same server, same Postgres, same sessions as Stillhouse; no keys, no checks, no states.
"""

import json
from typing import Annotated, Any

from fastapi import Body, FastAPI
from sqlalchemy import text

from core.db import session_scope
from core.ids import new_id

TABLE = "create table bare (id text primary key, body jsonb not null)"
INSERT = text("insert into bare (id, body) values (:id, cast(:body as jsonb))")
SELECT = text("select body from bare where id = :id")
app = FastAPI()


def insert_row(body: dict[str, Any]) -> str:
    row = {"id": new_id("row"), "body": json.dumps(body)}
    with session_scope() as session:
        session.execute(INSERT, row)
    return row["id"]


@app.post("/bare", status_code=202)
def insert(body: Annotated[dict[str, Any], Body()]) -> dict[str, Any]:
    return {"id": insert_row(body)}


@app.get("/bare/{row_id}")
def select(row_id: str) -> Any:
    with session_scope() as session:
        return session.execute(SELECT, {"id": row_id}).scalar_one()
