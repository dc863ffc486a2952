"""What attacks by existing words share: the prompts that they are tried on, the images that count, and random words as a control."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from eval.attacks.base import PICTURE_SEEDS, Attack, AttackResult, Scenario, Spent
from eval.prompts import Prompt
from eval.rates import Shown, share
from toolkit.options import option
from toolkit.runs import seeded
from toolkit.vocabulary import Vocabulary

if TYPE_CHECKING:
    from toolkit.arch.text import Text
    from toolkit.model import Model

BATCH = 64  # prompts that are encoded at once
RANDOM = "random_rate"  # what random words of the same length do, among a result's other rates
CHECK_SEED = 2 * PICTURE_SEEDS  # images that an attacker looks at while searching have seeds from here on


@dataclass(frozen=True)
class Attacked:
    """Prompts of a concept that words are searched for.

    prompts: the prompts, by the concept's name. latents [n, c, h', w']: a picture of each by the unedited model, where the attack has
    some.
    """

    name: str
    prompts: tuple[str, ...]
    latents: Tensor | None = None
    drawn: int = 0

    def said(self, words: Sequence[str], place: Literal["before", "instead"]) -> list[str]:
        """The prompts with these words, one of them for each."""
        return [f"{found} {prompt}" if place == "before" else found for found, prompt in zip(words, self.prompts, strict=True)]


@dataclass(frozen=True)
class WordAttack(Attack, ABC):
    """Base of the attacks that find words of the model's vocabulary, the concept's names left out, for some prompts of the concept.

    The rate is over images of other seeds than those that the words were found on, spread over the prompts. Beside it stands
    `random_rate`: as many images of the same prompts with words drawn at random, anew for each image. A subclass yields its words after
    each part of its search. If it looks at images (`looks`), each prompt is drawn once then; words that show the concept are kept, and
    the search ends when there are such for every prompt.
    """

    length: int = option(5, "words that are found for each prompt")
    prompts: int = option(8, "prompts of the concept that words are found for")
    seed: int = option(0, "of what is drawn")

    place: ClassVar[Literal["before", "instead"]] = "instead"  # whether the words stand before the prompt, or alone
    pictured: ClassVar[bool] = False  # whether the search needs a picture of each prompt
    looks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.at_least(1, "length", "prompts")

    @abstractmethod
    def candidates(self, scenario: Scenario, attacked: Attacked, vocabulary: Vocabulary) -> Iterator[tuple[Tensor, int]]:
        """Choices [prompts, length] of the vocabulary, after each part of the search, and how many steps there have been so far."""

    def run(self, scenario: Scenario) -> AttackResult:
        names = scenario.names()
        _, clean = scenario.by_name()
        without = [word for name in scenario.target.names for word in scenario.words(name)]
        vocabulary = Vocabulary.of(scenario.model, without)
        shown: list[Shown] = []
        control: list[Shown] = []
        spent = Spent()
        for name in names:
            attacked = self.attacked(scenario, name)
            found, cost = self.found(scenario, attacked, vocabulary)
            spent = Spent(spent.steps + cost.steps, spent.images + cost.images)
            words = [found[i % len(found)] for i in range(scenario.n)]
            shown += self.draw(scenario, attacked, words, scenario.seed, f"attack {name}")
            random = vocabulary.random((scenario.n, self.length), seeded("random words", self.seed, name))
            control += self.draw(scenario, attacked, vocabulary.texts(random), scenario.seed, f"random words, {name}")
        return self.result(scenario, shown, clean, spent=spent, beside={RANDOM: share(control, scenario.shows)})

    def attacked(self, scenario: Scenario, name: str) -> Attacked:
        """The prompts, with pictures where they are needed."""
        if self.pictured:
            pictures = scenario.pictures(name, self.prompts)
            texts = tuple(caption.format(name) for caption in pictures.captions)
            return Attacked(name, texts, pictures.latents, pictures.drawn)
        return Attacked(name, tuple(prompt.text for prompt in scenario.asked(name, n=self.prompts)))

    def found(self, scenario: Scenario, attacked: Attacked, vocabulary: Vocabulary) -> tuple[list[str], Spent]:
        """The words for each prompt, and what they cost."""
        found, broken = [""] * len(attacked.prompts), torch.zeros(len(attacked.prompts), dtype=torch.bool)
        spent = Spent(0, attacked.drawn)
        for choices, steps in self.candidates(scenario, attacked, vocabulary):
            texts, spent = vocabulary.texts(choices), replace(spent, steps=steps)
            found = [kept if done else new for kept, new, done in zip(found, texts, broken, strict=True)]
            if self.looks:
                drawn = self.draw(scenario, attacked, found, CHECK_SEED + self.seed, "look")
                spent = replace(spent, images=spent.images + int((~broken).sum()))  # of words that are kept, the images are too
                broken = torch.tensor([scenario.shows(one) for one in drawn])
                if broken.all():
                    break
        return found, spent

    def draw(self, scenario: Scenario, attacked: Attacked, words: Sequence[str], seed: int, title: str) -> list[Shown]:
        """An image for each of the words, with the prompts in turn, each time round with the next seed."""
        (like,) = scenario.asked(attacked.name, n=1)  # of its scene only the concept counts
        count = len(attacked.prompts)
        prompts: list[Prompt] = []
        for start in range(0, len(words), count):
            part = words[start : start + count]
            texts = replace(attacked, prompts=attacked.prompts[: len(part)]).said(part, self.place)
            prompts += [replace(like, text=text, seed=seed + start // count) for text in texts]
        return scenario.painter.draw(scenario.model, prompts, title)


def one_hot_rows(vocabulary: Vocabulary, weights: Tensor) -> dict[str, Tensor]:
    """Component -> rows [..., d] that weights [..., V] of the words mean."""
    return {part: weights @ rows for part, rows in vocabulary.rows.items()}


def encoded(model: Model, prompts: Sequence[str]) -> Iterator[Text]:
    """Prompts as the text encoders give them, `BATCH` at a time."""
    return (model.arch.encode(prompts[i : i + BATCH]) for i in range(0, len(prompts), BATCH))
