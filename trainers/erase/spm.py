"""SPM: one-dimensional adapters that steer a concept away, are anchored elsewhere, and act where a prompt is near the concept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.arch.text import Text
from toolkit.concepts import Concept, EraseTask, Task
from toolkit.edits.gated import Gate, Gated
from toolkit.errors import UserError
from toolkit.method import option
from toolkit.runs import seeded
from toolkit.sample import partly_denoised
from trainers.erase.options import TrainedEraser, drawing_options
from trainers.erase.prompts import concept_prompts, erase_task
from trainers.loop import Batch, Objective
from trainers.weights import LoraWeights

if TYPE_CHECKING:
    from toolkit.edits.base import Edit, EditInfo
    from toolkit.model import Model

SHORTEST, LONGEST = 0.8, 1.2  # an anchor, in norms of the concept's prompt
NEEDED = {"anchors": "anchor_weight", "gate_floor": "gate"}  # option -> the one without which it has no effect


@dataclass(frozen=True)
class SPM(TrainedEraser):
    """One-dimensional Adapter to Rule Them All: Concepts, Diffusion Models and Erasing Applications, Lyu et al., arXiv 2312.16145.

    Equation
        min_{u, d}  E_{x_t, t} || e_ud(x_t, c, t) - [e*(x_t, b, t) - eta (e*(x_t, c, t) - e*(x_t, b, t))] ||^2
                  + anchor_weight / (m + 1)  sum_{a_0 .. a_m} || e_ud(x_t, a, t) - e*(x_t, a, t) ||^2
        with e* the frozen model, e_ud the same with W + u d^T in place of each adapted W, x_t what e_ud has denoised of the concept's
        prompt c so far, at a uniform step of the sampler, and the base b: no prompt, or the anchor's prompt where the concept has an
        anchor. a_0 is no prompt; a_1 .. a_m are random directions in the space of encoded prompts, 0.8 to 1.2 times as long as c, and
        one of them is kept with probability 1 - cos(a, c) (latent anchoring). On a model that predicts velocity the same is done in
        velocities. When it is used, each prompt p has W + g(p) u d^T (facilitated transport) with
            g(p) = ramp(max over names n of max(cos(p - p_0, n - p_0), |tokens of p and n| / |tokens of n|)),
            ramp(s) = (s - gate_floor) / (1 - gate_floor) between 0 and 1.

    Shapes
        e, x_t: [batch, c, h', w']. u: [o, rank], d: [i, rank]. p, n and no prompt p_0, each at its end of text: [width]. The denoiser
        is run on batch * (2 + anchors) of the x_t, and without a graph on batch * (3 + anchors), beside what the sampler does.

    Defaults
        Rank 1, eta 1, 4 anchors with weight 1000, 3000 steps of one sample at 1e-4 with weight decay 0.01, 30 steps of the sampler and
        guidance 3 are the official code's. gate_floor is ours. The gate's names are the concepts' names and synonyms.

    Deviations
        The paper adapts every linear layer and convolution of the transformer blocks; here it is the attention's projections, which
        are what low-rank training adapts elsewhere. The cosine is between ends of text without what every prompt has in common (no
        prompt), where the official code takes that of all 77 encoded tokens: padding and the start of the text make up most of these,
        so that no prompt at all has 0.8 there. The ramp is ours too: with gate_floor 0 what is left of a cosine acts on everything
        else. The gate is one number for each row of a batch, so that the side without a prompt of guidance stays as it is, where the
        official code takes that of the first prompt for all. No prompt is an anchor here, as it is for the other side of guidance;
        in the official code it cancels. An anchor's pooled vector, on models that read one, is drawn like the rest. Every template
        around every word of the concept is trained, where the official code trains the bare name. `steps_per_drawing` lets several
        steps share a drawing, which is most of the cost. The sampler is the family's own solver instead of DDIM, and its first step
        is trained on too. The schedule is one cosine instead of three with warm-up, AdamW's state is not in 8 bits, and adapters
        start as LoRA does. What the task preserves counts by `preserve_weight` alone, as one more anchor for each sample, which the
        paper does not have; with its default of 0 it has no effect.
    """

    rank: int = option(1, "of the change of each layer")
    eta: float = option(1.0, "how far beyond the base the concept is steered away")
    anchors: int = option(4, "random encoded prompts that stay as they are, for each sample")
    anchor_weight: float = option(1000.0, "weight of these and of no prompt staying as they are")
    preserve_weight: float = option(0.0, "weight of preserved prompts staying as they are")
    gate: bool = option(True, "act on prompts near the concept alone; without, the edit is an ordinary low-rank one, for other tools too")
    gate_floor: float = option(0.8, "similarity of a prompt to the concept from which the edit acts on it")
    steps_per_drawing: int = option(1, "optimizer steps that are taken on the same partly denoised latents and anchors")
    sampling_steps: int = option(30, "steps of the sampler, of which a drawing makes a part")
    guidance: float = option(3.0, "guidance scale of the drawings")
    max_train_steps: int = option(3000, "optimizer steps")
    learning_rate: float = option(1e-4, "step size")
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = option("cosine", "how the step size changes")

    paper: ClassVar = "arXiv:2312.16145"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "rank", "anchors", "steps_per_drawing", "sampling_steps", "guidance")
        self.at_least(0, "anchor_weight", "preserve_weight")
        if not self.gate_floor < 1:
            raise UserError(f"gate_floor is {self.gate_floor}, needs less than 1, where the concept itself is; give e.g. 0.8")
        for name in self.changed(NEEDED):
            needed = NEEDED[name]
            if not getattr(self, needed):
                raise UserError(f"{name} has no effect with {needed}={getattr(self, needed)}; leave it out, or set {needed}")

    @contextmanager
    def objective(self, model: Model, task: Task) -> Iterator[tuple[Objective, Callable[[EditInfo], Edit]]]:
        task = erase_task(task, self.preserve_weight)
        words = list(dict.fromkeys(word for concept in task.concepts for word in concept.words))
        gate = Gate.of(model.arch, words, self.gate_floor) if self.gate else None
        adapter = Adapter(model, self, task)

        def edit(info: EditInfo) -> Edit:
            low_rank = adapter.weights.edit(info)
            return low_rank if gate is None else Gated(info, low_rank, gate)

        with adapter.weights:
            yield adapter, edit

    @classmethod
    def example_task(cls, model: Model) -> EraseTask:
        """An object with an anchor, and one without."""
        return EraseTask((Concept("cat", anchor="dog"), Concept("bird")))


@dataclass(frozen=True)
class Drawing:
    """What is asked of the model, and what it should answer.

    latents, target [n, c, h', w']; t [n]; text: n encoded prompts. First those of the concept, one for each sample, then the anchors,
    then what is preserved.
    """

    latents: Tensor
    t: Tensor
    text: Text
    target: Tensor


class Adapter(Objective):
    """The distance of the concept's prediction to what is beyond the base's, and of the anchors' to what they were.

    drawn: part of the batch -> the number of its drawing and the drawing, for the steps that share it.
    """

    def __init__(self, model: Model, method: SPM, task: EraseTask) -> None:
        self.module = self.weights = LoraWeights(model.arch.lora_targets(), method.rank, seed=method.seed)
        self.model, self.arch, self.method = model, model.arch, method
        self.words, self.preserve = concept_prompts(task), task.preserve if method.preserve_weight else ()
        prompts = dict.fromkeys(["", *(prompt for pair in self.words for prompt in pair), *self.preserve])
        self.row, self.text = {prompt: row for row, prompt in enumerate(prompts)}, model.arch.encode(list(prompts))
        self.drawn: dict[int, tuple[int, Drawing]] = {}

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        method, size = self.method, self.method.train_batch_size
        seen = self._drawing(batch)
        errors = F.mse_loss(self.arch.predict(seen.latents, seen.t, seen.text), seen.target, reduction="none").flatten(1).mean(1)
        still = size * (1 + method.anchors) if method.anchor_weight else 0
        parts = dict(zip(("erase", "anchor", "keep"), errors.split([size, still, len(errors) - size - still]), strict=True))
        means = {name: part.mean() for name, part in parts.items() if len(part)}
        weights = {"erase": 1.0, "anchor": method.anchor_weight, "keep": method.preserve_weight}
        return torch.stack([weights[name] * mean for name, mean in means.items()]).sum(), {name: m.item() for name, m in means.items()}

    def _drawing(self, batch: Batch) -> Drawing:
        """The one of this step, made by the model as it was when its first step came."""
        number = batch.step // self.method.steps_per_drawing
        if (found := self.drawn.get(batch.part)) is None or found[0] != number:
            found = self.drawn[batch.part] = number, self._draw(number, batch.places(self.method.train_batch_size))
        return found[1]

    @torch.no_grad()
    def _draw(self, number: int, places: range) -> Drawing:
        method = self.method
        pairs: list[tuple[str, str]] = []
        seeds, done, anchors, kept = list[int](), list[int](), list[Text](), list[str]()
        for place in places:
            draw = seeded("spm", method.seed, number, place)
            sizes = (len(self.words), method.sampling_steps, 2**31, max(len(self.preserve), 1))
            word, steps, seed, keep = (int(torch.randint(size, (), generator=draw)) for size in sizes)
            pairs.append(self.words[word])
            done.append(steps)
            seeds.append(seed)
            kept += self.preserve[keep : keep + 1]
            if method.anchor_weight:
                anchors += [self._of([""]), *(elsewhere(self._of([pairs[-1][0]]), draw) for _ in range(method.anchors))]
        concepts, bases = ([pair[side] for pair in pairs] for side in (0, 1))
        x, t = partly_denoised(self.model, concepts, seeds, done, **drawing_options(method, self.model))
        still = [*anchors, *([self._of(kept)] if kept else ())]
        text = Text.cat([self._of(concepts), *still])
        samples = torch.arange(len(pairs), device=x.device)
        of = torch.cat([samples, samples.repeat_interleave(len(anchors) // len(pairs)), *([samples] if kept else ())])
        with self.weights.off():
            asked = torch.cat([samples, of])
            base, concept, same = self.arch.predict(x[asked], t[asked], Text.cat([self._of(bases), text])).split(
                [len(pairs), len(pairs), len(of) - len(pairs)]
            )
        return Drawing(x[of], t[of], text, torch.cat([base - method.eta * (concept - base), same]))

    def _of(self, prompts: list[str]) -> Text:
        return self.text[torch.tensor([self.row[prompt] for prompt in prompts], device=self.text.hidden.device)]

    def state(self) -> Any:
        """The drawings of this process that steps to come may share; the others make theirs anew."""
        if self.method.steps_per_drawing == 1:
            return None
        return {part: (number, {**vars(drawing), "text": vars(drawing.text)}) for part, (number, drawing) in self.drawn.items()}

    def load_state(self, state: Any) -> None:
        drawn = {part: (number, Drawing(**{**values, "text": Text(**values["text"])})) for part, (number, values) in (state or {}).items()}
        self.drawn = drawn


def elsewhere(text: Text, draw: torch.Generator) -> Text:
    """One encoded prompt -> one in a random direction, about as long; the nearer to it, the more rarely."""
    pooled = None if text.pooled is None else _elsewhere(text.pooled, draw)
    return Text(_elsewhere(text.hidden, draw), text.ids, text.length, pooled)


def _elsewhere(rows: Tensor, draw: torch.Generator) -> Tensor:
    while True:
        drawn = torch.randn(rows.shape, generator=draw).to(rows)
        if torch.rand((), generator=draw) < 1 - F.cosine_similarity(drawn.flatten(), rows.flatten(), dim=0).item():
            break
    length = SHORTEST + (LONGEST - SHORTEST) * torch.rand((), generator=draw).item()
    return drawn * (length * rows.norm() / drawn.norm())
