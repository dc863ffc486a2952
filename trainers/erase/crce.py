"""CRCE: a concept is erased together with the other words for it, and what is near it stays."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.arch.text import Text
from toolkit.concepts import Concept, EraseTask, Task
from toolkit.method import option
from toolkit.runs import seeded
from trainers.erase.coreferents import with_coreferents
from trainers.erase.options import Steered, drawing_options
from trainers.erase.prompts import erase_task, one_each
from trainers.erase.samples import TrajectorySteps
from trainers.loop import Batch, Objective
from trainers.parameters import Parameters, parameter_names
from trainers.trajectories import Trajectories
from trainers.weights import FullWeights

if TYPE_CHECKING:
    from toolkit.edits.base import Edit, EditInfo
    from toolkit.model import Model


SOURCES = "more of them: a JSON file (concept -> coreferents and retain), built-in, or llm (asks the command in PALIMPSEST_LLM)"


@dataclass(frozen=True)
class CRCE(Steered):
    """CRCE: Coreference-Retention Concept Erasure in Text-to-Image Diffusion Models, Xue et al., arXiv 2503.14232.

    Equation
        min_theta  E_{x_t, t}   || e_theta(x_t, c, t) - s(c) ||^2
                              + alpha / n  sum_k w_k || e_theta(x_t, c_k, t) - s(c_k) ||^2
                              + beta / m   sum_k w_k || e_theta(x_t, r_k, t) - e*(x_t, r_k, t) ||^2
        s(p) = e*(x_t, b, t) - eta (e*(x_t, p, t) - e*(x_t, t))
        with e* the frozen model, x_t what it has denoised of the concept's prompt c so far, at a uniform step of the sampler, c_k up to
        n = 5 coreferents of the concept and r_k up to m = 3 words to keep, drawn anew for every sample, w_k how certain they are, and
        the base b: no prompt, or the anchor's prompt where the concept has an anchor. Each coreferent is steered away from itself. On
        a model that predicts velocity the same is done in velocities.

    Shapes
        e, x_t: [batch, c, h', w']; the denoiser is run on batch * (1 + n + m) of them, and again without a graph on batch * (n + m).

    Defaults
        eta, alpha (`coreferent_weight`) and beta (`preserve_weight`) 1, 500 steps of Adam at 2e-5 with one sample each, 5 coreferents
        and 3 words to keep, the keys and values of the cross-attention, guidance 3 and 50 steps of the sampler are the official
        code's. Coreferents are the concepts' synonyms and words to keep are what the task preserves, with w = 1; `coreferents`
        adds words and says how certain they are: very high 1.0, high 0.8, normal 0.6, low 0.4, very low 0.2, or a number. They come
        from a file, from a small list that comes with the project, or from any LLM, as in the paper; the edit's notes name them.
        Fewer words than are drawn are all taken, and their mean is over as many.

    Deviations
        The official code draws latents with the model that is trained, for every step anew. Here they are the frozen model's
        `trajectories`, as in ESD: they cost one drawing, and give the targets of the concept and the base at the same time, so that
        the frozen model is asked again for coreferents and words to keep only. The sampler is the family's own solver instead of DDIM,
        its first and last steps are trained on too, and latents are read at the timestep that it gives, where the official code takes
        one of a thousand that is near. The official code picks one of several concepts before training and never another; here the
        trajectories take turns. Where it is told what to erase the concept from, it trains that prompt towards s(c), as if the
        concept's own were to stay; here an anchor is the base, and the concept's prompt is what is trained. It trains bare words;
        here the concept and its coreferents are put into the task's templates, and what is preserved is asked as it is written.
        Words that a file retains for one concept of a task are kept beside all of them. AdamW with weight_decay 0 is Adam.
    """

    coreferents: str | None = option(None, SOURCES)
    coreferent_weight: float = option(1.0, "weight of the coreferents (alpha)")
    coreferents_per_sample: int = option(5, "coreferents that are drawn for a sample")
    preserve_weight: float = option(1.0, "weight of what is preserved staying as it is (beta)")
    preserve_per_sample: int = option(3, "preserved prompts that are drawn for a sample")
    parameters: Parameters = option("x_strict", "what is trained: x (cross-attention), x_strict (its keys and values), u (rest), or all")
    eta: float = option(1.0, "how far beyond the base a word is steered away from itself")
    max_train_steps: int = option(500, "optimizer steps")
    learning_rate: float = option(2e-5, "step size")

    paper: ClassVar = "arXiv:2503.14232"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "coreferents_per_sample", "preserve_per_sample")
        self.at_least(0, "coreferent_weight", "preserve_weight")

    @contextmanager
    def objective(self, model: Model, task: Task) -> Iterator[tuple[Objective, Callable[[EditInfo], Edit]]]:
        certainty: Mapping[str, float] = {}
        if self.coreferents is not None and isinstance(task, EraseTask):
            task, certainty = with_coreferents(task, self.coreferents)
        task = erase_task(task, self.preserve_weight)
        _check(self, task)
        erasing = ErasingTogether(model, self, task, certainty)
        words = {"coreferents": {concept.name: concept.synonyms for concept in task.concepts}, "retained": task.preserve}

        def edit(info: EditInfo) -> Edit:
            return erasing.weights.edit(replace(info, notes={**info.notes, **words}))

        with erasing.weights:
            yield erasing, edit

    @classmethod
    def example_task(cls, model: Model) -> EraseTask:
        """An object with an anchor, one without, their coreferents, and what is near them."""
        return EraseTask((Concept("cat", ("kitty", "feline"), anchor="dog"), Concept("bird", ("fowl",))), preserve=("cow", "horse"))


class ErasingTogether(Objective):
    """The distances of the concept and its coreferents to where they are steered, and of what is near to where it was.

    certainty: word -> weight; 1 for words that are not in it.
    """

    def __init__(self, model: Model, method: CRCE, task: EraseTask, certainty: Mapping[str, float]) -> None:
        self.module = self.weights = FullWeights(model, parameter_names(model.arch, method.parameters))
        self.arch, self.method, self.certainty, self.preserve = model.arch, method, certainty, task.preserve
        self.each = [_turn(task, i) for i in range(method.trajectories)]
        prompts = [template.format(concept.name) for concept, template in self.each]
        bases = [template.format(concept.anchor) if concept.anchor else "" for concept, template in self.each]
        seeds = range(method.seed, method.seed + len(prompts))
        seen = Trajectories.of(model, prompts, seeds, beside={"base": bases}, **drawing_options(method, model))
        self.start = seen.outputs["base"] + method.eta * seen.outputs["negative"]  # s(p) is this less eta e*(p)
        self.drawn = TrajectorySteps(model.arch, prompts, seen.latents, seen.t, self.start - method.eta * seen.outputs["prompt"])
        around = dict.fromkeys(template.format(word) for concept, template in self.each for word in concept.synonyms)
        self.place = {prompt: place for place, prompt in enumerate(dict.fromkeys([*around, *task.preserve]))}
        self.text: Text | None = model.arch.encode(list(self.place)) if self.place else None

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        method, device = self.method, self.arch.device
        places = batch.places(method.train_batch_size)
        picked = [self.drawn.pick("erase", method.seed, batch.step, place) for place in places]
        rows, steps = zip(*picked, strict=True)
        coreferents, kept = self._drawn_words(batch.step, list(zip(places, rows, strict=True)))
        latents, t, text, target = self.drawn.at(rows, steps, device)
        weights = [1 / len(rows)] * len(rows)
        if self.text is not None and (coreferents or kept):
            of, prompts, shares = zip(*coreferents, *kept, strict=True)
            asked = self.text[torch.tensor([self.place[prompt] for prompt in prompts], device=device)]
            sample = torch.tensor(of, device=device)
            with self.weights.off(), torch.no_grad():
                frozen = self.arch.predict(latents[sample], t[sample], asked).float()
            start = self.start[torch.tensor(rows), torch.tensor(steps)].to(device)[sample[: len(coreferents)]]
            target = torch.cat([target, start - method.eta * frozen[: len(coreferents)], frozen[len(coreferents) :]])
            latents, t, text = torch.cat([latents, latents[sample]]), torch.cat([t, t[sample]]), Text.cat([text, asked])
            weights += [share / len(rows) for share in shares]
        errors = F.mse_loss(self.arch.predict(latents, t, text), target, reduction="none").flatten(1).mean(1)
        parts = (errors * torch.tensor(weights, device=device)).split([len(rows), len(coreferents), len(kept)])
        erase, together, keep = (part.sum() for part in parts)
        shown = {"erase": erase.item(), "coreferents": together.item(), "keep": keep.item()}
        return erase + method.coreferent_weight * together + method.preserve_weight * keep, shown

    def _drawn_words(self, step: int, samples: Sequence[tuple[int, int]]) -> tuple[list[Asked], list[Asked]]:
        """The coreferents and what is kept for the samples of a batch, given their places in the step's and their trajectories."""
        method, coreferents, kept = self.method, list[Asked](), list[Asked]()
        for sample, (place, row) in enumerate(samples):
            (concept, template), key = self.each[row], (method.seed, step, place)
            if method.coreferent_weight:
                words = _some(concept.synonyms, method.coreferents_per_sample, "coreferents", *key)
                coreferents += [(sample, template.format(word), self._weight(word) / len(words)) for word in words]
            if method.preserve_weight:
                words = _some(self.preserve, method.preserve_per_sample, "keep", *key)
                kept += [(sample, word, self._weight(word) / len(words)) for word in words]
        return coreferents, kept

    def _weight(self, word: str) -> float:
        return self.certainty.get(word, 1.0)


Asked = tuple[int, str, float]
"""A sample of the batch, the prompt that is asked at its latents, and the weight of the answer in the sample's sum."""


def _check(method: CRCE, task: EraseTask) -> None:
    """Refuse too few trajectories, and say what has no effect."""
    one_each(method.trajectories, task)
    alone = [concept.name for concept in task.concepts if not concept.synonyms]
    if method.coreferent_weight and alone:
        named = f"without synonyms, so that only the name is erased: {', '.join(alone)}"
        warnings.warn(f"{named}; give other words for it, or coreferents", stacklevel=2)
    if not method.coreferent_weight and len(alone) < len(task.concepts):
        warnings.warn("coreferent_weight is 0, so synonyms have no effect; set it to erase them too", stacklevel=2)


def _turn(task: EraseTask, i: int) -> tuple[Concept, str]:
    """The concept and the template of a trajectory: concepts take turns, and the templates of each do."""
    concept = task.concepts[i % len(task.concepts)]
    templates = task.templates or concept.templates
    return concept, templates[i // len(task.concepts) % len(templates)]


def _some(words: Sequence[str], count: int, *key: str | int) -> list[str]:
    """So many of the words, none twice, or all when there are fewer; from the key alone."""
    chosen: list[int] = torch.randperm(len(words), generator=seeded(*key))[:count].tolist()
    return [words[i] for i in chosen]
