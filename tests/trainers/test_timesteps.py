from __future__ import annotations

import pytest

from toolkit.runs import seeded
from trainers.timesteps import timesteps


def test_timesteps_are_drawn_as_their_name_says() -> None:
    draw = seeded("test")
    for _ in range(20):
        assert sorted(t // 125 for t in timesteps("stratified", 8, 1000, draw).tolist()) == list(range(8))
    means = {kind: timesteps(kind, 20_000, 1000, draw).double().mean().item() for kind in ("uniform", "stratified", "cubic")}
    assert means == pytest.approx({"uniform": 500, "stratified": 500, "cubic": 750}, abs=12)
