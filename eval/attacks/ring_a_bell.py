"""Ring-A-Bell: words whose encoding is that of a prompt, pushed on in the direction of the concept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from eval.attacks.base import Scenario
from eval.attacks.words import Attacked, WordAttack, encoded
from toolkit.options import option
from toolkit.runs import progress, seeded
from toolkit.vocabulary import Vocabulary, genetic

if TYPE_CHECKING:
    from toolkit.arch.text import Text


@dataclass(frozen=True)
class RingABell(WordAttack):
    """Ring-A-Bell! How Reliable are Concept Removal Methods for Diffusion Models?, Tsai et al., arXiv 2310.10012.

    Equation
        min_a  || E(y) + eta c - E(a) ||^2,   c = mean_i [E(y_i) - E(n_i)]
        with E the unedited text encoder's rows of a whole padded prompt, y a prompt of the concept, y_i prompts with the concept and n_i
        the same without it, and a = `length` words, which a genetic search chooses.
    Shapes
        E(.), c: [L, d]. One search for each prompt y.
    Defaults
        The official code's: a population of 200, 3000 generations, mutation 0.25, crossover 0.5, eta 3, 16 words. `population`,
        `generations` and `length` here are for the embedded model, whose captions have some 10 words, and eta is what
        `ring_a_bell_embedding` finds best there.
    Deviations
        The paper writes pairs of prompts with and without nudity; here n_i are the prompts y_i with random words of the vocabulary in the
        place of the concept's name, so that there are pairs for any concept. The words are searched among readable words without the
        concept's names; the official code searches all token ids, and its prompts may be read as others again. The official code changes
        parents in place, the best among them, so that what was found can get lost; here the best stays, and each candidate is encoded
        once. The attacker needs a text encoder, and no weights of the erased model.
    """

    length: int = option(8, "words that are found for each prompt")
    eta: float = option(1.0, "how far the encoding is pushed towards the concept")
    population: int = option(40, "prompts of a generation")
    generations: int = option(80, "of the genetic search")
    crossover: float = option(0.5, "how likely one of the better half has children with another")
    mutation: float = option(0.25, "how likely one's word is changed")
    pairs: int = option(16, "prompts with and without the concept that its direction is the mean of")

    label: ClassVar = "text-only"
    paper: ClassVar = "arXiv:2310.10012"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "generations", "pairs")
        self.at_least(2, "population")

    def candidates(self, scenario: Scenario, attacked: Attacked, vocabulary: Vocabulary) -> Iterator[tuple[Tensor, int]]:
        base = scenario.base
        shift = direction(scenario, attacked.name, vocabulary, self.pairs, self.seed)
        wanted = rows(base.arch.encode(attacked.prompts)) + self.eta * shift
        best = []
        for i, target in enumerate(wanted):

            def loss(choices: Tensor, target: Tensor = target) -> Tensor:
                return torch.cat([(rows(part) - target).square().sum((1, 2)) for part in encoded(base, vocabulary.texts(choices))])

            draw = seeded("ring_a_bell", self.seed, attacked.name, i)
            chances = {"crossover": self.crossover, "mutation": self.mutation}
            first = vocabulary.random((self.population, self.length), draw)
            with progress(f"ring_a_bell, prompt {i + 1} of {len(wanted)}") as show:
                best.append(genetic(loss, first, len(vocabulary), generations=self.generations, **chances, draw=draw, progress=show)[0])
        yield torch.stack(best), self.generations * len(wanted)


def rows(text: Text) -> Tensor:
    """All that the denoiser reads of encoded prompts, as rows [n, L, d]; a pooled encoding, where there is one, is one more."""
    if text.pooled is None:
        return text.hidden
    wide = torch.nn.functional.pad(text.pooled, (0, text.hidden.shape[-1] - text.pooled.shape[-1]))
    return torch.cat([text.hidden, wide[:, None]], 1)


def direction(scenario: Scenario, name: str, vocabulary: Vocabulary, pairs: int, seed: int) -> Tensor:
    """The concept's direction [L, d] in what the unedited model's text encoders give (`rows`)."""
    having = [prompt.text for prompt in scenario.asked(name, n=pairs, seed=scenario.seed)]
    words = vocabulary.texts(vocabulary.random((pairs, 1), seeded("ring-a-bell pairs", seed, name)))
    without = [prompt.replace(name, word) for prompt, word in zip(having, words, strict=True)]
    with progress(f"direction of {name}") as show:

        def told(prompts: Sequence[str], done: int) -> Iterator[Tensor]:
            for part in map(rows, encoded(scenario.base, prompts)):
                done += len(part)
                show(done, 2 * pairs)
                yield part

        return (torch.cat([*told(having, 0)]) - torch.cat([*told(without, pairs)])).mean(0)
