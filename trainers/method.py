"""A method that takes gradient steps: its objective, run by the loop."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from toolkit.errors import UserError
from toolkit.images import grid, save_png
from toolkit.method import Score, TrainedMethod, option
from toolkit.runs import TrainingRun, is_main_process
from toolkit.sample import generate
from trainers.loop import LoopConfig, Objective, Precision, resolve_precision, train

if TYPE_CHECKING:
    from toolkit.concepts import Task
    from toolkit.edits.base import Edit, EditInfo
    from toolkit.model import Model

SAMPLE_STEPS = 20


@dataclass(frozen=True)
class Trained(TrainedMethod, ABC):
    """Base of the methods that train; its options are theirs, with defaults of their own."""

    max_train_steps: int = option(500, "optimizer steps")
    train_batch_size: int = option(1, "samples that are computed at once")
    gradient_accumulation_steps: int = option(1, "such batches in a step, one after the other")
    learning_rate: float = option(1e-5, "step size")
    optimizer: Literal["adamw", "adamw_8bit", "prodigy"] = option("adamw", "adamw, adamw_8bit (bitsandbytes), or prodigy (prodigyopt)")
    weight_decay: float = option(0.01, "of the optimizer")
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = option("constant", "how the step size changes")
    lr_warmup_steps: int = option(0, "steps in which it grows from 0; needs another lr_scheduler than constant")
    max_grad_norm: float = option(1.0, "largest norm of the gradient; inf: any")
    ema_decay: float = option(0.0, "of the moving average of what is trained, which the edit then holds; 0: none")
    mixed_precision: Precision = option("no", "auto: as accelerate was told, else bf16 where hardware has it")
    gradient_checkpointing: bool = option(False, "compute activations again in the backward pass: less memory, more time")
    seed: int = option(0, "of everything that is drawn")

    training_free: ClassVar = False

    def __post_init__(self) -> None:
        self.at_least(1, "max_train_steps", "train_batch_size", "gradient_accumulation_steps")
        if self.lr_scheduler == "constant" and self.lr_warmup_steps:
            raise UserError("lr_warmup_steps has no effect with lr_scheduler constant; give constant_with_warmup")

    @contextmanager
    @abstractmethod
    def objective(self, model: Model, task: Task) -> Iterator[tuple[Objective, Callable[[EditInfo], Edit]]]:
        """Within the block what is trained acts in the model. Gives the objective, and what makes the edit of its module."""

    def fit(self, model: Model, task: Task, *, score: Score | None = None, run: TrainingRun | None = None) -> Edit:
        """Train. There are no candidates to choose among, so `score` is not called."""
        half = model.arch.dtype in (torch.float16, torch.bfloat16)
        if half and self.mixed_precision == "no":
            raise UserError(f"the model is in {str(model.arch.dtype).removeprefix('torch.')}; set mixed_precision, or load it in float32")
        began, triggers = time.perf_counter(), [subject.token for subject in getattr(task, "subjects", ())]
        with self.objective(model, task) as (objective, edit), _checkpointing(model, self.gradient_checkpointing):
            of, after = run_of(self, model, task), samples(model, run)
            if run is not None and run.folder is not None and is_main_process():
                objective.show(run.folder)
            loop = replace(self.loop(), max_train_steps=self.max_train_steps * objective.turns)
            losses = train(objective, loop, run, title=self.name(), after=after, in_place=True, quiet=True, of=of)
            notes = {"seconds": round(time.perf_counter() - began, 3), "steps": loop.max_train_steps, "loss": summary(losses)}
            return edit(model.info(self, triggers, notes))

    def draws_in_bf16(self, model: Model) -> bool:
        """Whether what the model draws before and during training is predicted under bfloat16 autocast, as the training is."""
        return resolve_precision(self.mixed_precision, model.arch.device.type) == "bf16"

    def loop(self) -> LoopConfig:
        """The options of the loop."""
        return LoopConfig(
            max_train_steps=self.max_train_steps,
            learning_rate=self.learning_rate,
            optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
            lr_warmup_steps=self.lr_warmup_steps,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            betas=(0.9, 0.999),
            ema_decay=self.ema_decay,
            mixed_precision=self.mixed_precision,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            seed=self.seed,
        )


def run_of(method: TrainedMethod, model: Model, task: Task) -> str:
    """What tells a run from others: all but its length."""
    options = {key: value for key, value in method.config().items() if key != "max_train_steps"}
    return repr((method.name(), options, model.info(method).on, model.fingerprint, task))


def summary(losses: Sequence[float]) -> dict[str, float]:
    """The mean loss of the first and of the last tenth of the steps; none of a run that had no step left."""
    tenth = math.ceil(len(losses) / 10)
    return {"first": sum(losses[:tenth]) / tenth, "last": sum(losses[-tenth:]) / tenth} if losses else {}


def samples(model: Model, run: TrainingRun | None) -> Callable[[int], None] | None:
    """Draws a run's prompts as the model is by then, always from the same noise; for `after` of `train`."""
    if run is None or run.folder is None or not run.sample_steps:
        return None
    folder, prompts, every = run.folder / "samples", run.sample_prompts, run.sample_steps

    def draw(step: int) -> None:
        if step % every == 0:
            images = generate(model, prompts, [0] * len(prompts), steps=SAMPLE_STEPS)
            folder.mkdir(parents=True, exist_ok=True)
            save_png(grid(images, columns=min(len(images), 8)), folder / f"{step:06d}.png")

    return draw


@contextmanager
def _checkpointing(model: Model, on: bool) -> Iterator[None]:
    """Gradient checkpointing of the denoiser within the block."""
    denoiser: Any = model.arch.components()["denoiser"]
    if not on:
        yield
        return
    denoiser.enable_gradient_checkpointing()
    denoiser.train()  # diffusers computes again in training mode only; its denoisers have no dropout unless configured
    try:
        yield
    finally:
        denoiser.disable_gradient_checkpointing()
        denoiser.eval()
