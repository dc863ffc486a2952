"""What is measured about a model and its edits on the embedded world: what is erased, retained and learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from eval import prompts as make
from eval.fidelity import oracle_kid
from eval.intervals import Estimate
from eval.metrics.base import Measured, Metric
from eval.metrics.harmonic import harmonic_mean
from eval.prompts import Prompt, Target
from eval.rates import (
    DRAWN_WELL,
    Painter,
    Shown,
    background_right,
    by_object,
    drawn_instead,
    drawn_well,
    most_drawn,
    object_right,
    relative,
    retained,
    share,
    style_right,
    target_accuracy,
)
from toolkit.errors import UserError
from toolkit.world.scenes import World

if TYPE_CHECKING:
    from toolkit.model import Model

RETAINED_PER_ERASED = 8  # images of everything else, in all, per image of one erased concept
WORST_RETAINED = 0.7  # no object should fall below this share of its own before


@dataclass
class Report:
    """metrics: name -> value, low, high, n and what measured it. per_concept: concept -> its numbers."""

    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    per_concept: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, name: str, estimate: Estimate, by: dict[str, Any], **more: Any) -> None:
        """Add a metric; more: what else belongs to it."""
        self.metrics[name] = {**estimate.as_json(), **more, "measured_by": by}


@dataclass
class Suite:
    """Measures `model` against `base`, the same model without its edits.

    n: images per erased concept; eight times as many for everything else. metrics and kid: what is measured besides the
    rates, the former on the images of everything else (and of what is erased, where a metric wants both), the latter on what is
    drawn instead.
    """

    world: World
    painter: Painter
    model: Model
    base: Model
    n: int = 64
    seed: int = 0
    metrics: tuple[Metric, ...] = ()
    kid: bool = True
    report: Report = field(default_factory=Report)
    _of_target: tuple[list[Shown], list[Shown]] = field(default=([], []), repr=False)

    def __post_init__(self) -> None:
        if self.n < 1:
            raise UserError(f"--n is {self.n}, needs at least 1; give the number of images per concept")

    @property
    def edited(self) -> bool:
        """Whether there is anything to compare."""
        return bool(self.model.edits) or self.model.fingerprint != self.base.fingerprint

    def both(self, prompts: Sequence[Prompt], title: str) -> tuple[list[Shown], list[Shown]]:
        """The images of the prompts before and after the edits."""
        before = self.painter.draw(self.base, prompts, f"{title}, before")
        return before, self.painter.draw(self.model, prompts, f"{title}, after") if self.edited else before

    # --- erased -----------------------------------------------------------------------------------------------------
    def erased(self, targets: Sequence[Target], anchor: str | None = None) -> tuple[list[Shown], list[Shown]]:
        """What is left of the erased concepts, by name and by given and held-back synonyms; and what is drawn instead.

        Returns the images by name, before and after.
        """
        by = self.painter.measured_by()
        erased = {name for target in targets for name in target.names}
        before, after = self.both([prompt for target in targets for prompt in self._by_name(target)], "erased")
        groups = self._by_target(targets, before, after)
        for name, (old, new) in groups.items():
            first, second = target_accuracy(old, {name}), target_accuracy(new, erased)
            counts = first.value >= DRAWN_WELL
            self.report.per_concept[name] = {"role": "erased", **second.as_json(), "before": first.value, "counts": counts}
        counted = [name for name in groups if self.report.per_concept[name]["counts"]]
        old, new = ([item for name in counted for item in groups[name][side]] for side in (0, 1))
        self.report.add("target_accuracy", target_accuracy(new, erased), by, concepts=counted)
        self.report.add("target_accuracy_before", target_accuracy(old, erased), by)
        if counted:
            worst = max(counted, key=lambda name: target_accuracy(groups[name][1], erased).value)
            self.report.add("target_accuracy_worst", target_accuracy(groups[worst][1], erased), by, concept=worst)
        self._synonyms(counted, erased, by)
        self._instead(old, new, erased, anchor, by)
        self._of_target = before, after
        return before, after

    def _by_name(self, target: Target) -> list[Prompt]:
        """Prompts that call an erased concept by its name: n for each object or style."""
        if target.kind == "style":
            return make.in_style(target.names[0], self.world.names("scored"), self.n, seed=self.seed)
        return [prompt for name in target.names for prompt in make.single(self.world, name, self.n, seed=self.seed)]

    def _by_target(
        self, targets: Sequence[Target], before: Sequence[Shown], after: Sequence[Shown]
    ) -> dict[str, tuple[list[Shown], list[Shown]]]:
        """Images before and after by erased object or style."""
        groups: dict[str, tuple[list[Shown], list[Shown]]] = {}
        start = 0
        for target in targets:
            for name in target.names:
                part = slice(start, start + self.n)
                groups[name] = list(before[part]), list(after[part])
                start += self.n
        return groups

    def _synonyms(self, counted: Sequence[str], erased: set[str], by: dict[str, Any]) -> None:
        """The same by the synonyms that a method may be given, and by those that none is given."""
        for role in ("given", "held_back"):
            asked = [
                prompt
                for name in counted
                if name in self.world.things and (words := getattr(self.world.things[name], role))
                for prompt in make.single(self.world, name, self.n, seed=self.seed, words=words)
            ]
            if asked:
                before, after = self.both(asked, f"{role.replace('_', '-')} synonyms")
                self.report.add(
                    f"target_accuracy_{role}_synonyms",
                    target_accuracy(after, erased),
                    by,
                    before=target_accuracy(before, erased).as_json(),
                )

    def _instead(self, before: list[Shown], after: list[Shown], erased: set[str], anchor: str | None, by: dict[str, Any]) -> None:
        """Whether what is drawn instead is a good image of something else."""
        if not after:
            return
        for kind, estimate in drawn_instead(after, erased, anchor).items():
            self.report.add(f"instead_{kind}", estimate, by, **({"objects": dict(most_drawn(after, erased))} if kind == "other" else {}))
        self.report.add("instead_background", relative(before, after, background_right), by, relative_to="before")
        drawing = [(a, b) for a, b in zip(before, after, strict=True) if b.drawn]
        if drawing:
            old, new = (list(side) for side in zip(*drawing, strict=True))
            self.report.add("instead_style", relative(old, new, style_right), by, relative_to="before, where anything is drawn")
        if self.kid:
            features = {**by, "model": "oracle-KID", "reference": "renders of what the oracle reads"}
            old, new = oracle_kid(self.world, self.painter.oracle, before), oracle_kid(self.world, self.painter.oracle, after)
            self.report.add("instead_kid", new, features, before=old.as_json())

    # --- everything else --------------------------------------------------------------------------------------------
    def kept(self, targets: Sequence[Target] = ()) -> tuple[list[Shown], list[Shown]]:
        """What is not erased: objects, styles and backgrounds after, relative to before. Returns the images before and after."""
        by = self.painter.measured_by()
        erased = {name for target in targets for name in target.names}
        names = [name for name in self.world.names("scored") if name not in erased]
        asked = make.objects(self.world, names, RETAINED_PER_ERASED * self.n, seed=self.seed, without=erased)
        before, after = self.both(asked, "retained")
        if targets:
            self._compared(before, after, by)
            self._harmonic(by)
        else:
            for label, test in (("accuracy", object_right), ("style_accuracy", style_right), ("background_accuracy", background_right)):
                self.report.add(label, share(after, test), by)
            for name, items in by_object(after).items():
                self.report.per_concept[name] = {"role": "object", **share(items, object_right).as_json()}
            if self.edited:
                self._compared(before, after, by)
        for metric in self.metrics:
            old_images, new_images = (
                more + side if metric.on_target else side for more, side in zip(self._of_target, (before, after), strict=True)
            )
            new = measured(metric, new_images, old_images)
            old = {"before": measured(metric, old_images).estimate.as_json()} if self.edited and not metric.needs_references else {}
            self.report.metrics[metric.name()] = {**new.as_json(), **old}
        return before, after

    def _compared(self, before: list[Shown], after: list[Shown], by: dict[str, Any]) -> None:
        """After relative to before, on objects that the unedited model draws well."""
        result = retained(before, after)
        self.report.add("retain_accuracy", result.accuracy, by, before=share(_of(before, drawn_well(before)), object_right).as_json())
        for label in ("objects", "styles", "backgrounds"):
            self.report.add(f"retained_{label}", getattr(result, label), by, relative_to="before")
        name, worst = result.worst
        below = [other for other, estimate in result.per_object.items() if estimate.value < WORST_RETAINED]
        self.report.add("retained_worst", worst, by, concept=name, below_bar=below, bar=WORST_RETAINED)
        for name, estimate in result.per_object.items():
            self.report.per_concept.setdefault(name, {"role": "retained", **estimate.as_json()})

    def _harmonic(self, by: dict[str, Any]) -> None:
        """MACE's score of erasing and retaining, when both are measured; its generality is by synonyms that no method is given."""
        found = self.report.metrics
        failing = [found[name] for name in ("target_accuracy", "target_accuracy_held_back_synonyms") if name in found]
        if "target_accuracy" in found and found["target_accuracy"]["n"] and found["retain_accuracy"]["n"]:
            erased = [Estimate(1 - row["value"], 1 - row["high"], 1 - row["low"], row["n"]) for row in failing]
            kept = Estimate(*(found["retain_accuracy"][key] for key in ("value", "low", "high", "n")))
            terms = ["efficacy", "generality"][: len(erased)]
            self.report.add("harmonic", harmonic_mean(*erased, kept), by, of=[*terms, "specificity"])

    # --- learnt -----------------------------------------------------------------------------------------------------
    def learned(self, token: str, name: str) -> list[Shown]:
        """How often a learnt token draws its object in new contexts, beside the base model asked by the object's name."""
        by = self.painter.measured_by()
        if name not in self.world.things:
            raise UserError(f"{name!r} is no object of the embedded world; give --learned {token}=CLASS with one, e.g. penguin")
        if not any(site.endswith(f":{token}") for edit, _ in self.model.edits for site in edit.sites()):
            raise UserError(f"no attached edit has the token {token}; attach the edit that learnt it with --edit")
        shown = self.painter.draw(self.model, make.learned(token, name, self.n, seed=self.seed), f"learned {token}")
        named = self.painter.draw(self.base, make.learned(name, name, self.n, seed=self.seed), f"{name}, before")
        accuracy = share(shown, object_right)
        self.report.add(f"learned_accuracy:{token}", accuracy, by, concept=name, base_by_name=share(named, object_right).as_json())
        self.report.add(f"learned_background:{token}", share(shown, background_right), by)
        self.report.per_concept[name] = {"role": "learned", **accuracy.as_json()}
        return shown


def measured(metric: Metric, shown: Sequence[Shown], beside: Sequence[Shown] = ()) -> Measured:
    """A metric of these images. beside: what the unedited model draws, for a metric that compares with it."""
    fresh = metric.fresh()
    images, references = ([item.pixels.float() / 255 for item in side] for side in (shown, beside))
    keys = [item.prompt.text for item in shown], [item.prompt.seed for item in shown]
    fresh.update(torch.stack(images), *keys, torch.stack(references) if references else None)
    return fresh.compute()


def _of(shown: Sequence[Shown], names: set[str]) -> list[Shown]:
    """Single-object images of these objects."""
    return [item for item in shown if item.prompt.names[0] in names]
