"""Secrets through the API: stored encrypted, told to nobody."""

import pytest
from cryptography.fernet import Fernet
from sqlalchemy import text

from core.db import session_scope
from core.errors import NotFound, Unavailable
from core.settings import get_settings
from core.tenants.secrets import read_secret
from tests.api import Api

VALUE = "sk-very-secret-0123456789"


@pytest.fixture
def keyed(monkeypatch: pytest.MonkeyPatch) -> str:
    key = Fernet.generate_key().decode()
    use_keys(monkeypatch, key)
    return key


def use_keys(monkeypatch: pytest.MonkeyPatch, keys: str | None) -> None:
    monkeypatch.setattr(
        "core.tenants.secrets.get_settings", lambda: get_settings().model_copy(update={"secret_key": keys})
    )


def read(api: Api, name: str) -> str:
    with session_scope() as session:
        return read_secret(session, api.tenant_id, name)


def test_a_secret_is_stored_and_never_shown(api: Api, keyed: str) -> None:
    answers = [api("PUT", "/v1/secrets/openai-key", json={"value": VALUE}), api("GET", "/v1/secrets")]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert [row["name"] for row in answers[1].json()["data"]] == ["openai-key"]
    assert all(VALUE not in answer.text for answer in answers)
    assert read(api, "openai-key") == VALUE
    with session_scope() as session:
        stored = session.scalar(text("select ciphertext from secrets where tenant_id = :id"), {"id": api.tenant_id})
    assert VALUE not in stored
    assert Fernet(keyed).decrypt(stored.encode()).decode() == VALUE
    api("PUT", "/v1/secrets/openai-key", json={"value": "another"})
    assert read(api, "openai-key") == "another"
    assert api("DELETE", "/v1/secrets/openai-key").status_code == 204
    assert api("DELETE", "/v1/secrets/openai-key").status_code == 404
    with pytest.raises(NotFound, match="stillhouse secrets set openai-key"):
        read(api, "openai-key")


@pytest.mark.parametrize("value", ["sk a", "sk\nb", "sk-é", " \n", "sk\x00"])
def test_what_no_header_can_hold_is_refused(api: Api, keyed: str, value: str) -> None:
    answer = api("PUT", "/v1/secrets/openai-key", json={"value": value})
    assert (answer.status_code, answer.json()["error"]["details"][0]["field"]) == (422, "value")
    assert "ASCII" in answer.text
    assert api("GET", "/v1/secrets").json()["data"] == []


@pytest.mark.parametrize("body", [{"Value": VALUE}, {"value": VALUE, "vlaue": VALUE}, VALUE, [VALUE]])
def test_a_secret_in_the_wrong_place_is_not_shown(api: Api, keyed: str, body: object) -> None:
    answer = api("PUT", "/v1/secrets/openai-key", json=body)
    assert answer.status_code == 422
    assert VALUE not in answer.text


def test_the_last_line_break_of_a_file_is_no_part_of_a_key(api: Api, keyed: str) -> None:
    assert api("PUT", "/v1/secrets/openai-key", json={"value": f" {VALUE}\r\n"}).status_code == 200
    assert read(api, "openai-key") == VALUE


def test_another_tenants_secrets_do_not_exist(api: Api, other: Api, keyed: str) -> None:
    assert other("PUT", "/v1/secrets/mine", json={"value": VALUE}).status_code == 200
    assert api("GET", "/v1/secrets").json()["data"] == []
    assert api("DELETE", "/v1/secrets/mine").status_code == 404
    api("PUT", "/v1/secrets/mine", json={"value": "of another tenant"})
    assert read(other, "mine") == VALUE


def test_the_servers_key_can_be_changed(api: Api, keyed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    api("PUT", "/v1/secrets/a", json={"value": VALUE})
    fresh = Fernet.generate_key().decode()
    use_keys(monkeypatch, f"{fresh}, {keyed}")
    assert read(api, "a") == VALUE
    api("PUT", "/v1/secrets/a", json={"value": VALUE})
    use_keys(monkeypatch, fresh)
    assert read(api, "a") == VALUE
    use_keys(monkeypatch, keyed)
    with pytest.raises(Unavailable, match="set it again"):
        read(api, "a")


@pytest.mark.parametrize(("keys", "hint"), [(None, "generate_key"), ("short", "no Fernet key")])
def test_a_server_without_a_key_says_what_to_do(
    api: Api, monkeypatch: pytest.MonkeyPatch, keys: str | None, hint: str
) -> None:
    use_keys(monkeypatch, keys)
    answer = api("PUT", "/v1/secrets/a", json={"value": VALUE})
    assert answer.status_code == 503
    assert hint in answer.json()["error"]["message"]
    assert VALUE not in answer.text


@pytest.mark.parametrize(
    ("name", "body"), [("a", {}), ("a", {"value": ""}), ("a", {"value": "x", "more": 1}), ("..", {"value": VALUE})]
)
def test_bad_input_does_not_echo_the_value(api: Api, keyed: str, name: str, body: dict) -> None:
    answer = api("PUT", f"/v1/secrets/{name}", json=body)
    assert answer.status_code in {404, 405, 422}
    assert VALUE not in answer.text
    long = api("PUT", "/v1/secrets/a", json={"value": VALUE * 1000})
    assert long.status_code == 422
    assert VALUE not in long.text
