import pytest

from toolkit.arch.sd import SD
from toolkit.model import Model


@pytest.fixture
def tiny() -> Model:
    """A random Stable Diffusion model, small enough to sample in a moment."""
    return Model(SD.tiny())
