"""The training loop. A method brings an objective; the loop owns devices, precision, schedules, checkpoints and resuming.

An objective draws its batch from the step number alone, so that a resumed run sees what an uninterrupted one would have seen.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm

from toolkit.errors import PalimpsestError
from toolkit.runs import computes_in_bf16


@dataclass(frozen=True)
class LoopConfig:
    """Options of the loop, named as in diffusers' training scripts.

    ema_decay 0 turns the moving average off. checkpointing_steps 0 writes none. mixed_precision "bf16" runs the loss under
    autocast; weights and optimizer stay float32. "auto" means "bf16" where the hardware computes in it, else "no" (a
    processor that only emulates it takes several times as long).
    """

    max_train_steps: int
    learning_rate: float = 1e-3
    lr_scheduler: str = "cosine"
    lr_warmup_steps: int = 0
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    betas: tuple[float, float] = (0.9, 0.99)
    ema_decay: float = 0.0
    mixed_precision: Literal["no", "bf16", "auto"] = "no"
    checkpointing_steps: int = 0
    seed: int = 0


class Objective(ABC):
    """What a training method is: trainable parameters and a loss."""

    module: nn.Module  # everything trainable, and nothing else that should be saved

    def optimizer(self, parameters: list[nn.Parameter], config: LoopConfig) -> torch.optim.Optimizer:
        """AdamW, unless a method's paper says otherwise."""
        return torch.optim.AdamW(parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay)

    @abstractmethod
    def loss(self, module: nn.Module, step: int) -> tuple[Tensor, dict[str, float]]:
        """The loss of a step and values to show beside it. `module` is the wrapped `self.module`: call that one."""


def train(
    objective: Objective,
    config: LoopConfig,
    out: Path | None = None,
    *,
    title: str = "train",
    after: Callable[[int], None] | None = None,
    in_place: bool = False,
    quiet: bool = False,
) -> list[float]:
    """Train until `max_train_steps`, resuming from the newest checkpoint in `out`; returns the losses of this run.

    With EMA the module ends with the averaged weights. after: called with the number of finished steps after each step.
    in_place: the module stays on the device it is on; else it moves to the GPU when there is one. quiet: show progress
    on a terminal only. A loss that is not finite stops the run and leaves the last good checkpoint where it is. torch's
    random state is set from the seed at each step, and is afterwards as before.
    """
    with torch.random.fork_rng():
        return _train(objective, config, out, title, after, in_place, quiet)


def _train(
    objective: Objective,
    config: LoopConfig,
    out: Path | None,
    title: str,
    after: Callable[[int], None] | None,
    in_place: bool,
    quiet: bool,
) -> list[float]:
    # Autocast is our own: accelerate keeps one precision for the whole process, and refuses a second run with another.
    accelerator = Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available())
    parameters = [p for p in objective.module.parameters() if p.requires_grad]
    optimizer = objective.optimizer(parameters, config)
    schedule = get_scheduler(
        config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=config.max_train_steps
    )
    module, optimizer, schedule = accelerator.prepare(objective.module, optimizer, schedule, device_placement=[not in_place] * 3)
    device = parameters[0].device.type
    amp = config.mixed_precision == "bf16" or (config.mixed_precision == "auto" and computes_in_bf16(device))
    ema = EMAModel(parameters, decay=config.ema_decay, use_ema_warmup=True, power=3 / 4) if config.ema_decay else None
    if ema is not None:
        accelerator.register_for_checkpointing(ema)
    step = _resume(accelerator, out)
    losses: list[float] = []
    shown = 0.0
    with tqdm(total=config.max_train_steps, initial=step, desc=title, unit="step", mininterval=2, disable=None if quiet else False) as bar:
        while step < config.max_train_steps:
            torch.manual_seed(config.seed * 1_000_003 + step)
            with torch.autocast(device, torch.bfloat16, enabled=amp):
                loss, values = objective.loss(module, step)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                cure = f"lower learning_rate (now {config.learning_rate})"
                raise PalimpsestError(f"{title}: the loss became {losses[-1]} at step {step}; {cure}")
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if ema is not None:
                ema.step(parameters)
            step += 1
            shown = losses[-1] if shown == 0 else 0.98 * shown + 0.02 * losses[-1]
            bar.update()
            bar.set_postfix({"loss": f"{shown:.4f}", **{key: f"{value:.3g}" for key, value in values.items()}}, refresh=False)
            if out and config.checkpointing_steps and step % config.checkpointing_steps == 0:
                _save(accelerator, out, step)
            if after is not None:
                after(step)
    if ema is not None:
        ema.copy_to(parameters)
    return losses


def _save(accelerator: Accelerator, out: Path, step: int) -> None:
    """Write a checkpoint under a temporary name, then rename, then drop the older one."""
    final, part = out / f"checkpoint-{step}", out / "checkpoint.part"
    shutil.rmtree(part, ignore_errors=True)
    accelerator.save_state(str(part))
    (part / "step.json").write_text(json.dumps({"step": step, "time": time.time()}))
    os.replace(part, final)
    for old in out.glob("checkpoint-*"):
        if old != final:
            shutil.rmtree(old)


def _resume(accelerator: Accelerator, out: Path | None) -> int:
    """Load the newest checkpoint; returns the number of steps it had finished."""
    found = sorted(out.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2])) if out else []
    if not found:
        return 0
    accelerator.load_state(str(found[-1]))
    return int(json.loads((found[-1] / "step.json").read_text())["step"])
