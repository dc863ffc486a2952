"""MACE: many concepts at once, each by a LoRA that turns attention away from it, fused in closed form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.closed_form.mace_fuse import MACEFuse
from pipelines.closed_form.mace_refine import MACERefine
from pipelines.closed_form.prior import PRIOR_HELP, SCALE, SCALE_HELP
from pipelines.closed_form.rows import Nothing
from toolkit.attention import attention_maps, grid_of, token_mask
from toolkit.concepts import Concept, EraseTask, Task, expect
from toolkit.edits.base import EditInfo
from toolkit.edits.low_rank import LowRank
from toolkit.errors import UserError
from toolkit.method import option
from toolkit.pictures import masks_of, pictures
from toolkit.runs import seeded
from trainers.erase.options import TrainedOnPictures, drawing_options
from trainers.erase.samples import noised
from trainers.loop import Batch, Objective
from trainers.photos import drawings, load_masks, load_photos, to_latents
from trainers.weights import LoraWeights, Trainable

if TYPE_CHECKING:
    from toolkit.arch.base import Architecture
    from toolkit.arch.text import Text
    from toolkit.edits.base import Edit
    from toolkit.model import Model

FOCUS, SHARPNESS = (200, 400), 0.05  # the thousandths of all timesteps between which most samples are, and how abruptly that begins
LEVELS = (0.3, 0.5, 0.7)  # parts of all timesteps at which a picture's region is looked for
TOGETHER = 8  # pictures whose regions are looked for at once


@dataclass(frozen=True)
class MACE(TrainedOnPictures):
    """MACE: Mass Concept Erasure in Diffusion Models, Lu et al., arXiv 2403.06135.

    Equation
        1. W = W0 (I + D) for every layer that reads the text: what stands beside a concept forgets it (the method mace_refine).
        2. For each concept k a LoRA dW_k = B_k A_k of rank 1 beside each of these layers, on top of W:
           min_{B_k, A_k}  E_{z, eps, t}  sum_l sum_{i in S} || A_l^i(z_t) * M ||_F^2,    z_t = alpha_t z + sigma_t eps
           with A_l^i where layer l of the cross-attention attends to the prompt's token i, S the tokens of the concept, M the region
           of the concept in a picture z of it, and t drawn with probability ~ s(0.05 (t - 200)) - s(0.05 (t - 400)), s the sigmoid.
        3. One change in place of all dW_k, which does in prompts of concept k what dW_k does and nothing elsewhere (mace_fuse).

    Shapes
        z: [batch, c, h', w'] scaled latents. A_l: [batch, heads, places, tokens]; its square is the mean over heads. M: [batch, h', w']
        in [0, 1], averaged down to the places of each layer. W: [o, d], A_k: [rank, d], B_k: [o, rank].

    Defaults
        Rank 1, the timesteps of the equation (`timesteps` importance), 8 pictures of each concept, and 50 steps at 1e-4 for each
        concept are the paper's; for nudity it takes 120 steps at 1e-5. lamb, prior and preserve_scale are those of mace_refine,
        fuse_preserve_scale is that of mace_fuse. That a region is where attention is at least 0.5 of the way from its smallest
        value in a picture to its largest is chosen by us. A style is everywhere in its pictures: give region_threshold 0.

    Deviations
        Regions are from Grounded-SAM in the paper. Here they are where the frozen model attends to the concept's tokens in the
        pictures, noised to three levels, mean over layers and heads; or give `images` of one concept with `masks`. The model's own
        pictures stay latents. Prompts are the task's templates, or the concept's own, around each of its words, where the paper has
        one prompt. The concepts take turns: a step trains one of them, with the learning rate that it would have in a run of its own,
        and max_train_steps are of each. What the task preserves is kept in the first stage and, beside the empty prompt, in the last.
        The values of the last layer are not trained: nothing is attended to after them. The first and the last stage leave their
        choice of rows to their defaults; their own deviations are with mace_refine and mace_fuse. Written from the paper, without
        code of its authors.
    """

    rank: int = option(1, "of each concept's LoRA")
    masks: str | None = option(None, "folder of masks, one named like each of the images, white on the concept; none: by attention")
    n_images: int = option(8, "pictures that the model draws of each concept, without images")
    sampling_steps: int = option(50, "steps of each of them")
    region_threshold: float = option(0.5, "how far from its smallest to its largest attention is where the concept is; 0 is everywhere")
    timesteps: Literal["importance", "uniform"] = option("importance", "importance (around 0.2 to 0.4 of all), or uniform")
    nothing: Nothing = option("empty_prompt", "where a concept without an anchor goes: empty_prompt, or the template without it")
    preserve_scale: float = option(0.1, "weight of each kept row in the first stage")
    fuse_preserve_scale: float = option(1.0, "weight of each row of preserved prompts and of the empty prompt in the last stage")
    prior: str = option("built-in", PRIOR_HELP)
    prior_scale: float = option(SCALE, SCALE_HELP)
    lamb: float = option(10.0, "weight of staying close to the given weights, in both")
    max_train_steps: int = option(50, "optimizer steps for each concept")
    learning_rate: float = option(1e-4, "step size")

    paper: ClassVar = "arXiv:2403.06135"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "rank")
        if not 0 <= self.region_threshold < 1:
            raise UserError(f"region_threshold is {self.region_threshold}, needs at least 0 and below 1; give such a number")
        if self.masks is not None and self.images is None:
            raise UserError("masks given without images, whose regions they say; give the folder of the images, or no masks")
        if self.masks is not None and self.changed(["region_threshold"]):
            raise UserError("region_threshold given beside masks, which say the regions; leave out one of the two")

    @contextmanager
    def objective(self, model: Model, task: Task) -> Iterator[tuple[Objective, Callable[[EditInfo], Edit]]]:
        task = expect(EraseTask, task)
        shown = [Shown(model, self, task, number) for number in range(len(task.concepts))]
        same = {"prior": self.prior, "prior_scale": self.prior_scale, "lamb": self.lamb}
        refined = MACERefine(nothing=self.nothing, preserve_scale=self.preserve_scale, **same).fit(model, task)
        fuse, on = MACEFuse(preserve_scale=self.fuse_preserve_scale, **same), model.info(self).on

        def edit(info: EditInfo) -> LowRank:
            loras = [lora.edit(EditInfo(base=model.fingerprint)) for lora in turning.weights.each]
            fused = fuse.fuse(model, list(zip(loras, task.concepts, strict=True)), task.preserve)
            notes = {**info.notes, **refined.info.notes}
            return LowRank.merge([refined, fused], info=replace(info, on=on, notes=notes))

        with model.attached(refined):
            turning = TurningAway(model, self, shown)
            with turning.weights:
                yield turning, edit

    @classmethod
    def example_task(cls, model: Model) -> EraseTask:
        """An object with an anchor and a synonym, one without, and a word to keep."""
        return EraseTask((Concept("cat", ("kitty",), "dog"), Concept("bird")), preserve=("cow",))


class TurningAway(Objective):
    """How much the concept whose turn it is is attended to where it is.

    shown: of each concept.
    """

    def __init__(self, model: Model, method: MACE, shown: Sequence[Shown]) -> None:
        self.module = self.weights = InTurn(model, len(shown), method.rank, method.seed)
        self.arch, self.method, self.shown, self.turns = model.arch, method, shown, len(shown)
        self.likely = likelihoods(model.arch.train_timesteps, method.timesteps)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        concept = batch.step % self.turns
        shown = self.shown[concept]
        self.weights.turn(concept)
        draws = [seeded("mace", self.method.seed, batch.step, place) for place in batch.places(self.method.train_batch_size)]
        rows, asked, times = [], [], []
        for draw in draws:
            rows.append(int(torch.randint(len(shown.latents), (), generator=draw)))
            asked.append(int(torch.randint(len(shown.tokens), (), generator=draw)))
            times.append(int(torch.multinomial(self.likely, 1, generator=draw)))
        seen = noised(self.arch, shown.latents[rows], draws, times)
        with attention_maps(self.arch) as maps:
            self.arch.predict(seen.latents, seen.t, shown.text[asked])
        return torch.stack([self._inside(maps.probabilities(site), shown, rows, asked) for site in maps.sites]).sum(), {}

    def _inside(self, seen: Tensor, shown: Shown, rows: Sequence[int], asked: Sequence[int]) -> Tensor:
        """|| A * M ||_F^2 of the concept's tokens in one layer, mean over heads and samples. seen: [n, heads, places, tokens]."""
        region = shown.regions[rows]
        region = F.adaptive_avg_pool2d(region[:, None], grid_of(seen.shape[2], (region.shape[1], region.shape[2]))).flatten(2)
        squared = (seen.square() * shown.tokens[asked][:, None, None]).sum(-1)
        return (squared * region.square()).sum(-1).mean()


class InTurn(Trainable):
    """LoRAs of several concepts beside the layers that read the text, of which one acts at a time.

    each: the LoRAs. After a step the one that it trained still acts.
    """

    def __init__(self, model: Model, count: int, rank: int, seed: int) -> None:
        super().__init__()
        self.each = [LoraWeights(model.arch.text_linears(), rank, seed=seed) for _ in range(count)]
        self.trained, self.acting = nn.ModuleList(self.each), 0

    def turn(self, number: int) -> None:
        """Let another one act."""
        self.leave()
        self.acting = number
        self.enter()

    def enter(self) -> None:
        self.each[self.acting].enter()

    def leave(self) -> None:
        self.each[self.acting].leave()

    def edit(self, info: EditInfo) -> LowRank:
        return self.each[self.acting].edit(info)


class Shown:
    """Pictures of one concept of a task, where it is in them, and the prompts that name it.

    latents: [n, c, h', w']. regions: [n, h', w'] in [0, 1]. text: the encoded prompts; tokens: [prompts, L], True for the concept's.
    """

    def __init__(self, model: Model, method: MACE, task: EraseTask, number: int) -> None:
        arch, concept = model.arch, task.concepts[number]
        prompts, words = zip(*((t.format(word), word) for t in task.templates or concept.templates for word in concept.words), strict=True)
        try:
            self.tokens = token_mask(arch, prompts, words)
        except ValueError as error:
            raise UserError(f"{error} as tokens of its own; put spaces around {{}} in the template, and shorten what is cut off") from error
        self.text = arch.encode(prompts)
        if method.images is None:
            asked = [i % len(prompts) for i in range(method.n_images)]
            options = drawing_options(method, model)
            first = method.seed + number * method.n_images
            self.latents = drawings(model, [prompts[i] for i in asked], first_seed=first, **options)
        else:
            if len(task.concepts) > 1:
                raise UserError(f"images are of one concept, and the task has {len(task.concepts)}; erase one at a time, or give no images")
            paths = pictures(method.images)
            self.latents = to_latents(arch, load_photos(paths, arch.image_size))
            asked = [0] * len(paths)
            if method.masks is not None:
                masks = load_masks(masks_of(paths, method.masks), paths, arch.image_size).to(self.latents)
                self.regions = F.adaptive_avg_pool2d(masks, arch.latent_shape(arch.image_size, arch.image_size)[1:])[:, 0]
                return
        key = ("mace region", method.seed, number)
        attended = attention_of(arch, self.latents, self.text[asked], self.tokens[asked], key)
        self.regions = region_of(attended, method.region_threshold)


@torch.no_grad()
def attention_of(arch: Architecture, latents: Tensor, text: Text, tokens: Tensor, key: Sequence[str | int]) -> Tensor:
    """Where a prompt's tokens [n, L] are attended to in noised pictures: [n, h', w'], mean over noise levels, layers and heads."""
    found = []
    for start in range(0, len(latents), TOGETHER):
        own = slice(start, start + TOGETHER)
        z, each = latents[own], []
        for level in LEVELS:
            t = torch.full((len(z),), int(level * arch.train_timesteps), device=z.device)
            noise = torch.randn(z.shape, generator=seeded(*key, start, str(level))).to(z)
            with attention_maps(arch) as maps:
                arch.predict(arch.add_noise(z, noise, t), t, text[own])
            each.append(maps.of_tokens(tokens[own], (z.shape[2], z.shape[3])))
        found.append(torch.stack(each).mean(0))
    return torch.cat(found)


def region_of(attended: Tensor, threshold: float) -> Tensor:
    """1 where attention [n, h', w'] is so far on the way from its smallest value in a picture to its largest, else 0."""
    low, high = attended.amin((1, 2), keepdim=True), attended.amax((1, 2), keepdim=True)
    return (attended >= low + threshold * (high - low)).to(attended)


def likelihoods(total: int, timesteps: Literal["importance", "uniform"]) -> Tensor:
    """How likely each timestep is to be drawn [total], up to a factor."""
    if timesteps == "uniform":
        return torch.ones(total)
    t = torch.arange(total) * (1000 / total)
    first, last = (torch.sigmoid(SHARPNESS * (t - edge)) for edge in FOCUS)
    return first - last
