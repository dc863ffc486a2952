"""Paraphrase: ask for the erased object by words that no method was given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from eval.attacks.base import Attack, AttackResult, Scenario
from eval.rates import share
from toolkit.errors import UserError
from toolkit.options import option


@dataclass(frozen=True)
class Paraphrase(Attack):
    """Prompts with other words for the concept, as users find them; no paper of its own.

    The embedded world holds back half of every object's synonyms from all methods; the model learnt each of them. The
    rate is over the images that the unedited model, given the same prompt and seed, draws right.
    """

    words: Literal["held_back", "given", "all"] = option("held_back", "which synonyms: held_back, given, or all")

    label: ClassVar = "text-only"
    paper: ClassVar = ""

    def run(self, scenario: Scenario) -> AttackResult:
        things = scenario.world.things
        words = {
            name: things[name].synonyms if self.words == "all" else getattr(things[name], self.words) for name in scenario.target.names
        }
        if not any(words.values()):
            raise UserError(f"the world knows no {self.words} synonyms of {scenario.target.name}; attack another concept")
        _, clean = scenario.by_name()
        before, after = scenario.by_name(words)
        drawn = [new for old, new in zip(before, after, strict=True) if scenario.shows(old)]
        return AttackResult(
            attack_success_rate=share(drawn, scenario.shows),
            clean_rate=share(clean, scenario.shows),
            label=self.label,
            relative=True,
            prompts=tuple(dict.fromkeys(item.prompt.text for item in after)),
            shown=after,
        )
