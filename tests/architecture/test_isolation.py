"""Fresh interpreters show what a process really imports."""

import os
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "onnxruntime", "matplotlib", "sklearn")
WITHOUT_TORCH = (
    "app.main",
    "worker.celery_app",
    "worker.supervisor",
    "core.jobs.spec",
    "stillhouse.cli",
    "stillhouse.client",
)


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_module_imports_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_method_is_found_without_torch() -> None:
    code = f"""
import sys
from core.registry import list_families, list_methods
assert all(list_methods(family) for family in list_families())
print([m for m in {HEAVY!r} if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_client_imports_no_other_room() -> None:
    code = """
import sys, stillhouse.client, stillhouse.cli
print([m for m in sys.modules if m.split('.')[0] in {'app', 'core', 'worker', 'fastapi', 'sqlalchemy', 'celery'}])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("module", "packages"),
    [
        ("app.main", ("opentelemetry.sdk", "opentelemetry.exporter", "opentelemetry.proto")),  # FastAPI needs the rest
        ("worker.celery_app", ("opentelemetry",)),
    ],
)
def test_without_an_endpoint_no_opentelemetry_is_imported(module: str, packages: tuple[str, ...]) -> None:
    code = f"""
import sys, {module}
from core import tracing
tracing.configure('stillhouse')
with tracing.span('request', {{'a': 1}}, kind='server', parent='00-{"1" * 32}-{"1" * 16}-01'):
    tracing.tell({{'b': 1}}, name='other', error='reason')
    tracing.add('phase', 1, 2)
    told = tracing.get_traceparent(), tracing.get_ids()
tracing.flush(1.0)
print(told, [m for m in sys.modules if m.startswith({packages!r})])
"""
    environment = {name: value for name, value in os.environ.items() if name != "STILLHOUSE_OTLP_ENDPOINT"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "(None, {}) []"
