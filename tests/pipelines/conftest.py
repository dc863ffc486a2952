import pytest

from tests.pipelines.reference import in_float64, sd14
from toolkit.arch.sd import SD
from toolkit.model import Model


@pytest.fixture
def tiny64() -> Model:
    """`tiny` in float64."""
    return in_float64(SD.tiny())


@pytest.fixture(scope="session")
def real64() -> Model:
    """The layers of Stable Diffusion 1.4 that read text, in float64, behind a shallow text encoder. Nothing else is there."""
    return sd14()


@pytest.fixture(params=["tiny", "sd14"])
def model64(request: pytest.FixtureRequest) -> Model:
    """Each of the two."""
    return request.getfixturevalue({"tiny": "tiny64", "sd14": "real64"}[request.param])
