from collections.abc import Iterator

import pytest

from toolkit.arch.sd import SD
from toolkit.model import Model
from toolkit.world.scenes import World, load_world


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
