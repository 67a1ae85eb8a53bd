"""The page of settings tells of all of them, as they are."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from core.settings import Settings, describe

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_page_is_what_the_settings_say() -> None:
    assert PAGE.read_text() == describe(), "run: python -m core.settings > docs/settings.md"
    assert all(field.description for field in Settings.model_fields.values())


def test_a_lease_cannot_run_out_between_two_heartbeats() -> None:
    with pytest.raises(ValidationError, match="at most half of STILLHOUSE_LEASE_S"):
        Settings(lease_s=5)
    assert Settings(lease_s=5, heartbeat_s=2.5).heartbeat_s == 2.5
