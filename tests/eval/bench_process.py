"""The bench command in a process of its own, on a tiny random model: python -m tests.eval.bench_process FILE --out DIR ..."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

import eval.commands.bench
import eval.commands.evaluate
import eval.rates
import toolkit.world.oracle
import trainers.method
from eval.prompts import Prompt
from eval.rates import Painter, Shown
from tests.eval.images import reading, true_reading
from toolkit import cli
from toolkit.arch.sd import SD
from toolkit.model import Model
from toolkit.sample import Hook
from toolkit.world.oracle import Oracle

EXPERIMENT = """
n = 2
steps = 1
[methods.uce]
[methods.esd]
trajectories = 1
sampling_steps = 2
max_train_steps = 2
[attacks.paraphrase]
[[sections]]
title = "animals"
objects = ["dog", "cat"]
kept = 4
attacks = ["paraphrase"]
"""


class Sampled(Painter):
    """Images that the model draws, read as if they showed what was asked for; of an edited one no dog and no cat that is called so."""

    def _paint(self, model: Model, prompts: Sequence[Prompt], title: str, hooks: Sequence[Hook]) -> list[Shown]:
        def read(shown: Shown) -> Shown:
            spoilt = model.edits and {"dog", "cat"} & set(shown.prompt.words)
            return replace(shown, reading=reading({}) if spoilt else true_reading(shown.prompt))

        return [read(shown) for shown in super()._paint(model, prompts, title, hooks)]


def stand_ins() -> list[tuple[ModuleType, str, Any]]:
    """What takes the place of what, so that the command runs on the tiny model."""
    torch.manual_seed(0)
    oracle, tiny = Oracle().eval().requires_grad_(False), Model(SD.tiny())
    return [
        (eval.commands.bench, "open_model", lambda args: tiny),
        (eval.commands.evaluate, "knows_world", lambda model: True),
        (toolkit.world.oracle, "load_oracle", lambda: oracle),
        (eval.rates, "Painter", Sampled),
        # An edit notes the seconds of its fit, and with more digits or fewer its file would have another size.
        (trainers.method, "time", SimpleNamespace(perf_counter=lambda: 0.0)),
    ]


if __name__ == "__main__":
    for module, name, value in stand_ins():
        setattr(module, name, value)
    sys.exit(cli.main(["bench", *sys.argv[1:], "--json"]))
