"""AdvUnlearn: the text encoder forgets a concept, also behind the prefixes that would bring it back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.concepts import Concept, EraseTask, Task
from toolkit.errors import UserError
from toolkit.method import option
from toolkit.prompt_search import TokenRows, search
from toolkit.runs import seeded
from trainers.erase.options import Steered, drawing_options
from trainers.erase.prompts import concept_prompts, erase_task, one_each
from trainers.erase.samples import TrajectorySteps
from trainers.loop import Batch, Objective
from trainers.trajectories import Trajectories
from trainers.weights import FullWeights

if TYPE_CHECKING:
    from toolkit.edits.base import Edit, EditInfo
    from toolkit.model import Model

ATTACK = ("attack", "attack_tokens", "attack_steps", "attack_learning_rate", "warmup_steps")  # options of the attack
WARMUP = 5  # one part in so many of the steps is before the first attack, unless told


@dataclass(frozen=True)
class AdvUnlearn(Steered):
    """Defensive Unlearning with Adversarial Training for Robust Concept Erasure in Diffusion Models, Zhang et al., arXiv 2405.15234.

    Equation
        min_phi  E_{x_t, t}   || e(x_t, T_phi(a c), t) - [e*(x_t, b, t) - eta (e*(x_t, c, t) - e*(x_t, t))] ||^2
                            + gamma || e(x_r, T_phi(r), t) - e*(x_r, r, t) ||^2
        a = argmin_a  E_{x_t, t} || e(x_t, T_phi(a c), t) - e*(x_t, c, t) ||^2
        with e the denoiser, which stays as it is, T_phi the text encoder, e* the frozen model of both, c the concept's prompt, a c the
        same behind a prefix of a few free embeddings (the attack; none in the first steps), x_t what the frozen model has denoised of
        c so far, at a uniform step of the sampler, r a prompt to keep with its own x_r, and the base b: no prompt, or the anchor's prompt
        where the concept has an anchor. The attack is found anew for every sample, against the encoder as it is by then. On a model
        that predicts velocity the same is done in velocities.

    Shapes
        e, x_t, x_r: [batch, c, h', w']; x_r is `preserve_per_sample` times as many. The prefix: [attack_tokens, d] for each sample.

    Defaults
        The official code's: 1000 steps of Adam at 1e-5 with one sample each, the first 200 without an attack, which here is a fifth of
        all; a prefix of one embedding, 30 steps of Adam at 1e-3; eta 1, guidance 3 and 50 steps of the sampler; 5 prompts to keep, whose
        weight gamma (`preserve_weight`) is 0.3 in its command for nudity; all layers and the norm after them. It has the first layers
        alone (`layers`) as a choice too. Attack "fast" makes one step of the gradient's sign, as long as those of "pgd" together.
        Without `adversarial` this is ESD of the text encoder, beside what is kept. All this is for Stable Diffusion 1.

    Deviations
        The official code draws latents for every step, of the attack too, and asks the frozen model there. Here `trajectories` drawings
        are made once, as in ESD, whose steps hold the frozen predictions, and as many of what is preserved, or one of each prompt if
        that is more; a step of the attack takes one of those of the same prompt. The sampler is the family's own solver instead of DDIM.
        The official code adds the gradient of each step of the attack to those before it; here each step has its own. Its "fast" takes
        the sign of that sum in as many steps as "pgd" has. It counts the words of a prompt where it means tokens, so that one of a word's
        several tokens is lost; here the whole prompt follows the prefix. Prefixes start at random words, as in its commands; to go on
        from the last one, its default, would tie a step to those before it. Every template around every word of the concept is trained,
        where it trains the bare name. What is preserved is asked as it is written, at timesteps of its own; its prompts are classes of
        COCO. Of the first encoder of Stable Diffusion XL, the last layer and the norm after it are left out, which nobody reads. The
        anchor is ESD's and not in the paper. AdamW with weight_decay 0 is Adam.
    """

    layers: int | None = option(None, "layers of each text encoder that are trained, from the first; none: all, and what follows them")
    adversarial: bool = option(True, "train on prompts behind prefixes that bring the concept back")
    attack: Literal["pgd", "fast"] = option("pgd", "how prefixes are found: pgd (attack_steps steps), fast (one as long as these)")
    attack_tokens: int = option(1, "embeddings in a prefix")
    attack_steps: int = option(30, "steps in which it is found")
    attack_learning_rate: float = option(1e-3, "size of each of them")
    warmup_steps: int | None = option(None, "steps of training before the first attack; none: a fifth of all")
    preserve_weight: float = option(0.3, "weight of what is preserved staying as it is (gamma)")
    preserve_per_sample: int = option(5, "preserved prompts that are drawn for a sample")
    trajectories: int = option(32, "drawings of the frozen model whose steps are trained on, and at least as many of what is preserved")
    max_train_steps: int = option(1000, "optimizer steps")

    paper: ClassVar = "arXiv:2405.15234"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "attack_tokens", "attack_steps", "layers", "preserve_per_sample")
        self.at_least(0, "preserve_weight")
        self.more_than(0, "attack_learning_rate")
        idle = self.changed(ATTACK)
        if idle and not self.adversarial:
            raise UserError(f"{', '.join(idle)} given, and adversarial is false, so that nothing attacks; leave one of the two out")
        if not self.preserve_weight and self.changed(["preserve_per_sample"]):
            raise UserError(f"preserve_per_sample is {self.preserve_per_sample}, and preserve_weight 0; leave one of the two out")
        if self.warmup_steps is not None and not 0 <= self.warmup_steps < self.max_train_steps:
            raise UserError(f"warmup_steps is {self.warmup_steps} of {self.max_train_steps} steps; give at least 0, and fewer than all")

    @contextmanager
    def objective(self, model: Model, task: Task) -> Iterator[tuple[Objective, Callable[[EditInfo], Edit]]]:
        robust = Robust(model, self, erase_task(task, self.preserve_weight))
        with robust.weights, nullcontext() if robust.attack is None else robust.attack.rows.unlisted():
            yield robust, robust.weights.edit

    @classmethod
    def example_task(cls, model: Model) -> EraseTask:
        """An object with an anchor, one without, and what is to stay."""
        return EraseTask((Concept("cat", anchor="dog"), Concept("bird")), preserve=("cow", "horse"))

    def first_attack(self) -> int:
        """The step of training that is the first to be attacked."""
        return self.max_train_steps // WARMUP if self.warmup_steps is None else self.warmup_steps


class Robust(Objective):
    """The distance of what the denoiser says of attacked prompts to where they are steered, and of kept prompts to what it said."""

    def __init__(self, model: Model, method: AdvUnlearn, task: EraseTask) -> None:
        one_each(method.trajectories, task)
        self.module = self.weights = FullWeights(model, model.arch.encoder_parameters(method.layers))
        self.arch, self.method = model.arch, method
        pairs = list(islice(cycle(concept_prompts(task)), method.trajectories))
        self.prompts, bases = ([pair[side] for pair in pairs] for side in (0, 1))
        seeds = range(method.seed, method.seed + method.trajectories)
        options = drawing_options(method, model)
        seen = Trajectories.of(model, self.prompts, seeds, beside={"base": bases}, **options)
        target = seen.outputs["base"] - method.eta * (seen.outputs["prompt"] - seen.outputs["negative"])
        self.erased = TrajectorySteps(model.arch, self.prompts, seen.latents, seen.t, target)
        self.attack = None
        if method.adversarial:
            frozen = TrajectorySteps(model.arch, self.prompts, seen.latents, seen.t, seen.outputs["prompt"])
            self.attack = Attack(model, self.weights, method, self.prompts, frozen)
        self.kept, self.preserved = None, list(islice(cycle(task.preserve), max(method.trajectories, len(task.preserve))))
        if method.preserve_weight:
            seen = Trajectories.of(model, self.preserved, range(method.seed, method.seed + len(self.preserved)), **options)
            self.kept = TrajectorySteps(model.arch, self.preserved, seen.latents, seen.t, seen.outputs["prompt"])

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        size, values = self.method.train_batch_size, dict[str, float]()
        picked = self._picked(self.erased, "erase", batch, size)
        prompts = [self.prompts[row] for row, _ in picked]
        if self.attack is not None and batch.step >= self.method.first_attack():
            values["attack"] = self.attack.find(batch, [row for row, _ in picked])
            prompts = self.attack.behind_prefixes(prompts)
        erase = self._error(self.erased, picked, prompts)
        if self.kept is None:
            return erase, values
        picked = self._picked(self.kept, "keep", batch, size * self.method.preserve_per_sample)
        keep = self._error(self.kept, picked, [self.preserved[row] for row, _ in picked])
        return erase + self.method.preserve_weight * keep, {**values, "erase": erase.item(), "keep": keep.item()}

    def _picked(self, samples: TrajectorySteps, what: str, batch: Batch, size: int) -> list[tuple[int, int]]:
        return [samples.pick(what, self.method.seed, batch.step, place) for place in batch.places(size)]

    def _error(self, samples: TrajectorySteps, picked: Sequence[tuple[int, int]], prompts: Sequence[str]) -> Tensor:
        """Of these steps of these trajectories with these prompts, as the text encoder reads them now."""
        rows, steps = zip(*picked, strict=True)
        latents, t, _, target = samples.at(rows, steps, self.arch.device)
        return F.mse_loss(self.arch.predict(latents, t, self.arch.encode(prompts, grad=True)), target)


class Attack:
    """Prefixes, one for each sample of a part of a batch, behind which a prompt says again what it said to the frozen model.

    weights: trained, but not by the attack. prompts: of the trajectories. frozen: their steps, with what the frozen model predicts there.
    """

    def __init__(self, model: Model, weights: FullWeights, method: AdvUnlearn, prompts: Sequence[str], frozen: TrajectorySteps) -> None:
        self.arch, self.weights, self.method, self.prompts, self.frozen = model.arch, weights, method, prompts, frozen
        self.words = [f"<attack-{i}>" for i in range(method.train_batch_size)]
        self.tables = {part: embedding.weight.detach() for part, embedding in model.arch.token_embeddings().items()}
        self.rows = TokenRows(model, dict.fromkeys(self.words), vectors=method.attack_tokens)

    def behind_prefixes(self, prompts: Sequence[str]) -> list[str]:
        """Each prompt behind the prefix of its place."""
        return [f"{word} {prompt}" for word, prompt in zip(self.words, prompts, strict=True)]

    def find(self, batch: Batch, rows: Sequence[int]) -> float:
        """Find prefixes for the prompts of these trajectories; returns the mean error behind them before the last step."""
        method, places = self.method, batch.places(self.method.train_batch_size)
        self._start(batch.step, places)
        prompts = self.behind_prefixes([self.prompts[row] for row in rows])

        def error(number: int) -> Tensor:
            keys = [("attack", method.seed, batch.step, place, number) for place in places]
            latents, t, _, target = self.frozen.at(*self._drawn(rows, keys), self.arch.device)
            # A sum, so that no prefix is changed by what else is in the batch, and small gradients survive half precision.
            return F.mse_loss(self.arch.predict(latents, t, self.rows(prompts)), target, reduction="sum")

        fast = method.attack == "fast"  # the first step of Adam is one of the gradient's sign
        steps, far = (1, method.attack_steps) if fast else (method.attack_steps, 1)
        self.weights.requires_grad_(False)
        try:
            last = search(self.rows, error, steps=steps, lr=far * method.attack_learning_rate)[-1]
        finally:
            self.weights.requires_grad_(True)
        return last / (len(rows) * self.frozen.target[0, 0].numel())

    def _start(self, step: int, places: Sequence[int]) -> None:
        """Prefixes of random words."""
        for part, table in self.tables.items():
            for place, row in zip(places, self.rows.rows[part].parameters(), strict=True):
                draw = seeded("prefix", self.method.seed, step, place, part)
                row.data.copy_(table[torch.randint(len(table), (len(row),), generator=draw).to(table.device)])

    def _drawn(self, rows: Sequence[int], keys: Sequence[tuple[str | int, ...]]) -> tuple[list[int], list[int]]:
        """For each of these trajectories, a trajectory of the same prompt and a step of it, uniformly, from the key alone."""
        found, steps = [], []
        for row, key in zip(rows, keys, strict=True):
            draw = seeded(*key)
            same = [i for i, prompt in enumerate(self.prompts) if prompt == self.prompts[row]]
            found.append(same[int(torch.randint(len(same), (), generator=draw))])
            steps.append(int(torch.randint(len(self.frozen.t), (), generator=draw)))
        return found, steps
