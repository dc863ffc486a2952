"""The training loop: what an interrupted run gives is what an uninterrupted one gives."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from toolkit.errors import PalimpsestError
from toolkit.runs import TrainingRun
from trainers.loop import Batch, LoopConfig, Objective, train


class Line(Objective):
    """Fit y = 3x + 1 with noise that depends on torch's generator; not finite at step `bad`."""

    def __init__(self, bad: int = -1) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.module = nn.Linear(1, 1)
        self.bad, self.steps, self.seen = bad, [], torch.float32

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        self.steps.append(batch.step)
        x = torch.randn(8, 1)
        output = self.module(x)
        self.seen = output.dtype
        loss = (output.float() - 3 * x - 1).square().mean()
        return (loss * math.inf if batch.step == self.bad else loss), {"x": x.mean().item()}

    def describe(self, batch: Batch) -> str:
        return "a line"


def weights(objective: Line) -> list[float]:
    return [p.item() for p in objective.module.parameters()]


def config(steps: int = 20, **options: object) -> LoopConfig:
    return LoopConfig(**{"max_train_steps": steps, "learning_rate": 0.2, "weight_decay": 0.0, **options})  # pyright: ignore[reportArgumentType]


def test_it_learns_and_returns_every_loss() -> None:
    objective = Line()
    losses = train(objective, config(100))
    assert len(losses) == 100 and objective.steps == list(range(100)) and losses[-1] < 0.01 * losses[0]
    assert weights(objective) == pytest.approx([3, 1], abs=0.1)


def test_the_seed_determines_everything_and_the_global_state_stays() -> None:
    torch.manual_seed(7)
    expected = torch.randn(3)
    torch.manual_seed(7)
    one, two, three = Line(), Line(), Line()
    assert train(one, config(seed=1)) == train(two, config(seed=1)) != train(three, config(seed=2))
    assert weights(one) == weights(two) != weights(three) and torch.equal(torch.randn(3), expected)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_an_interrupted_run_goes_on_as_if_it_was_not(tmp_path: Path, ema: float) -> None:
    def interrupt(step: int) -> None:
        if step == 13:
            raise KeyboardInterrupt

    options, run = config(ema_decay=ema), TrainingRun(tmp_path, 5)
    straight, broken, resumed = Line(), Line(), Line()
    losses = train(straight, options)
    with pytest.raises(KeyboardInterrupt):
        train(broken, options, run, after=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"], "the newest only"
    assert train(resumed, options, run) == losses[10:]
    assert resumed.steps == list(range(10, 20)) and weights(resumed) == weights(straight)


def test_ema_averages_the_weights() -> None:
    plain, averaged = Line(), Line()
    train(plain, config(10))
    train(averaged, config(10, ema_decay=0.999))
    start = weights(Line())
    assert all(abs(a - s) < abs(p - s) for s, p, a in zip(start, weights(plain), weights(averaged), strict=True))


def test_a_loss_that_is_not_finite_stops_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(PalimpsestError, match=r"^mine: the loss became inf at step 7, with a line; lower learning_rate .* checkpoint"):
        train(Line(bad=7), config(), TrainingRun(tmp_path, 5), title="mine")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_runs_of_different_precision_in_one_process() -> None:
    for precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16), ("no", torch.float32)):
        objective = Line()
        train(objective, config(2, mixed_precision=precision), in_place=True)
        assert objective.seen == dtype and objective.module.weight.dtype == torch.float32


def test_schedules_and_clipping_are_followed() -> None:
    start = weights(Line())
    for options in ({"max_grad_norm": 0.0}, {"lr_warmup_steps": 10**9, "lr_scheduler": "constant_with_warmup"}):
        objective = Line()
        train(objective, config(3, **options))
        assert weights(objective) == pytest.approx(start, abs=1e-6)


@pytest.mark.parametrize("quiet", [True, False])
def test_a_quiet_run_shows_progress_on_a_terminal_only(quiet: bool, capsys: pytest.CaptureFixture[str]) -> None:
    train(Line(), config(2), title="mine", quiet=quiet)
    assert ("mine" in capsys.readouterr().err) is not quiet


@pytest.mark.parametrize(("name", "package", "rate"), [("adamw_8bit", "bitsandbytes", 0.2), ("prodigy", "prodigyopt", 1.0)])
def test_optimizers_of_other_packages_learn(name: str, package: str, rate: float) -> None:
    pytest.importorskip(package, reason=f"{package} is in the extra 'optimizers'")
    losses = train(Line(), config(100, optimizer=name, learning_rate=rate, weight_decay=0.0), quiet=True)
    assert losses[-1] < 0.1 * losses[0]
