"""The Compose file describes what the code reads, and Docker's client accepts it."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from core.settings import Settings

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())


def test_every_variable_is_a_setting() -> None:
    names = {f"STILLHOUSE_{name.upper()}" for name in Settings.model_fields}
    used = {key for service in COMPOSE["services"].values() for key in service.get("environment", {})}
    assert {key for key in used if key.startswith("STILLHOUSE_")} <= names


def test_services_volumes_and_health_checks() -> None:
    services = COMPOSE["services"]
    assert {"api", "worker", "postgres", "redis"} <= set(services)
    assert services["api"]["build"]["target"] == "api"
    assert services["worker"]["build"]["target"] == "worker"
    assert all("healthcheck" in services[name] for name in ("postgres", "redis"))
    assert set(COMPOSE["volumes"]) == {"postgres", "data"}


def test_images_have_health_checks_and_no_root() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    for target in ("api", "worker"):
        body = dockerfile.split(f"AS {target}\n")[1].split("\nFROM ")[0]
        assert "HEALTHCHECK" in body
        assert "USER stillhouse" in body
    assert "torch" not in dockerfile.split("AS api\n")[1].split("\nFROM ")[0]


def test_docker_accepts_it() -> None:
    commands = [["docker", "compose"], ["docker-compose"]]
    for command in commands:
        if shutil.which(command[0]) and not subprocess.run([*command, "version"], capture_output=True).returncode:
            done = subprocess.run([*command, "config", "--quiet"], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return
    pytest.skip("neither 'docker compose' nor 'docker-compose' is on this machine")
