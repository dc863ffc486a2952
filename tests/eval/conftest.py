from __future__ import annotations

from typing import Any

import pytest
import torch

from eval.cells import Cell, plan
from tests.eval.experiments import smaller
from toolkit.edits.delta import Delta
from toolkit.model import Model
from toolkit.world.oracle import Oracle
from toolkit.world.scenes import World


@pytest.fixture(scope="session")
def untrained() -> Oracle:
    torch.manual_seed(0)
    return Oracle().eval().requires_grad_(False)


@pytest.fixture
def edited(tiny: Model) -> Model:
    """The tiny model with an edit of the layers that read text attached."""
    torch.manual_seed(1)
    deltas: dict[str, Any] = {f"{site}.weight": 0.1 * torch.randn_like(layer.weight) for site, layer in tiny.arch.text_linears().items()}
    tiny.attach(Delta.from_deltas(deltas))
    return tiny


@pytest.fixture(scope="session")
def cells(world: World) -> list[Cell]:
    return plan(world, smaller("main-job", 8))
