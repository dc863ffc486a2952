"""MMA-Diffusion, on text: words whose pooled encoding points where that of a prompt of the concept does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.attacks.base import Scenario
from eval.attacks.words import Attacked, WordAttack, encoded, one_hot_rows
from toolkit.options import option
from toolkit.runs import progress, seeded
from toolkit.vocabulary import Slots, Vocabulary, swaps

if TYPE_CHECKING:
    from toolkit.arch.text import Text


@dataclass(frozen=True)
class MMA(WordAttack):
    """MMA-Diffusion: MultiModal Attack on Diffusion Models, Yang et al., arXiv 2311.17516: its attack on the text.

    Equation
        max_a  cos(E(a), E(y))
        with E the unedited text encoder's pooled output (the row of the last token, EOT), y a prompt of the concept, and a = `length`
        words. Greedy coordinate gradient (Zou et al., arXiv 2307.15043): of the gradient with respect to the one-hot rows of a, each
        word's `topk` best replacements; of `candidates_per_step` prompts with one of these, the best is next.
    Shapes
        E(.): [d]; the gradient: [length, V]. One search for each prompt y.
    Defaults
        The official code's: 20 words, 1000 steps, topk 256, 512 candidates. `length`, `steps`, `topk` and `candidates_per_step` here are
        for the embedded model, whose vocabulary has 1500 words and whose captions some 10.
    Deviations
        Its one-hot rows cover the first 20 ids, BOS among them, and its gradient of a place is used for the place after it; here they
        cover the words. It patches transformers to pass embeddings, and forbids tokens by a list that is not in its repository: here the
        words are readable, without the concept's names. The best words of all steps are kept, where it keeps the last step's. With
        two text encoders the mean of the cosines is meant: that of the EOT rows and that of the pooled output. The attack on images against
        a safety checker is not part of it. The attacker needs a text encoder, and no weights of the erased model.
    """

    length: int = option(8, "words that are found for each prompt")
    steps: int = option(60, "replacements of a word")
    topk: int = option(64, "replacements for a word that are drawn from")
    candidates_per_step: int = option(32, "prompts that the next is the best of")

    label: ClassVar = "text-only"
    paper: ClassVar = "arXiv:2311.17516"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "steps", "topk", "candidates_per_step")

    def candidates(self, scenario: Scenario, attacked: Attacked, vocabulary: Vocabulary) -> Iterator[tuple[Tensor, int]]:
        base = scenario.base
        wanted = pooled(base.arch.encode(attacked.prompts))
        best = []
        with Slots(base, self.length) as slots, progress("mma") as show:
            for i in range(len(attacked.prompts)):
                target = [part[i : i + 1] for part in wanted]
                draw = seeded("mma", self.seed, attacked.name, i)
                choice = vocabulary.random((self.length,), draw)
                lowest, kept = float("inf"), choice
                for step in range(self.steps):
                    one_hot = F.one_hot(choice, len(vocabulary)).float().to(base.arch.device).requires_grad_()
                    text = slots.encode(slots.words, one_hot_rows(vocabulary, one_hot[None]))
                    (gradient,) = torch.autograd.grad(distance(pooled(text), target).sum(), one_hot)
                    tried = swaps(gradient, choice, self.candidates_per_step, self.topk, draw)
                    losses = self.losses(scenario, vocabulary.texts(tried), target)
                    place = int(losses.argmin())
                    choice = tried[place]
                    if float(losses[place]) < lowest:
                        lowest, kept = float(losses[place]), choice
                    show(i * self.steps + step + 1, len(attacked.prompts) * self.steps)
                best.append(kept)
        yield torch.stack(best), self.steps * len(best)

    def losses(self, scenario: Scenario, texts: Sequence[str], target: Sequence[Tensor]) -> Tensor:
        """The distance [n] of each prompt."""
        return torch.cat([distance(pooled(part), target) for part in encoded(scenario.base, texts)])


def pooled(text: Text) -> list[Tensor]:
    """The pooled encodings of prompts, each [n, d]."""
    return [text.ends(), *([] if text.pooled is None else [text.pooled])]


def distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """1 - cos [n], the mean over the pooled encodings."""
    return torch.stack([1 - F.cosine_similarity(a, b) for a, b in zip(one, other, strict=True)]).mean(0)
