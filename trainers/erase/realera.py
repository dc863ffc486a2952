"""RealEra: a concept is erased with random embeddings around it, and those further away stay: in closed form, then by training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import cycle, islice
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.closed_form.realera_embedding import RealEraEmbedding
from pipelines.closed_form.rows import KeepChoice, Nothing, Placed, encode_prompts, fill
from toolkit.arch.text import Text
from toolkit.concepts import Concept, EraseTask, Task, expect
from toolkit.errors import UserError
from toolkit.method import option
from toolkit.runs import seeded
from trainers.erase.options import Steered, drawing_options
from trainers.erase.prompts import concept_prompts, one_each
from trainers.erase.samples import TrajectorySteps
from trainers.loop import Batch, Objective
from trainers.trajectories import Trajectories
from trainers.weights import LoraWeights

if TYPE_CHECKING:
    from toolkit.edits.base import Edit, EditInfo
    from toolkit.model import Model


@dataclass(frozen=True)
class RealEra(Steered):
    """RealEra: Semantic-level Concept Erasure via Neighbor-Concept Mining, Liu et al., arXiv 2410.09140.

    Both stages of the method: its closed form, which is `realera_embedding`, and low-rank factors that are trained on top of it.

    Equation
        min_{A, B}  E_{x_t, t}  || e'(x_t, c, t) - s ||^2  +  alpha / n  sum_k || e'(x_t, c + x_k, t) - s ||^2
                                +  beta / m  sum_k || e'(x_t, c + y_k, t) - e*(x_t, c + y_k, t) ||^2
        s = e*(x_t, b, t) - eta (e*(x_t, c, t) - e*(x_t, t))
        with e* the frozen original model, e' the model with W + A B for every weight W that the closed form gives to the layers that
        read the text, x_t what e* has denoised of the concept's prompt c so far, at a uniform step of the sampler, and the base b: no
        prompt, or the anchor's prompt where the concept has an anchor. n neighbours c + x and m prompts beyond c + y are drawn anew
        for every sample. With e the row of the concept's last token in c, as in the closed form
            |x| <= D1,  S1 <= cos(e, e + x) <= S2,       D1 <= |y| <= D2,  cos(e, e + y) <= S1,
        and every row r of the prompt that knows of the concept moves as e does: e + x = a e + |e| w and r + x = a r + |r| w, w being
        orthogonal to e. A pooled encoding is moved by embeddings of its own. On a model that predicts velocity the same is done in
        velocities.

    Shapes
        e', e*, x_t: [batch, c, h', w']; the denoiser is run on batch * (1 + n + m) of them, and again without a graph on batch * m.
        e, r, w: [d]. A: [o, rank], B: [rank, d].

    Defaults
        The paper's are the two stages, the two kinds of embeddings and what is asked of them. It comes without code, and its numbers
        are not known to us. Those of the embeddings are `realera_embedding`'s. 500 steps with one sample each, eta 1, guidance 3 and
        50 steps of the sampler are those of a re-implementation by CRCE's authors. rank 4 and the learning rate 1e-4 are what
        diffusers' training scripts for LoRA have. alpha (`neighbour_weight`) and beta (`beyond_weight`) 1 are ours.

    Deviations
        The re-implementation has no closed form and no low-rank factors: it trains keys and values at 2e-5, one step on the concept
        and the next on the sums over its neighbours and what is beyond; here each step is on all three, with means. It adds one random
        tensor to the whole encoded prompt, BOS and padding included. Here BOS and what stands before the concept stay, as the edited
        layers read them in every prompt, and the other rows move together: noise of its own for each of the padding's many rows would
        cancel out in the attention that reads them. What is beyond would keep drawing the concept if those rows stayed, as they
        know of it too. Latents are the frozen model's `trajectories`, as in ESD, which cost one drawing and give s with it, instead
        of a new drawing by the trained model for every step. Where it is told what to erase the concept from, it trains that prompt;
        here the concept's own is trained, towards the anchor. The sampler is the family's own solver instead of DDIM. Every template
        around every word of the concept is trained. What the task preserves is kept by the closed form alone; closed_form=false
        leaves that stage out. Both stages are one edit, the sum of their changes.
    """

    closed_form: bool = option(True, "start from the closed form (realera_embedding); false: train alone")
    rank: int = option(4, "of the trained factors")
    neighbour_weight: float = option(1.0, "weight of the neighbours in training (alpha)")
    beyond_weight: float = option(1.0, "weight of what is beyond staying as it is in training (beta)")
    neighbours: int = option(5, "random embeddings near the concept that are erased, for each prompt or sample")
    beyond: int = option(3, "random embeddings further away that are kept, for each prompt or sample")
    radius: float = option(1.0, "how far neighbours are from the concept at most, in norms of its embedding")
    beyond_radius: float = option(1.6, "how far kept embeddings are at most; at least they are as far as radius")
    min_similarity: float = option(0.5, "cosine similarity to the concept that neighbours have at least, and kept embeddings at most")
    max_similarity: float = option(0.9, "cosine similarity to the concept that neighbours have at most")
    nothing: Nothing = option("empty_prompt", "where a concept without an anchor goes: empty_prompt, or the template without it")
    rows: Literal["last_subject", "tail_aligned", "all"] = option("all", "closed form: token rows that are moved")
    erase_scale: float = option(1.0, "closed form: weight of each moved row and neighbour")
    preserve_scale: float = option(0.1, "closed form: weight of each kept row, random ones among them")
    preserve_rows: KeepChoice = option("all", "closed form: rows of preserved prompts that are kept: all, to_eot or last_subject")
    lamb: float = option(0.5, "closed form: weight of staying close to the given weights")
    max_train_steps: int = option(500, "optimizer steps")
    learning_rate: float = option(1e-4, "step size")

    paper: ClassVar = "arXiv:2410.09140"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.embedding().check()
        self.at_least(1, "rank")
        if min(self.neighbour_weight, self.beyond_weight) <= 0:
            given = f"neighbour_weight {self.neighbour_weight}, beyond_weight {self.beyond_weight}"
            raise UserError(f"{given}; needs more than 0 of each; to leave one of the two kinds out, give neighbours or beyond 0")
        for without, unread in (
            ("closed_form false", () if self.closed_form else ("rows", "erase_scale", "preserve_scale", "preserve_rows", "lamb")),
            ("neighbours 0", () if self.neighbours else ("neighbour_weight", "max_similarity")),
            ("beyond 0", () if self.beyond else ("beyond_weight", "beyond_radius")),
            ("neighbours 0 and beyond 0", () if self.neighbours or self.beyond else ("radius", "min_similarity")),
        ):
            if given := self.changed(unread):
                raise UserError(f"{', '.join(given)} given beside {without}, which leaves it without effect; leave out one of the two")

    def embedding(self) -> RealEraEmbedding:
        """The first stage, which also draws the embeddings of the second."""
        return RealEraEmbedding(**{field.name: getattr(self, field.name) for field in fields(RealEraEmbedding)})

    @contextmanager
    def objective(self, model: Model, task: Task) -> Iterator[tuple[Objective, Callable[[EditInfo], Edit]]]:
        task = expect(EraseTask, task)
        if task.preserve and not self.closed_form:
            why = "closed_form is false, and training keeps none of what the task preserves, which has no effect"
            warnings.warn(f"{why}; leave closed_form at true to keep it", stacklevel=2)
        one_each(self.trajectories, task)
        alignment = Alignment(model, self, task)
        with alignment.weights:
            yield alignment, alignment.weights.edit

    @classmethod
    def example_task(cls, model: Model) -> EraseTask:
        """An object with an anchor and one without, and what stays."""
        return EraseTask((Concept("cat", anchor="dog"), Concept("bird")), preserve=("cow",))


class Alignment(Objective):
    """The distances of a concept and its neighbours to where it is steered, and of what is beyond to where it was."""

    def __init__(self, model: Model, method: RealEra, task: EraseTask) -> None:
        self.arch, self.method, self.embedding = model.arch, method, method.embedding()
        encoded = encode_prompts(model.arch, task, method.nothing)
        start = self.embedding.fit(model, task) if method.closed_form else None
        self.module = self.weights = LoraWeights(model.arch.text_linears(), method.rank, seed=method.seed, start=start)
        stream = model.arch.text_streams()["hidden"]
        found = zip(encoded.pairs, encoded.rows(stream.segments(encoded.text)).pairs, strict=True)
        subjects = {fill(template, word): place for (template, word, *_), (place, _) in found}
        pairs = concept_prompts(task, without_anchor="nothing" if method.nothing == "empty_prompt" else "template")
        drawn = list(islice(cycle((" ".join(prompt.split()), base) for prompt, base in pairs), method.trajectories))
        prompts, bases = [prompt for prompt, _ in drawn], [base for _, base in drawn]
        self.places = [subjects[prompt] for prompt in prompts]
        seeds, options = range(method.seed, method.seed + len(drawn)), drawing_options(method, model)
        seen = Trajectories.of(model, prompts, seeds, beside={"base": bases}, **options)
        target = seen.outputs["base"] - method.eta * (seen.outputs["prompt"] - seen.outputs["negative"])
        self.drawn = TrajectorySteps(model.arch, prompts, seen.latents, seen.t, target)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        method, places = self.method, batch.places(self.method.train_batch_size)
        rows, steps = zip(*(self.drawn.pick("erase", method.seed, batch.step, place) for place in places), strict=True)
        latents, t, text, target = self.drawn.at(rows, steps, self.arch.device)
        samples = torch.arange(len(rows), device=latents.device)
        parts = {"erase": (1.0, text, samples, target)}
        if method.neighbours:
            near, of = self._mined("neighbours", text, rows, batch), samples.repeat_interleave(method.neighbours)
            parts["neighbours"] = (method.neighbour_weight, near, of, target[of])
        if method.beyond:
            beyond, of = self._mined("beyond", text, rows, batch), samples.repeat_interleave(method.beyond)
            with self.weights.off(), torch.no_grad():
                parts["beyond"] = (method.beyond_weight, beyond, of, self.arch.predict(latents[of], t[of], beyond))
        weights, texts, each, targets = zip(*parts.values(), strict=True)
        of = torch.cat(each)
        output = self.arch.predict(latents[of], t[of], Text.cat(texts)).split([len(part) for part in targets])
        errors = [F.mse_loss(part, wanted) for part, wanted in zip(output, targets, strict=True)]
        total = torch.stack([weight * error for weight, error in zip(weights, errors, strict=True)]).sum()
        return total, {name: error.item() for name, error in zip(parts, errors, strict=True)}

    def _mined(self, what: Literal["neighbours", "beyond"], text: Text, rows: Sequence[int], batch: Batch) -> Text:
        """Neighbours of each sample's prompt, or what is beyond them, all of one sample before those of the next.

        rows: the trajectory of each sample.
        """
        method, mined = self.method, []
        draw, count = (self.embedding.near, method.neighbours) if what == "neighbours" else (self.embedding.further, method.beyond)
        for i, (row, place) in enumerate(zip(rows, batch.places(method.train_batch_size), strict=True)):
            make = seeded(what, method.seed, batch.step, place)
            mined.append(moved_together(text[[i] * count], self.places[row], partial(draw, make=make)))
        return Text.cat(mined)


def moved_together(text: Text, place: Placed, draw: Callable[[Tensor], Tensor]) -> Text:
    """One prompt k times, each with an embedding of its own in the concept's place.

    text: the prompt, k times. draw: a row [1, d] -> k embeddings around it [k, d].
    """
    e, first = place.hidden[place.end - 1].cpu().double(), place.start if place.causal else place.leading
    drawn = draw(e[None])
    share = drawn @ e / e.square().sum()
    new = (drawn - share[:, None] * e) / e.norm()
    rows = place.hidden[first:].cpu().double()
    moved = share[:, None, None] * rows + rows.norm(dim=1, keepdim=True) * new[:, None]
    hidden = torch.cat([text.hidden[:, :first], moved.to(text.hidden)], 1)
    pooled = text.pooled if text.pooled is None else draw(text.pooled[:1].cpu()).to(text.pooled)
    return replace(text, hidden=hidden, pooled=pooled)
