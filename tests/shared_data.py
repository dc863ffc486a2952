"""Real photos and files of other tools, which are not part of the project: they lie beside it where it is developed."""

from pathlib import Path

import pytest

from toolkit import registry

FOLDERS = [parent / "shared" / "data" for parent in registry.ROOT.parents]


def shared(name: str) -> Path:
    """A file or folder of these; without them the test is skipped."""
    found = next((folder / name for folder in FOLDERS if (folder / name).exists()), None)
    return found or pytest.skip(f"needs {name}, which is not part of the project")
