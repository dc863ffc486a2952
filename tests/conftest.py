import os
from collections.abc import Iterator

import pytest
import torch

from toolkit.arch.sd import SD
from toolkit.model import Model
from toolkit.world.scenes import World, load_world


def pytest_configure() -> None:
    """Processes that test side by side share the cores."""
    if processes := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(processes)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What tests of a method on an architecture share, they share in one process."""
    for item in items:
        case = getattr(getattr(item, "callspec", None), "params", {}).get("fitted")
        if case is not None:
            item.add_marker(pytest.mark.xdist_group("-".join(case)))


@pytest.fixture(scope="session")
def world() -> World:
    return load_world()


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests compute is not kept in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PALIMPSEST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def tiny() -> Model:
    """A random Stable Diffusion model, small enough to sample in a moment."""
    return Model(SD.tiny())
