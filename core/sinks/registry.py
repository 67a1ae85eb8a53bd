"""Finds the sinks: each file of this folder that defines one."""

import pkgutil
from functools import cache
from importlib import import_module
from typing import Any

import core.sinks
from core.sinks.sink import Sink


@cache
def list_sinks() -> dict[str, type[Sink]]:
    """Returns the sinks by their kinds."""
    for module in pkgutil.iter_modules(core.sinks.__path__):
        import_module(f"core.sinks.{module.name}")
    return {sink.model_fields["kind"].default: sink for sink in Sink.__subclasses__()}


def find_sink(kind: str, settings: dict[str, Any]) -> Sink:
    """Returns the sink of that kind, with its settings. Raises ValueError for settings that are none of it."""
    return list_sinks()[kind].model_validate(settings)
