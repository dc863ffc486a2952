"""An objective that takes no time, and a program that trains it: python -m tests.trainers.line FOLDER BATCH_SIZE STEPS [SECONDS].

The program writes the losses of the steps it made, and the weights, to FOLDER/result-<process>.json. SECONDS: a pause in each step.
"""

import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from toolkit.runs import TrainingRun, seeded
from trainers.loop import Batch, LoopConfig, Objective, train


class Samples(Objective):
    """Fit y = 3x + 1 on samples whose x depends on the step and on the sample's place in its batch."""

    def __init__(self, size: int, pause: float = 0.0) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.module = nn.Linear(1, 1)
        self.size, self.pause, self.drawn = size, pause, 0.0

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        time.sleep(self.pause)
        x = torch.cat([torch.randn(1, 1, generator=seeded("line", batch.step, place)) for place in batch.places(self.size)])
        self.drawn += x.sum().item()
        return (self.module(x) - 3 * x - 1).square().mean(), {}

    def state(self) -> float:
        return self.drawn

    def load_state(self, state: float) -> None:
        self.drawn = state


def weights(objective: Objective) -> list[float]:
    return [parameter.item() for parameter in objective.module.parameters()]


def settings(steps: int, **options: object) -> LoopConfig:
    return LoopConfig(**{"max_train_steps": steps, "learning_rate": 0.2, "weight_decay": 0.0, **options})  # pyright: ignore[reportArgumentType]


def main(folder: str, size: str, steps: str, pause: str = "0") -> None:
    from accelerate import PartialState

    objective = Samples(int(size), float(pause))
    losses = train(objective, settings(int(steps), ema_decay=0.9), TrainingRun(Path(folder), 5), quiet=True)
    result = {"losses": losses, "weights": weights(objective), "drawn": objective.drawn}
    (Path(folder) / f"result-{PartialState().process_index}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
