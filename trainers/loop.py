"""The training loop. A method brings an objective; the loop owns devices, processes, precision, schedules, checkpoints and resuming.

What an objective draws depends on the number of the step and on the places of its samples in the step's batch alone. So a resumed run
sees what an uninterrupted one would have seen, and several processes, or several parts one after the other, see together what one
process sees at once.

Gradients are averaged over processes after the last part of a step, instead of by wrapping the module: an objective may call it, and
other modules that read its parameters, as often as it likes. Configurations of accelerate that split the weights are refused.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, DistributedType
from accelerate.tracking import get_available_trackers
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm

from toolkit.errors import PalimpsestError, UserError, unknown
from toolkit.runs import TrainingRun, computes_in_bf16, report

Precision = Literal["no", "bf16", "fp16", "auto"]
ONE_COPY_EACH = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


@dataclass(frozen=True)
class LoopConfig:
    """Options of the loop, named as in diffusers' training scripts.

    ema_decay 0 turns the moving average off. mixed_precision "bf16" and "fp16" run the loss under autocast; weights and optimizer
    stay float32. "auto" means what `accelerate launch` was told, else "bf16" where the hardware computes in it, else "no" (a
    processor that only emulates it takes several times as long). gradient_accumulation_steps: parts of a step's batch that are
    computed one after the other.
    """

    max_train_steps: int
    learning_rate: float = 1e-3
    optimizer: Literal["adamw", "adamw_8bit", "prodigy"] = "adamw"
    lr_scheduler: str = "cosine"
    lr_warmup_steps: int = 0
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    betas: tuple[float, float] = (0.9, 0.99)
    ema_decay: float = 0.0
    mixed_precision: Precision = "no"
    gradient_accumulation_steps: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """One of `parts` equal parts of the batch of a step: what one process computes at once."""

    step: int
    part: int = 0
    parts: int = 1

    @property
    def number(self) -> int:
        """One that no other part of any step has; the step's own when it is computed at once."""
        return self.step * self.parts + self.part

    def places(self, size: int) -> range:
        """The places of this part's samples in the step's batch, which has `size` for each part."""
        return range(self.part * size, (self.part + 1) * size)


class Objective(ABC):
    """What a training method is: trainable parameters and a loss."""

    module: nn.Module  # everything trainable, and nothing else that should be saved
    turns: int = 1  # how many things take turns in being trained; a method's max_train_steps are of each

    def optimizer(self, parameters: list[nn.Parameter], config: LoopConfig) -> torch.optim.Optimizer:
        """The one that the options name, unless a method's paper says otherwise."""
        make = {"adamw": torch.optim.AdamW, "adamw_8bit": _adamw_8bit, "prodigy": _prodigy}[config.optimizer]
        return make(parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay)

    def step_sizes(self, step: int) -> Sequence[float]:
        """For each of the optimizer's parameter groups, by how much the step size of the options is multiplied in a step. Default: 1."""
        return ()

    @abstractmethod
    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """The mean loss of a part of a step's batch, and values to show beside it."""

    def describe(self, batch: Batch) -> str:
        """What a part of a batch is made of, for the message when its loss is not finite."""
        return ""

    def show(self, folder: Path) -> None:
        """Write into a run's folder, before it starts, what a user may want to look at. Default: nothing."""

    def state(self) -> Any:
        """What has changed besides the module, for checkpoints: whatever torch can save. None when nothing has."""
        return None

    def load_state(self, state: Any) -> None:
        """The inverse of `state`."""


def train(
    objective: Objective,
    config: LoopConfig,
    run: TrainingRun | None = None,
    *,
    title: str = "train",
    after: Callable[[int], None] | None = None,
    in_place: bool = False,
    quiet: bool = False,
    of: str = "",
) -> list[float]:
    """Train until `max_train_steps`, resuming from the newest checkpoint of the run; returns the losses of the steps made here.

    With EMA the module ends with the averaged weights. after: called in the main process with the number of finished steps after
    each step. in_place: the module stays on the device it is on; else it moves to the GPU when there is one. quiet: show progress
    on a terminal only. of: what is trained and on what; a checkpoint of something else is a UserError. A loss that is not finite
    stops the run and leaves the last good checkpoint where it is; who watches (`toolkit.runs.watched`) may end it early. torch's
    random state is set from the seed for each part of a step, and is afterwards as before.
    """
    with torch.random.fork_rng():
        return _Training(objective, config, run or TrainingRun(), title, in_place, of).run(after, quiet)


class _Training:
    """One call of `train`."""

    def __init__(self, objective: Objective, config: LoopConfig, run: TrainingRun, title: str, in_place: bool, of: str) -> None:
        self.objective, self.config, self.out, self.title, self.of = objective, config, run, title, of
        for tracker in run.log_with:
            if tracker not in (known := [str(name.value) for name in get_available_trackers()]):
                raise unknown("tracker that is installed", tracker, known)
        # Autocast is our own: accelerate keeps one precision for the whole process, and refuses a second run with another.
        self.accelerator = Accelerator(
            mixed_precision="no", cpu=not torch.cuda.is_available(), log_with=list(run.log_with) or None, project_dir=run.folder
        )
        if self.accelerator.distributed_type not in ONE_COPY_EACH:
            kind = self.accelerator.distributed_type.value
            raise UserError(f"accelerate is configured for {kind}, and every process needs all weights here; configure MULTI_GPU or NO")
        if not in_place:
            objective.module.to(self.accelerator.device)
        self.parameters = [p for p in objective.module.parameters() if p.requires_grad]
        self.optimizer = objective.optimizer(self.parameters, config)
        self.schedule = get_scheduler(
            config.lr_scheduler, self.optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=config.max_train_steps
        )
        self.device = self.parameters[0].device.type
        precision = resolve_precision(config.mixed_precision, self.device)
        self.autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        self.scaler = torch.amp.GradScaler(self.device, enabled=precision == "fp16")
        self.ema = EMAModel(self.parameters, decay=config.ema_decay, use_ema_warmup=True, power=3 / 4) if config.ema_decay else None

    def run(self, after: Callable[[int], None] | None, quiet: bool) -> list[float]:
        """Every step that is left."""
        total, main = self.config.max_train_steps, self.accelerator.is_main_process
        first = step = self._resume()
        losses: list[float] = []
        shown = 0.0
        if self.out.log_with:
            self.accelerator.init_trackers(self.title)
        hidden = (None if quiet else False) if main else True  # None: unless on a terminal
        with tqdm(total=total, initial=step, desc=self.title, unit="step", mininterval=2, disable=hidden) as bar:
            while step < total:
                loss, values = self._step(step)
                losses.append(loss)
                step += 1
                shown = loss if step == first + 1 else 0.98 * shown + 0.02 * loss
                bar.update()
                bar.set_postfix({"loss": f"{shown:.4f}", **{key: f"{value:.3g}" for key, value in values.items()}}, refresh=False)
                if self.out.log_with:
                    self.accelerator.log({"loss": loss, "learning_rate": self.schedule.get_last_lr()[0], **values}, step)
                if self.out.folder and self.out.checkpointing_steps and step % self.out.checkpointing_steps == 0:
                    self._save(self.out.folder, step)
                if after is not None and main:
                    after(step)
                if not report(self.title, step, total, {"loss": loss, **values}):
                    if self.out.folder and self.out.checkpointing_steps and step % self.out.checkpointing_steps:  # else it is there
                        self._save(self.out.folder, step)
                    break
        if self.ema is not None:
            self.ema.copy_to(self.parameters)
        if self.out.log_with:
            self.accelerator.end_training()
        return losses

    def _step(self, step: int) -> tuple[float, dict[str, float]]:
        """One step of the optimizer; its mean loss, and the values of its last part."""
        rank, processes, passes = self.accelerator.process_index, self.accelerator.num_processes, self.config.gradient_accumulation_steps
        total, values = torch.zeros((), dtype=torch.float64), {}
        for number in range(passes):
            batch = Batch(step, number * processes + rank, passes * processes)
            torch.manual_seed(self.config.seed * 1_000_003 + batch.number)
            with torch.autocast(self.device, self.autocast, enabled=self.autocast is not None):
                loss, values = self.objective.loss(batch)
            self._check(loss, batch)
            total += loss.item() / passes
            self.scaler.scale(loss / passes).backward()
        if processes > 1:
            total = self._mean(total)
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad = self._mean(parameter.grad)
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        scheduled = [group["lr"] for group in self.optimizer.param_groups]
        for group, times in zip(self.optimizer.param_groups, self.objective.step_sizes(step), strict=False):
            group["lr"] *= times
        self.scaler.step(self.optimizer)
        for group, own in zip(self.optimizer.param_groups, scheduled, strict=True):
            group["lr"] = own
        self.scaler.update()
        self.schedule.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.step(self.parameters)
        return float(total), values

    def _mean(self, value: Tensor) -> Tensor:
        """The mean over processes; where it is computed does not matter, so that all of them are the same bit for bit."""
        mean: Any = self.accelerator.reduce(value.to(self.accelerator.device), "mean")
        return mean.to(value.device)

    def _check(self, loss: Tensor, batch: Batch) -> None:
        """Stop at a loss that is not finite, and say what it was the loss of."""
        if math.isfinite(loss.item()):
            return
        what = f"{self.title}: the loss became {loss.item()} at step {batch.step}"
        made_of = self.objective.describe(batch)
        kept = f"; the checkpoint before it is in {self.out.folder}" if _checkpoints(self.out.folder) else ""
        raise PalimpsestError(
            f"{what}{f', with {made_of}' if made_of else ''}; lower learning_rate (now {self.config.learning_rate}){kept}"
        )

    # --- checkpoints ------------------------------------------------------------------------------------------------
    def _state(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"module": self.objective.module, "ema": self.ema}
        parts |= {"optimizer": self.optimizer, "schedule": self.schedule, "scaler": self.scaler}
        return {name: part.state_dict() for name, part in parts.items() if part is not None} | {"objective": self.objective.state()}

    def _save(self, folder: Path, step: int) -> None:
        """Write a checkpoint under a temporary name, then rename, then drop the oldest ones."""
        if self.accelerator.is_main_process:
            final, part = folder / f"checkpoint-{step}", folder / "checkpoint.part"
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            torch.save(self._state(), part / "state.pt")
            (part / "step.json").write_text(json.dumps({"step": step, "time": time.time(), "of": self.of}))
            os.replace(part, final)
            for old in _checkpoints(folder)[: -max(self.out.checkpoints_total_limit, 1)]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> int:
        """Load the newest checkpoint; returns the number of steps it had finished."""
        found = _checkpoints(self.out.folder)
        if not found:
            return 0
        told: dict[str, Any] = json.loads((found[-1] / "step.json").read_text())
        if told["of"] != self.of:
            raise UserError(f"{found[-1]} is a checkpoint of another task, model or choice of options; remove it, or give another folder")
        state = torch.load(found[-1] / "state.pt", map_location=self.parameters[0].device, weights_only=True)
        self.objective.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.objective.load_state(state["objective"])
        return int(told["step"])


def _adamw_8bit(parameters: list[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    try:
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("optimizer adamw_8bit needs bitsandbytes, which is not installed; pip install 'palimpsest[optimizers]'") from None
    return AdamW8bit(parameters, **options)


def _prodigy(parameters: list[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    try:
        from prodigyopt import Prodigy  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("optimizer prodigy needs prodigyopt, which is not installed; pip install 'palimpsest[optimizers]'") from None
    return Prodigy(parameters, **options)


def _checkpoints(folder: Path | None) -> Sequence[Path]:
    """The checkpoints in a folder, the newest last."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2])) if folder else []


def resolve_precision(given: Precision, device: str) -> str:
    """ "no", "bf16" or "fp16": of "auto" what `accelerate launch` was told, else what the hardware is good at."""
    if given != "auto":
        return given
    return os.environ.get("ACCELERATE_MIXED_PRECISION") or ("bf16" if computes_in_bf16(device) else "no")
