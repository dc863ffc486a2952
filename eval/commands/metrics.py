"""palimpsest metrics: what images can be measured by."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser, Namespace
from typing import Any

from toolkit import registry

HELP = "list the metrics: name, what it compares with, paper, options with their defaults"


def add_arguments(parser: ArgumentParser) -> None:
    """No options of its own."""


def run(args: Namespace) -> dict[str, Any]:
    """{"metrics": [{"name", "compares", "paper", "options"}, ...]}"""
    return {"metrics": [_row(name) for name in registry.names("metric")]}


def _row(name: str) -> dict[str, Any]:
    metric = registry.load("metric", name)
    options = {field.name: field.default for field in dataclasses.fields(metric)}
    return {"name": name, "compares": metric.compares, "paper": metric.paper, "options": options}
