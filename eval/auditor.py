"""How an edit that erases is audited: what was erased is drawn, attacked, and everything else compared, as far as the model allows."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from eval.attacks.base import Scenario
from eval.intervals import NOTHING
from eval.judges import judged
from eval.prompts import Target, resolve
from eval.rates import Painter, share
from eval.report_audit import Audit, Tried
from eval.suites import Suite
from toolkit.errors import UserError
from toolkit.options import written
from toolkit.pictures import pictures
from toolkit.runs import timed
from toolkit.world.oracle import load_oracle
from toolkit.world.scenes import load_world

if TYPE_CHECKING:
    from eval.attacks.base import Attack
    from eval.report_edit import EditFacts
    from toolkit.model import Model

NO_JUDGE = "Whether the concept is still drawn: the oracle knows the embedded world alone, and no --judge that knows this one was given."
NOT_ASKED = "What else changed in its images: it was not drawn, as asked."
NO_WORLD = "What else changed in its images: palimpsest evaluate --prompts measures that on prompts of your own."


@dataclass(frozen=True)
class Auditor:
    """What an audit tries and how it draws.

    n: images of each concept and under each attack, and 8 n of everything else, each before and after; erased_only leaves that out.
    guidance: None is what suits the model; batch_size: None goes by the images' size. judge: who says what an image shows, see
    `eval.judges`; None is the oracle. kind, synonyms and pictures (a folder) are of the concept that a judge decides about.
    """

    attacks: Mapping[str, Attack]
    n: int = 32
    seed: int = 0
    steps: int = 20
    guidance: float | None = None
    batch_size: int | None = None
    erased_only: bool = False
    judge: str | None = None
    kind: Literal["object", "style"] = "object"
    synonyms: tuple[str, ...] = ()
    pictures: str | None = None

    def look(self, model: Model, base: Model, about: EditFacts, concepts: Sequence[str], command: str) -> Audit:
        """What can be found out about the edits of the model beside the model without. command: what the page says made it.

        Nothing to measure with is no error, the page says so; a model of the embedded world without concepts is a UserError.
        """
        from eval.commands.evaluate import knows_world

        empty = Audit(tuple(concepts), about, command, self.n, self.seed)
        by_oracle = self.judge in (None, "oracle")
        if by_oracle and not knows_world(model):
            return replace(empty, unsaid=(NO_JUDGE, NO_WORLD))
        if not concepts:
            raise UserError(f"nothing beside {about.file} says what was erased; give --concept")
        return (self._on_world if by_oracle else self._by_judge)(model, base, empty)

    def command(self, file: str, model: str, concepts: Sequence[str], **more: str | None) -> str:
        """What to type for the same page. file: of the edit. more: other options, those that are None left out."""
        kind = self.kind if self.judge else None
        given = {**more, "judge": self.judge, "kind": kind, "pictures": self.pictures, "guidance": self.guidance}
        words = ["palimpsest", "audit", file, "--model", model]
        words += [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
        changed = [f"{name}.{key}={written(getattr(own, key))}" for name, own in self.attacks.items() for key in own.changed()]
        lists = {"concept": concepts, "synonyms": self.synonyms, "set": changed}
        words += [word for name, several in lists.items() if several for word in (f"--{name}", *several)]
        words += ["--attacks", *self.attacks]  # none is not the default
        words += ["--erased-only"] if self.erased_only else []
        return shlex.join([*words, "--n", str(self.n), "--seed", str(self.seed), "--steps", str(self.steps)])

    def _on_world(self, model: Model, base: Model, empty: Audit) -> Audit:
        """On the embedded world everything is known."""
        painter = Painter(load_oracle(), self.steps, Painter.guidance if self.guidance is None else self.guidance, self.batch_size)
        suite = Suite(load_world(), painter, model, base, self.n, self.seed, kid=False)
        targets = [resolve(suite.world, concept) for concept in empty.concepts]
        before, after = suite.erased(targets)
        if not self.erased_only:
            suite.kept(targets)
        images, start, tried = {}, 0, []
        for target in targets:
            own = slice(start, start := start + self.n * len(target.names))
            images[target.name] = before[own], after[own]
            tried += self._try_all(Scenario(suite.world, painter, model, base, target, self.n, self.seed))
        return replace(
            empty,
            by=painter.measured_by(),
            rates=suite.report.metrics,
            per_concept=suite.report.per_concept,
            tried=tried,
            images=images,
            unsaid=(NOT_ASKED,) if self.erased_only else (),
        )

    def _by_judge(self, model: Model, base: Model, empty: Audit) -> Audit:
        """On any other model as far as somebody says whether an image shows the concept."""
        if len(empty.concepts) > 1:
            raise UserError(f"a judge is of one concept, and several were erased; give --concept with one of {', '.join(empty.concepts)}")
        (concept,) = empty.concepts
        drawing = {"steps": self.steps, "guidance": self.guidance, "batch_size": self.batch_size}
        painter = judged(str(self.judge), concept, self.kind, model, **drawing)
        files = tuple(pictures(self.pictures)) if self.pictures else ()
        target = Target(concept, self.kind, (concept,))
        scenario = Scenario(None, painter, model, base, target, self.n, self.seed, synonyms=self.synonyms, files=files)
        before = painter.draw(base, scenario.asked(concept), f"{concept}, before")
        after = painter.draw(model, scenario.asked(concept), f"{concept}, after")
        first, second = (share(side, scenario.shows).as_json() for side in (before, after))
        return replace(
            empty,
            by=painter.measured_by(),
            rates={"target_accuracy": second, "target_accuracy_before": first},
            tried=self._try_all(scenario),
            images={concept: (before, after)},
            unsaid=(NO_WORLD,),
        )

    def _try_all(self, scenario: Scenario) -> list[Tried]:
        """Every attack on one concept, each with its control where it has one."""
        tried = []
        for name, attack in self.attacks.items():
            one = Tried(scenario.target.name, name, attack.config(), attack.label, None)
            try:
                with timed() as cost:
                    one = replace(one, found=attack.run(scenario))
            except UserError as error:
                tried.append(replace(one, why=str(error)))
                continue
            controlled = attack.controlled and scenario.world is not None and scenario.target.kind == "object"
            control = attack.run(scenario.control()).attack_success_rate if controlled else NOTHING
            tried.append(replace(one, control=control, seconds=cost.seconds))
        return tried
