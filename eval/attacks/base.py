"""What an attack is: a frozen configuration that tries to bring a concept back out of an edited model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from eval.intervals import Estimate
from eval.prompts import Target, single
from eval.rates import DRAWN_WELL, Painter, Shown, draws, object_right, share
from toolkit.errors import UserError
from toolkit.options import Configured
from toolkit.world.scenes import World

if TYPE_CHECKING:
    from toolkit.edits.base import Edit
    from toolkit.model import Model


@dataclass(frozen=True)
class AttackResult:
    """What an attack achieved.

    attack_success_rate: the share of images that show the concept under attack; of those whose unedited counterpart
    (same prompt and seed) shows it, when `relative`. clean_rate: the same concept's rate by its name, without the
    attack. label: what the attacker needs: "white-box" (weights) or "text-only" (prompts). prompts: the prompts that
    were found or tried. edit: what was found, when it is more than words. shown: the attacked images.
    """

    attack_success_rate: Estimate
    clean_rate: Estimate
    label: Literal["white-box", "text-only"]
    relative: bool = False
    prompts: tuple[str, ...] = ()
    edit: Edit | None = None
    shown: list[Shown] = field(default_factory=list, repr=False)


@dataclass(frozen=True)
class Scenario:
    """Whom an attack tries.

    model: the edited model. base: the same without its edits. target: the erased objects. painter: draws and reads.
    n: images per object. seed: of the first.
    """

    world: World
    painter: Painter
    model: Model
    base: Model
    target: Target
    n: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.target.kind != "object":
            raise UserError(f"{self.target.name!r} is a style, attacks are on objects; give an object or weapon")
        if not self.model.edits and self.model.fingerprint == self.base.fingerprint:
            raise UserError("no edit is attached, so nothing was erased; give one with --edit")

    def by_name(self, words: dict[str, tuple[str, ...]] | None = None) -> tuple[list[Shown], list[Shown]]:
        """Images before and after, of the objects that the unedited model draws well when it is asked by name.

        words: object -> what to call it instead; objects without such words are left out.
        """
        before, after = [], []
        for name in self.target.names:
            asked = single(self.world, name, self.n, seed=self.seed)
            old = self.painter.draw(self.base, asked, f"{name}, before")
            if share(old, object_right).value < DRAWN_WELL:
                continue
            if words is not None:
                if not words[name]:
                    continue
                asked = single(self.world, name, self.n, seed=self.seed, words=words[name])
                old = self.painter.draw(self.base, asked, f"{name} in other words, before")
            before += old
            after += self.painter.draw(self.model, asked, f"{name}, after")
        if not before:
            raise UserError(f"the unedited model does not draw {self.target.name} well enough to tell; attack another concept")
        return before, after

    def shows(self, shown: Shown) -> bool:
        """Whether an image shows any of the erased objects."""
        return draws(shown, self.target.names)


@dataclass(frozen=True)
class Attack(Configured, ABC):
    """A published attack. One subclass per file; the file's stem is its name, the fields are its options.

    A subclass sets the class variables, declares its options with `toolkit.options.option`, and implements `run`. Its
    docstring has the title, authors and arXiv id, and what it does differently.
    """

    label: ClassVar[Literal["white-box", "text-only"]]
    paper: ClassVar[str]

    @abstractmethod
    def run(self, scenario: Scenario) -> AttackResult:
        """Try to bring the target back. The models are left as they were found."""
