"""palimpsest methods: what there is to erase and to customize with."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from toolkit import registry

HELP = "list the methods: name, kind, architectures, paper, training_free"


def add_arguments(parser: ArgumentParser) -> None:
    """No options of its own."""


def run(args: Namespace) -> dict[str, Any]:
    """{"methods": [{"name", "kind", "architectures", "paper", "training_free"}, ...]}"""
    return {"methods": [_row(name) for name in registry.names("method")]}


def _row(name: str) -> dict[str, Any]:
    method = registry.load("method", name)
    return {
        "name": name,
        "kind": method.kind,
        "architectures": list(method.architectures),
        "paper": method.paper,
        "training_free": method.training_free,
    }
