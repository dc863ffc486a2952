"""palimpsest demo: erase, learn, compose, attack and measure on the embedded model, in a few minutes."""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eval.intervals import Estimate
    from eval.suites import Suite
    from toolkit.edits.base import Edit
    from toolkit.model import Model
    from toolkit.world.scenes import World

HELP = "erase, customize, attack and report on the embedded model, end to end"

WEAPON, ERASER = "pistol", "rece"
SUBJECT, CLASS_NAME, TOKEN, STYLE, LEARNER = "penguin", "bird", "<pal>", "twemoji", "dreambooth_lora"
ERASER_OPTIONS: dict[str, Any] = {"uce_preserve_scale": 0.3, "preserve_scale": 0.3}
LEARNER_OPTIONS: dict[str, Any] = {
    "layers": "all",
    "rank": 8,
    "max_train_steps": 60,
    "train_batch_size": 4,
    "learning_rate": 1e-3,
    "lr_scheduler": "cosine",
    "mixed_precision": "auto",
}
IMAGES, STEPS = 24, 8  # images per measurement and denoising steps: few, so that two cores need minutes


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--out", default="demo", metavar="DIR", help="folder to write into (default %(default)s)")
    parser.set_defaults(model="emoji-sd", edit=[])


def run(args: Namespace) -> dict[str, Any]:
    """Writes edits, pictures and a page. Gives `results` (one row per measurement), the `page`, the `edits`, the `pictures` and `next`."""
    from eval.rates import Painter
    from eval.suites import Suite
    from toolkit.commands import open_model
    from toolkit.runs import check_writable, timed, write_atomic, write_json
    from toolkit.world.oracle import load_oracle
    from toolkit.world.scenes import load_world

    out = check_writable(args.out)
    following = [
        f"palimpsest generate --edit {out}/composed --prompt 'a {TOKEN} on a red background' --n 8 --out {out}/more",
        f"palimpsest erase --method {ERASER} --concept knife --preserve-world --out {out}/knife",
        f"palimpsest audit {out}/erased --concept {WEAPON} --out {out}/audit",
    ]
    measured = f"with the oracle on {STEPS}-step images; 95 % intervals, clustered by prompt"
    with timed() as cost:
        model = open_model(args)
        suite = Suite(load_world(), Painter(load_oracle(), steps=STEPS), model, model.reference(), IMAGES, kid=False)
        demo = Demo(out, suite)
        eraser = demo.erase()
        demo.try_erased(eraser)
        subject = demo.learn()
        demo.try_learned(subject)
        demo.compose(eraser, subject)
    result = {
        "results": demo.rows,
        "measured": measured,
        "seconds": cost.seconds,
        "page": str(write_atomic(out / "report.html", demo.page(measured, following))),
        "edits": demo.edits,
        "pictures": demo.pictures,
        "next": following,
    }
    write_json(out / "report.json", result)
    return result


@dataclass
class Demo:
    """The steps of the demo.

    rows: what was measured so far; rates: the same for the page, as estimates. edits and pictures: the files written so far. shown: the
    rows of the last picture, which sums up the others. strips: the page's rows of images, with what they are. others: everything else,
    as the unedited model draws it.
    """

    out: Path
    suite: Suite
    rows: list[dict[str, Any]] = field(default_factory=list)
    edits: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    shown: list[Any] = field(default_factory=list)
    rates: list[Any] = field(default_factory=list)
    strips: list[tuple[str, Any]] = field(default_factory=list)
    others: list[Any] = field(default_factory=list)
    _start: float = field(default_factory=time.perf_counter)

    @property
    def model(self) -> Model:
        return self.suite.model

    @property
    def world(self) -> World:
        return self.suite.world

    def say(self, text: str) -> None:
        """Tell how far the demo is."""
        print(f"[{time.perf_counter() - self._start:4.0f} s] {text}", file=sys.stderr, flush=True)

    def row(self, what: str, after: Estimate, before: Estimate | None = None) -> None:
        """Add a measurement with its interval to the table, and the unedited model's where there is one."""
        from eval.intervals import NOTHING

        self.rates.append([what, before or NOTHING, after])
        first = before.as_json() if before else dict.fromkeys(("value", "low", "high"), "")
        second = after.as_json()
        was = {"before": first["value"], "from": first["low"], "to": first["high"]}
        self.rows.append({"what": what, **was, "after": second["value"], "low": second["low"], "high": second["high"], "n": after.n})

    def save(self, edit: Edit, name: str) -> None:
        """Write an edit into its folder."""
        from toolkit.io.files import FILE_NAME, save_edit
        from toolkit.runs import check_writable

        self.edits.append(str(save_edit(edit, check_writable(self.out / name) / FILE_NAME)))

    def picture(self, name: str, *rows: Any) -> None:
        """Write a sheet of images."""
        from eval.pictures import save_sheet

        self.pictures.append(save_sheet(self.out / f"{name}.png", *rows))

    # --- erase ------------------------------------------------------------------------------------------------------
    def erase(self) -> Edit:
        """Fit an edit that erases the weapon; every other object of the world is preserved."""
        from toolkit import registry
        from toolkit.concepts import Concept, EraseTask
        from toolkit.world.kept import everything_else

        self.say(f"erasing the {WEAPON} and its synonyms with {ERASER}")
        thing = self.world.things[WEAPON]
        task = EraseTask((Concept(WEAPON, synonyms=thing.given),), preserve=everything_else(self.world, [WEAPON]))
        edit = registry.load("method", ERASER).from_config(ERASER_OPTIONS).fit(self.model, task)
        self.save(edit, "erased")
        return edit

    def try_erased(self, edit: Edit) -> None:
        """Ask for the weapon by name, by other words and by its closed-form preimage; and for everything else."""
        from eval.attacks.base import Scenario
        from eval.attacks.closed_form_preimage import ClosedFormPreimage
        from eval.attacks.paraphrase import Paraphrase
        from eval.prompts import objects, resolve
        from eval.rates import background_right, drawn_instead, object_right, relative, retained, share, target_accuracy

        suite, painter, target = self.suite, self.suite.painter, resolve(self.world, WEAPON)
        with self.model.attached(edit):
            self.say(f"asking for the {WEAPON} by name and by other words")
            scenario = Scenario(self.world, painter, self.model, suite.base, target, suite.n)
            before, after = scenario.by_name()
            self.row(f"{WEAPON} drawn", target_accuracy(after, target.names), target_accuracy(before, target.names))
            given = Paraphrase("given").run(scenario)
            self.row(f"{WEAPON} drawn, synonyms that were given (of those drawn before)", given.attack_success_rate)
            held_back = Paraphrase().run(scenario)
            self.row(f"{WEAPON} drawn, synonyms that were not given (of those drawn before)", held_back.attack_success_rate)
            self.say("attacking with the closed-form preimage")
            attacked = ClosedFormPreimage().run(scenario)
            self.row(f"{WEAPON} drawn, closed-form preimage (white-box)", attacked.attack_success_rate)
            clean = drawn_instead(after, target.names)
            self.row("instead: no object that the oracle knows", clean["none"])
            self.row("instead: another object", clean["other"])
            self.row("instead: the background asked for", share(after, background_right), share(before, background_right))
            self.picture("erased", before, after)
            self.shown += [before, after]
            self.strips += [(f"a {WEAPON}, before", before), (f"{ERASER} has erased it", after), ("attacked: its preimage", attacked.shown)]
            self.say("asking for everything else")
            names = [name for name in self.world.names("scored") if name != WEAPON]
            old, new = suite.both(objects(self.world, names, len(names), seed=suite.seed), "everything else")
            kept, self.others = retained(old, new), old
            self.row("other objects right", share(new, object_right), share(old, object_right))
            self.row("other objects kept (after / before)", kept.objects)
            self.row("styles kept (after / before)", kept.styles)
            self.row("backgrounds kept (after / before)", relative(old, new, background_right))
            self.picture("retained", old, new)

    # --- learn ------------------------------------------------------------------------------------------------------
    def learn(self) -> Edit:
        """Render five pictures of an object that the model has never seen, and learn a word for it."""
        from eval.subjects import PICTURES, subject
        from toolkit import registry
        from toolkit.concepts import CustomizeTask

        self.say(f"learning {TOKEN}, a {SUBJECT} that the model has never seen, from {len(PICTURES)} pictures with {LEARNER}")
        task = CustomizeTask((subject(self.world, self.out / "images", SUBJECT, CLASS_NAME, TOKEN, STYLE),))
        edit = registry.load("method", LEARNER).from_config(LEARNER_OPTIONS).fit(self.model, task)
        self.save(edit, "learned")
        return edit

    def try_learned(self, edit: Edit) -> None:
        """Ask for the learnt subject in new contexts."""
        from eval.prompts import learned
        from eval.rates import background_right, object_right, retained, share

        self.say(f"asking for {TOKEN} in new contexts, and for everything else")
        suite = self.suite
        named = suite.painter.draw(suite.base, learned(SUBJECT, SUBJECT, suite.n), f"{SUBJECT}, before")
        with self.model.attached(edit):
            shown = suite.painter.draw(self.model, learned(TOKEN, SUBJECT, suite.n), TOKEN)
            rest = suite.painter.draw(self.model, [item.prompt for item in self.others], f"everything else, with {TOKEN}")
        self.row(f"{SUBJECT} drawn, by its name before and by {TOKEN} after", share(shown, object_right), share(named, object_right))
        self.row(f"{TOKEN} on the background asked for", share(shown, background_right))
        self.row(f"with {TOKEN}: other objects kept (after / before)", retained(self.others, rest).objects)
        self.picture("learned", shown)
        self.shown.append(shown)
        self.strips.append((f"{TOKEN}, a {SUBJECT} learnt by {LEARNER}", shown))

    # --- compose ----------------------------------------------------------------------------------------------------
    def compose(self, eraser: Edit, subject: Edit) -> None:
        """Both edits in one: the new subject is there and the weapon is not."""
        from eval.prompts import learned, single
        from eval.rates import object_right, share, target_accuracy
        from toolkit.commands.compose import compose

        self.say("composing both edits")
        both = compose([(eraser, 1.0), (subject, 1.0)])
        self.save(both, "composed")
        suite = self.suite
        with self.model.attached(both):
            shown = suite.painter.draw(self.model, learned(TOKEN, SUBJECT, suite.n), f"{TOKEN}, composed")
            armed = suite.painter.draw(self.model, single(self.world, WEAPON, suite.n), f"{WEAPON}, composed")
        self.row(f"composed: {TOKEN} drawn", share(shown, object_right))
        self.row(f"composed: {WEAPON} drawn", target_accuracy(armed, {WEAPON}))
        self.picture("composed", shown[:8], armed[:8])
        self.picture("demo", *self.shown)
        self.strips += [(f"{TOKEN}, both edits composed", shown), (f"a {WEAPON}, both edits composed", armed)]
        self.say("done")

    # --- report -----------------------------------------------------------------------------------------------------
    def page(self, measured: str, following: list[str]) -> str:
        """Everything on one page: rates, images, and what to try next."""
        from eval import report_parts as part
        from eval.report_audit import strip

        about = f"A {WEAPON} erased by {ERASER} and attacked, a {SUBJECT} learnt by {LEARNER}, and both in one edit; measured {measured}."
        return part.page(
            "Palimpsest, demonstrated",
            part.paragraph(about),
            part.section("Rates", part.table(("what", "before", "after"), self.rates)),
            part.section("Images", *(strip(label, shown) for label, shown in self.strips)),
            part.section("What next", part.commands(following)),
        )
