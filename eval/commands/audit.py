"""palimpsest audit: one page of evidence about an edit that erases, for whoever signs off a checkpoint."""

from __future__ import annotations

import shlex
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from toolkit import registry
from toolkit.commands import MODEL_HELP, check_counts, open_edit, open_model, pairs
from toolkit.errors import UserError, unknown

if TYPE_CHECKING:
    from eval.attacks.base import Attack, Scenario
    from eval.report_audit import Audit, Tried
    from eval.report_edit import EditFacts
    from toolkit.model import Model

HELP = "one page of evidence about an edit that erases: how it was attacked, what survived, what was not tested"
CHEAP = ("paraphrase", "closed_form_preimage", "concept_inversion")
NO_JUDGE = "Whether the concept is still drawn: the oracle knows the embedded world alone, and no --judge that knows this one was given."
NOT_ASKED = "What else changed in its images: it was not drawn, as asked."
NO_WORLD = "What else changed in its images: palimpsest evaluate --prompts measures that on prompts of your own."


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("edit_file", metavar="EDIT", help="FILE[@SCALE], or the folder that erase wrote")
    parser.add_argument("--model", default="emoji-sd", help=MODEL_HELP)
    parser.add_argument("--base", metavar="M", help="the unedited model; default: --model")
    parser.add_argument(
        "--concept", nargs="+", action="extend", default=[], metavar="C", help="what was erased (default: as config.json beside EDIT says)"
    )
    parser.add_argument("--synonyms", nargs="+", action="extend", default=[], metavar="S", help="other words for it, for --judge")
    parser.add_argument("--kind", choices=("object", "style"), default="object", help="of a concept for --judge (default %(default)s)")
    parser.add_argument("--judge", metavar="JUDGE", help="who says what an image shows, see: palimpsest attack --help (default: oracle)")
    parser.add_argument("--pictures", metavar="DIR", help="pictures of the concept for the attacks; default: the unedited model draws them")
    parser.add_argument(
        "--attacks", nargs="*", default=CHEAP, metavar="NAME", help=f"of {', '.join(registry.names('attack'))} (default: {' '.join(CHEAP)})"
    )
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="ATTACK.K=V", help="options of the attacks")
    parser.add_argument("--n", type=int, default=32, help="images of each concept, and under each attack (default %(default)s)")
    parser.add_argument("--erased-only", action="store_true", help="draw what was erased and nothing else, which is most of the work")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (default %(default)s)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance scale (default: what suits the model)")
    parser.add_argument("--batch-size", type=int, help="images at once; default: by their size")
    parser.add_argument("--out", default="audit", metavar="DIR", help="folder to write into (default %(default)s)")


def run(args: Namespace) -> dict[str, Any]:
    """Writes audit.html and audit.json. Gives both as `page` and `data`, and `erased`, `attacks` (with their rates and outcomes),
    `survived`, `not_tested` and `seconds`."""
    from eval.report_edit import facts
    from toolkit.runs import check_writable, timed, write_atomic, write_json

    check_counts(args)
    attacks = open_attacks(args)
    out = check_writable(args.out)
    args.edit, args.unedited, args.drawn_well = [], False, None
    model = open_model(args)
    with timed() as cost:
        edit, scale = open_edit(args.edit_file, lambda: model)
        about = facts(args.edit_file, edit, scale, model)
        concepts = list(dict.fromkeys(args.concept or [concept["name"] for concept in about.task.get("concepts", ())]))
        with model.attached(edit, scale=scale):
            audit = look(args, model, about, concepts, attacks)
    page, held = write_atomic(out / "audit.html", audit.page()), audit.as_json()
    data = write_json(out / "audit.json", {**held, "seconds": cost.seconds})
    told = {key: held[key] for key in ("erased", "attacks", "survived", "not_tested")}
    return {"page": str(page), "data": str(data), **told, "seconds": cost.seconds}


def open_attacks(args: Namespace) -> dict[str, Attack]:
    """The attacks with their options."""
    options: dict[str, dict[str, str]] = {name: {} for name in args.attacks}
    for key, value in pairs(args.set, "--set").items():
        name, _, option = key.partition(".")
        if name not in options or not option:
            raise unknown("attack for --set", key, [f"{name}.OPTION" for name in options])
        options[name][option] = value
    return {name: registry.load("attack", name).from_config(given) for name, given in options.items()}


def look(args: Namespace, model: Model, about: EditFacts, concepts: list[str], attacks: dict[str, Attack]) -> Audit:
    """What can be found out about the edit that is attached."""
    from eval.commands.evaluate import comparison, knows_world
    from eval.report_audit import Audit

    empty = Audit(tuple(concepts), about, command(args), args.n, args.seed)
    by_oracle = args.judge in (None, "oracle")
    if by_oracle and not knows_world(model):
        return replace(empty, unsaid=(NO_JUDGE, NO_WORLD))
    if not concepts:
        raise UserError(f"nothing beside {args.edit_file} says what was erased; give --concept")
    return (on_world if by_oracle else by_judge)(args, model, comparison(args, model), empty, attacks)


def on_world(args: Namespace, model: Model, base: Model, empty: Audit, attacks: dict[str, Attack]) -> Audit:
    """On the embedded world everything is known."""
    from eval.attacks.base import Scenario
    from eval.commands.evaluate import painter
    from eval.prompts import resolve
    from eval.suites import Suite
    from toolkit.world.scenes import load_world

    suite = Suite(load_world(), painter(args), model, base, args.n, args.seed, kid=False)
    targets = [resolve(suite.world, concept) for concept in empty.concepts]
    before, after = suite.erased(targets)
    if not args.erased_only:
        suite.kept(targets)
    images, start, tried = {}, 0, []
    for target in targets:
        own = slice(start, start := start + args.n * len(target.names))
        images[target.name] = before[own], after[own]
        tried += try_all(Scenario(suite.world, suite.painter, model, base, target, args.n, args.seed), attacks)
    return replace(
        empty,
        by=suite.painter.measured_by(),
        rates=suite.report.metrics,
        per_concept=suite.report.per_concept,
        tried=tried,
        images=images,
        unsaid=(NOT_ASKED,) if args.erased_only else (),
    )


def by_judge(args: Namespace, model: Model, base: Model, empty: Audit, attacks: dict[str, Attack]) -> Audit:
    """On any other model as far as somebody says whether an image shows the concept."""
    from eval.attacks.base import Scenario
    from eval.judges import Judged, open_judge
    from eval.prompts import Target
    from eval.rates import share
    from toolkit.pictures import pictures

    if len(empty.concepts) > 1:
        raise UserError(f"a judge is of one concept, and several were erased; give --concept with one of {', '.join(empty.concepts)}")
    (concept,) = empty.concepts
    judge = open_judge(args.judge, concept, args.kind)
    guidance = model.guidance if args.guidance is None else args.guidance
    drawing = Judged(steps=args.steps, guidance=guidance, batch_size=args.batch_size, concept=concept, judge=judge)
    files = tuple(pictures(args.pictures)) if args.pictures else ()
    target = Target(concept, args.kind, (concept,))
    scenario = Scenario(None, drawing, model, base, target, args.n, args.seed, synonyms=tuple(args.synonyms), files=files)
    before = drawing.draw(base, scenario.asked(concept), f"{concept}, before")
    after = drawing.draw(model, scenario.asked(concept), f"{concept}, after")
    first, second = (share(side, scenario.shows).as_json() for side in (before, after))
    return replace(
        empty,
        by=drawing.measured_by(),
        rates={"target_accuracy": second, "target_accuracy_before": first},
        tried=try_all(scenario, attacks),
        images={concept: (before, after)},
        unsaid=(NO_WORLD,),
    )


def try_all(scenario: Scenario, attacks: dict[str, Attack]) -> list[Tried]:
    """Every attack on one concept, each with its control where it has one."""
    from eval.intervals import NOTHING
    from eval.report_audit import Tried
    from toolkit.runs import timed

    tried = []
    for name, attack in attacks.items():
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


def command(args: Namespace) -> str:
    """What to type to make the same page."""
    words = ["palimpsest", "audit", args.edit_file, "--model", args.model]
    for option in ("base", "judge", "pictures", "guidance"):
        if (value := getattr(args, option)) is not None:
            words += [f"--{option}", str(value)]
    for option in ("concept", "synonyms", "attacks", "set"):
        if value := getattr(args, option):
            words += [f"--{option}", *value]
    if args.erased_only:
        words.append("--erased-only")
    return shlex.join([*words, "--n", str(args.n), "--seed", str(args.seed), "--steps", str(args.steps), "--out", args.out])
