"""What methods do to the embedded model, with fixed seeds. The margins are wide: they catch a method that is broken, and
the measured numbers are those of docs/emoji-sd.md and of the pages that `palimpsest bench` writes.
"""

from __future__ import annotations

import pytest

from eval.rates import Painter
from toolkit.model import Model, load_model
from toolkit.world.oracle import load_oracle


@pytest.fixture(scope="session")
def emoji() -> Model:
    return load_model()


@pytest.fixture(scope="session")
def painter() -> Painter:
    return Painter(load_oracle(), steps=8)


@pytest.fixture(autouse=True)
def nothing_is_left_attached(emoji: Model):
    assert not emoji.edits
    yield
    emoji.detach_all()
