"""Receler: small erasers behind cross-attention, trained where the concept is and against prompts that bring it back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.arch.text import Text
from toolkit.attention import attention_maps, grid_of, token_mask
from toolkit.concepts import Concept, EraseTask, Task
from toolkit.errors import UserError
from toolkit.method import option
from toolkit.runs import seeded
from trainers.erase.options import Steered, drawing_options
from trainers.erase.prompts import concept_prompts, erase_task
from trainers.erase.samples import TrajectorySteps
from trainers.loop import Batch, Objective
from trainers.trajectories import Trajectories
from trainers.weights import ModuleWeights

if TYPE_CHECKING:
    from toolkit.edits.base import Edit, EditInfo
    from toolkit.model import Model

NEEDED_BY = {"attack_steps": ("attack_tokens", "attack_learning_rate"), "locality_weight": ("mask_threshold",)}


@dataclass(frozen=True)
class Receler(Steered):
    """Receler: Reliable Concept Erasing of Text-to-Image Diffusion Models via Lightweight Erasers, Huang et al., arXiv 2311.17717.

    Equation
        y_l -> y_l + o_l,  o_l = U_l gelu(D_l y_l + b_l) + a_l   behind every cross-attention l, with theta all D, b, U and a
        min_theta  E_{x_t, t}   || e_theta(x_t, c + p, t) - [e*(x_t, b, t) - eta (e*(x_t, c, t) - e*(x_t, t))] ||^2
                              + lambda  mean_l  sum_i (1 - M_i) |o_li|^2 / (d_l sum_i (1 - M_i))
        p = argmin_p  || e_theta(x_t, c + p, t) - e*(x_t, c, t) ||^2
        with e* the frozen model, x_t what it has denoised of the concept's prompt c so far, at a uniform step of the sampler, the base
        b no prompt, or the anchor's prompt where the concept has an anchor, c + p the encoded prompt with soft tokens after its last
        one, which are found by a few steps of Adam, and M_i whether place i is the concept's: where the frozen model's cross-attention
        to its words, from 0 at the least to 1 at the most, is at least a threshold. On a model that predicts velocity the same is
        done in velocities.

    Shapes
        e, x_t: [batch, c, h', w']; p: [batch, attack_tokens, d]; y_l, o_l: [batch, places, d_l]; M: one of h' x w' for each sample,
        taken at the nearest place by coarser layers.

    Defaults
        Rank 128, 500 steps of Adam at 3e-4 with one sample each, eta 1, lambda (`locality_weight`) 0.1, threshold 0.1, 16 soft tokens,
        50 steps of Adam at 0.1 for them, guidance 3 and 50 steps of the sampler are the official code's. Each step of the attack costs
        as much as a step of training: fewer are cheaper, and find less.

    Deviations
        In the official code the soft tokens are written into a copy of the prompt, so that they never reach the model: what it trains
        is without the attack. Here they do, as in the paper. There they go on from step to step, from numbers uniform in [0, 1], with
        a weight decay of 0.1; here every sample starts its own, from normal numbers with the mean and deviation of the prompts' rows
        and without decay, so that a step depends on its number alone, resumed or in several processes, and meets many attacks
        instead of one. The official code draws latents with the model that is trained, for every step anew; here they are the frozen
        model's `trajectories`, as in ESD, which gives the target and what the attack looks for at the same time. The sampler is the
        family's own solver instead of DDIM. Masks are of all cross-attention, where the official code takes the layers of 16 x 16
        places, which small models lack. Every template around every word of the concept is trained, where it trains the bare name.
        AdamW with weight_decay 0 is Adam.
    """

    rank: int = option(128, "width of each eraser")
    locality_weight: float = option(0.1, "weight of the erasers doing nothing where the concept is not")
    mask_threshold: float = option(0.1, "where the concept is: part of the range of the attention to its words, above 0")
    attack_steps: int = option(50, "steps in which soft tokens that bring the concept back are found for each sample; 0: no attack")
    attack_tokens: int = option(16, "soft tokens after the prompt")
    attack_learning_rate: float = option(0.1, "step size of the attack")
    learning_rate: float = option(3e-4, "step size")

    paper: ClassVar = "arXiv:2311.17717"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "rank", "attack_tokens")
        self.at_least(0, "attack_steps", "locality_weight")
        if not 0 < self.mask_threshold <= 1:
            raise UserError(f"mask_threshold is {self.mask_threshold}, needs more than 0 up to 1; give such a number")
        for of, needing in NEEDED_BY.items():
            for name in self.changed(needing):
                if not getattr(self, of):
                    raise UserError(f"{of} is 0, so {name} has no effect; leave it out, or set {of}")

    @contextmanager
    def objective(self, model: Model, task: Task) -> Iterator[tuple[Objective, Callable[[EditInfo], Edit]]]:
        erasing = Erasing(model, self, erase_task(task, None))
        with erasing.weights:
            yield erasing, erasing.weights.edit

    @classmethod
    def example_task(cls, model: Model) -> EraseTask:
        """An object with an anchor, and one without."""
        return EraseTask((Concept("cat", anchor="dog"), Concept("bird")))


class Erasing(Objective):
    """The distance of the attacked concept's prediction to where it is steered, and what is added where the concept is not."""

    def __init__(self, model: Model, method: Receler, task: EraseTask) -> None:
        self.arch, self.method = model.arch, method
        self.module = self.weights = ModuleWeights(
            model, model.arch.cross_attention_sites(), form="bottleneck", rank=method.rank, seed=method.seed
        )
        pairs = list(islice(cycle(concept_prompts(task)), method.trajectories))
        prompts, bases = ([pair[side] for pair in pairs] for side in (0, 1))
        distinct = list(dict.fromkeys(prompts))
        self.tokens = _tokens_of_concepts(model, task, distinct) if method.locality_weight else None
        text = model.arch.encode(distinct)
        if method.attack_steps and (room := text.hidden.shape[1] - int(text.length.max()) + 1) < method.attack_tokens:
            raise UserError(f"attack_tokens is {method.attack_tokens}, and the longest prompt leaves room for {room}; give fewer")
        rows = text.hidden[:, 1:].flatten(0, 1).float()  # the first is the same in every prompt
        self.start = rows.mean(0), rows.std(0)
        seeds = range(method.seed, method.seed + len(prompts))
        seen = Trajectories.of(model, prompts, seeds, beside={"base": bases}, **drawing_options(method, model))
        self.shown = seen.outputs["prompt"]
        target = seen.outputs["base"] - method.eta * (self.shown - seen.outputs["negative"])
        self.samples = TrajectorySteps(model.arch, prompts, seen.latents, seen.t, target)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        method, device, places = self.method, self.arch.device, batch.places(self.method.train_batch_size)
        rows, steps = zip(*(self.samples.pick("erase", method.seed, batch.step, place) for place in places), strict=True)
        latents, t, text, target = self.samples.at(rows, steps, device)
        outside = None
        if self.tokens is not None:
            outside = self._outside(latents, t, text, self.tokens[self.samples.row[torch.tensor(rows)].to(device)])
        if method.attack_steps:
            shown = self.shown[torch.tensor(rows), torch.tensor(steps)].to(device)
            text = self._attacked(latents, t, text, shown, [seeded("attack", method.seed, batch.step, place) for place in places])
        with self.weights.added() as added:
            erase = F.mse_loss(self.arch.predict(latents, t, text), target)
        if outside is None:
            return erase, {}
        local = locality(added, outside)
        return erase + method.locality_weight * local, {"erase": erase.item(), "local": local.item()}

    def _attacked(self, latents: Tensor, t: Tensor, text: Text, shown: Tensor, draws: Sequence[torch.Generator]) -> Text:
        """The prompts with soft tokens for which the model predicts what the frozen one does for the prompts."""
        mean, deviation = self.start
        noise = torch.stack([torch.randn(self.method.attack_tokens, len(mean), generator=draw) for draw in draws])
        soft = (mean + deviation * noise.to(mean)).requires_grad_()
        optimizer = torch.optim.Adam([soft], lr=self.method.attack_learning_rate)
        for _ in range(self.method.attack_steps):
            output = self.arch.predict(latents, t, with_soft_tokens(text, soft))
            error = F.mse_loss(output.float(), shown, reduction="none").flatten(1).mean(1).sum()
            (soft.grad,) = torch.autograd.grad(error, [soft])
            optimizer.step()
        return with_soft_tokens(text, soft.detach())

    def _outside(self, latents: Tensor, t: Tensor, text: Text, tokens: Tensor) -> Tensor:
        """[n, h', w'], True where the frozen model attends little to the concept's words."""
        with self.weights.off(), torch.no_grad(), attention_maps(self.arch) as maps:
            self.arch.predict(latents, t, text)
            seen = maps.of_tokens(tokens, (latents.shape[2], latents.shape[3])).float()
        least, most = seen.amin((1, 2), keepdim=True), seen.amax((1, 2), keepdim=True)
        return seen - least < self.method.mask_threshold * (most - least)


def with_soft_tokens(text: Text, soft: Tensor) -> Text:
    """Encoded prompts with rows [n, k, d] in the place of those after each prompt's last token."""
    places = text.length[:, None] - 1 + torch.arange(soft.shape[1], device=text.length.device)
    places = places[:, :, None].expand_as(soft).to(text.hidden.device)
    return replace(text, hidden=text.hidden.scatter(1, places, soft.to(text.hidden)))


def locality(added: Mapping[str, Tensor], outside: Tensor) -> Tensor:
    """The mean square of what is added at each site [n, places, d] outside the concept [n, h', w'], mean over samples and sites."""
    each = []
    for values in added.values():
        grid = grid_of(values.shape[1], (outside.shape[1], outside.shape[2]))
        counted = F.interpolate(outside[:, None].float(), grid).flatten(1)
        each.append(((values.float().square().mean(-1) * counted).sum(1) / counted.sum(1).clamp(min=1)).mean())
    return torch.stack(each).mean()


def _tokens_of_concepts(model: Model, task: EraseTask, prompts: Sequence[str]) -> Tensor:
    """[n, L], True for the tokens of the word that each prompt was made with."""
    word_of: dict[str, str] = {}
    for concept in task.concepts:
        for template in task.templates or concept.templates:
            word_of |= {template.format(word): word for word in concept.words}
    try:
        return token_mask(model.arch, prompts, [word_of[prompt] for prompt in prompts])
    except ValueError as error:
        raise UserError(f"{error} as words of their own; change the template, or set locality_weight to 0") from error
