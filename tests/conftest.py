import pytest

from toolkit.arch.sd import SD
from toolkit.model import Model
from toolkit.world.scenes import World, load_world


@pytest.fixture(scope="session")
def world() -> World:
    return load_world()


@pytest.fixture
def tiny() -> Model:
    """A random Stable Diffusion model, small enough to sample in a moment."""
    return Model(SD.tiny())
