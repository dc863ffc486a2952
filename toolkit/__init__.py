"""Palimpsest writes concepts into text-to-image diffusion models, erases concepts from them, and measures both.

The names below are imported when they are first used, so that `import toolkit` itself is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolkit.concepts import Concept, CustomizeTask, DebiasTask, EraseTask, MergeTask, Subject
    from toolkit.io.export import export
    from toolkit.io.files import load_edit, save_edit
    from toolkit.model import Model, load_model
    from toolkit.sample import generate

_WHERE = {
    "Concept": "toolkit.concepts",
    "CustomizeTask": "toolkit.concepts",
    "DebiasTask": "toolkit.concepts",
    "EraseTask": "toolkit.concepts",
    "MergeTask": "toolkit.concepts",
    "Subject": "toolkit.concepts",
    "export": "toolkit.io.export",
    "load_edit": "toolkit.io.files",
    "save_edit": "toolkit.io.files",
    "Model": "toolkit.model",
    "load_model": "toolkit.model",
    "generate": "toolkit.sample",
}

__all__ = [
    "Concept",
    "CustomizeTask",
    "DebiasTask",
    "EraseTask",
    "MergeTask",
    "Model",
    "Subject",
    "export",
    "generate",
    "load_edit",
    "load_method",
    "load_model",
    "save_edit",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'toolkit' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def load_method(name: str) -> Any:
    """The class of a method by its name, e.g. `load_method("uce")(lamb=0.1).fit(model, task)`."""
    from toolkit import registry

    return registry.load("method", name)
