from collections.abc import Callable
from pathlib import Path

import pytest

from tests.toolkit.ldm import shrink, write_all_configs, write_tiny
from toolkit.model import Model


@pytest.fixture(scope="session")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What toolkit/arch/configs is, for tiny models."""
    return write_all_configs(tmp_path_factory.mktemp("configs"))


@pytest.fixture
def write(configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Model, Path]]:
    """Writes a tiny model of a version into model.safetensors; until the test ends all versions are as small as this."""
    shrink(monkeypatch, configs)
    return lambda version="sd1", dtype="float32": write_tiny(version, configs, tmp_path / "model.safetensors", dtype)
