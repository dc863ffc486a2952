"""ESD: the model learns to be guided away from what it knows of a concept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from toolkit.concepts import Concept, EraseTask, Task
from toolkit.method import option
from trainers.erase.options import Steered, drawing_options
from trainers.erase.prompts import concept_prompts, erase_task
from trainers.erase.samples import TrajectorySteps
from trainers.loop import Batch, Objective
from trainers.parameters import PARAMETERS, Parameters, parameter_names
from trainers.trajectories import Trajectories
from trainers.weights import FullWeights

if TYPE_CHECKING:
    from toolkit.edits.base import Edit, EditInfo
    from toolkit.model import Model


@dataclass(frozen=True)
class ESD(Steered):
    """Erasing Concepts from Diffusion Models, Gandikota et al., arXiv 2303.07345.

    Equation
        min_theta  E_{x_t, t} || e_theta(x_t, c, t) - [e*(x_t, b, t) - eta (e*(x_t, c, t) - e*(x_t, t))] ||^2
        with e* the frozen model, x_t what it has denoised of the concept's prompt c so far, at a uniform step of the sampler, and the
        base b: no prompt, or the anchor's prompt where the concept has an anchor. On a model that predicts velocity the same is done
        in velocities, in which the bracket says the same.

    Shapes
        e, x_t: [batch, c, h', w'].

    Defaults
        200 steps of Adam at 5e-5 with one sample each, guidance 3 and 50 steps of the sampler are the official code's; its eta is 2
        from a base of e*(x_t, c, t), which is eta 1 here. Parameters x (all of the cross-attention) is its choice for styles and what
        a prompt names; u (all else) for nudity; x_strict is keys and values of the cross-attention alone; all is all.

    Deviations
        The official code starts a new drawing for every step, and asks the frozen model again where that arrives. Here `trajectories`
        drawings are made once and each of their steps is a sample, with the predictions that the sampler made there: training takes
        one forward and one backward pass. The samples are less independent; more trajectories make them more so; 24 are chosen
        by us. The sampler is
        the family's own solver instead of DDIM. Every template around every word of the concept is trained, where the official code
        trains the bare name. What the task preserves counts by `preserve_weight` alone, with || e_theta(x_t, k, t) - e*(x_t, k, t) ||^2
        on drawings of the preserved prompts, which neither paper nor code has; with its default of 0 it has no effect. AdamW with
        weight_decay 0 is Adam.
    """

    parameters: Parameters = option("x", PARAMETERS)
    preserve_weight: float = option(0.0, "weight of preserved prompts staying as they are")
    max_train_steps: int = option(200, "optimizer steps")
    learning_rate: float = option(5e-5, "step size")

    paper: ClassVar = "arXiv:2303.07345"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(0, "preserve_weight")

    @contextmanager
    def objective(self, model: Model, task: Task) -> Iterator[tuple[Objective, Callable[[EditInfo], Edit]]]:
        steering = Steering(model, self, erase_task(task, self.preserve_weight))
        with steering.weights:
            yield steering, steering.weights.edit

    @classmethod
    def example_task(cls, model: Model) -> EraseTask:
        """An object with an anchor, and one without."""
        return EraseTask((Concept("cat", anchor="dog"), Concept("bird")))


class Steering(Objective):
    """The distance of the concept's prediction to the base's, less what the concept adds to no prompt."""

    def __init__(self, model: Model, method: ESD, task: EraseTask) -> None:
        self.module = self.weights = FullWeights(model, parameter_names(model.arch, method.parameters))
        self.arch, self.method = model.arch, method
        words = concept_prompts(task)
        prompts, bases = ([pair[side] for pair in _in_turn(words, method.trajectories)] for side in (0, 1))
        options = drawing_options(method, model)
        seeds = range(method.seed, method.seed + len(prompts))
        seen = Trajectories.of(model, prompts, seeds, beside={"base": bases}, **options)
        target = seen.outputs["base"] - method.eta * (seen.outputs["prompt"] - seen.outputs["negative"])
        self.erased = TrajectorySteps(model.arch, prompts, seen.latents, seen.t, target)
        self.kept = None
        if method.preserve_weight:
            preserved = _in_turn(task.preserve, method.trajectories)
            seen = Trajectories.of(model, preserved, seeds, **options)
            self.kept = TrajectorySteps(model.arch, preserved, seen.latents, seen.t, seen.outputs["prompt"])

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        erase = self._error(self.erased, "erase", batch)
        if self.kept is None:
            return erase, {}
        keep = self._error(self.kept, "keep", batch)
        return erase + self.method.preserve_weight * keep, {"erase": erase.item(), "keep": keep.item()}

    def _error(self, samples: TrajectorySteps, what: str, batch: Batch) -> Tensor:
        places = batch.places(self.method.train_batch_size)
        rows, steps = zip(*(samples.pick(what, self.method.seed, batch.step, place) for place in places), strict=True)
        latents, t, text, target = samples.at(rows, steps, self.arch.device)
        return F.mse_loss(self.arch.predict(latents, t, text), target)


def _in_turn(items: Sequence[Any], count: int) -> list[Any]:
    """So many of them, each as often as the others up to one."""
    return [items[i % len(items)] for i in range(count)]
