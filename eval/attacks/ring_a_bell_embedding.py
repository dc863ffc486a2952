"""Ring-A-Bell on embeddings: the concept's direction, added to what the denoiser reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from eval.attacks.base import Attack, AttackResult, Scenario, Spent
from eval.attacks.ring_a_bell import direction, rows
from eval.rates import Shown
from toolkit.options import option
from toolkit.sample import Hook, State
from toolkit.vocabulary import Vocabulary


@dataclass(frozen=True)
class RingABellEmbedding(Attack):
    """Ring-A-Bell! How Reliable are Concept Removal Methods for Diffusion Models?, Tsai et al., arXiv 2310.10012, as the code of RECE
    (Gong et al., arXiv 2407.12383) runs it.

    Equation
        what the denoiser reads  =  E(y) + eta c
        with E the unedited text encoder, y a prompt of the concept and c the concept's direction as in `ring_a_bell`.
    Shapes
        E(y), c: [L, d].
    Defaults
        RECE's eta is 3 for nudity and 0.9 for a style. Of 0.5, 1, 2 and 3, 1 brought back most pistols on an `esd` of the embedded model,
        and 2 and 3 none.
    Deviations
        The pairs that c is the mean of are `ring_a_bell`'s. It finds no prompt: nobody can type these embeddings, so that its rates are not
        comparable with those of `ring_a_bell`, under whose name they are published. RECE's code averages the means of its batches, of
        which the last may be smaller; here every pair counts alike. What changes is the encoders' output, so it is no token edit. The
        attacker needs to run the denoiser on embeddings.
    """

    eta: float = option(1.0, "how far the encoding is pushed towards the concept")
    pairs: int = option(16, "prompts with and without the concept that its direction is the mean of")
    seed: int = option(0, "of the words that stand in the concept's place")

    label: ClassVar = "white-box"
    paper: ClassVar = "arXiv:2310.10012"

    def __post_init__(self) -> None:
        self.at_least(1, "pairs")

    def run(self, scenario: Scenario) -> AttackResult:
        names = scenario.names()
        _, clean = scenario.by_name()
        vocabulary = Vocabulary.of(scenario.base, [word for name in scenario.target.names for word in scenario.words(name)])
        shown: list[Shown] = []
        for name in names:
            hook = Pushed(scenario, self.eta * direction(scenario, name, vocabulary, self.pairs, self.seed))
            shown += scenario.painter.draw(scenario.model, scenario.asked(name), f"attack {name}", hooks=[hook])
        return self.result(scenario, shown, clean, spent=Spent())


class Pushed(Hook):
    """Samples with the base model's own encoding of the prompts, and a shift [L, d] of all its `rows`."""

    def __init__(self, scenario: Scenario, shift: Tensor) -> None:
        self.base, self.shift = scenario.base, shift

    def on_prompt(self, state: State) -> None:
        text = self.base.arch.encode(list(state.prompts))
        moved = (rows(text) + self.shift).to(text.hidden)
        count = text.hidden.shape[1]
        pooled = None if text.pooled is None else moved[:, count, : text.pooled.shape[1]]
        state.texts["prompt"] = replace(text, hidden=moved[:, :count], pooled=pooled)
