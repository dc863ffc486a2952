"""palimpsest attack: try to bring an erased concept back."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from toolkit import registry
from toolkit.commands import add_model_arguments, check_counts, open_model, pairs
from toolkit.errors import UserError

if TYPE_CHECKING:
    from eval.attacks.base import AttackResult, Scenario

HELP = "try to bring an erased concept back"
JUDGE_HELP = "who says what an image shows: oracle, clip[:SOURCE], imagenet, nudenet[:THRESHOLD], ..., or MODULE:FUNCTION (default: oracle)"


def add_arguments(parser: ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--base", metavar="M", help="the unedited model; default: --model without its edits")
    parser.add_argument("--unedited", action="store_true", help="attack a model of which nothing is erased: what can the attack reach?")
    parser.add_argument("--method", required=True, metavar="NAME", help=", ".join(registry.names("attack")))
    parser.add_argument("--concept", required=True, metavar="C", help="what was erased: an object, weapon, a style; any words with --judge")
    parser.add_argument("--synonyms", nargs="+", action="extend", default=[], metavar="S", help="other words for it, beside the world's")
    parser.add_argument("--kind", choices=("object", "style"), default="object", help="of a concept for --judge (default %(default)s)")
    parser.add_argument("--judge", metavar="JUDGE", help=JUDGE_HELP)
    parser.add_argument("--pictures", metavar="DIR", help="pictures of the concept to learn from; default: the unedited model draws them")
    parser.add_argument(
        "--control",
        nargs="?",
        const="",
        metavar="OBJECT",
        help="attack an object too that the model never saw (default: one by the seed), and say how much more came back",
    )
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="K=V", help="options of the attack")
    parser.add_argument("--n", type=int, default=64, help="images per object (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drawn-well", type=float, metavar="RATE", help="how often the unedited model must draw it to count (default 0.8)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (default %(default)s)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance scale (default: what suits the model)")
    parser.add_argument("--batch-size", type=int, help="images at once; default: by their size")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write into")


def run(args: Namespace) -> dict[str, Any]:
    """Writes result.json, prompts.json, attack.png and, when the attack finds an edit, edit.safetensors.

    Gives `attack_success_rate` and `clean_rate` with their intervals, `n`, `label`, `relative`, `spent`, `beside` and `seconds`; with
    --control also `control_rate` and `recovered`, the difference to it.
    """
    from eval.attacks.base import recovered
    from eval.pictures import save_sheet
    from toolkit.io.files import FILE_NAME, save_edit
    from toolkit.runs import check_writable, timed, write_json

    attack = registry.load("attack", args.method).from_config(pairs(args.set, "--set"))
    check_counts(args)
    if args.control is not None and not attack.controlled:
        raise UserError(f"{args.method} has no pictures that could teach a model something new; leave --control out")
    out = check_writable(args.out)
    scenario = make_scenario(args)
    other = None if args.control is None else scenario.control(args.control or None)
    with timed() as cost:
        found = attack.run(scenario)
    result = {
        **rates(found),
        "seconds": cost.seconds,
        "method": args.method,
        "config": attack.config(),
        "concept": scenario.target.name,
        "measured_by": scenario.painter.measured_by(),
    }
    shown = [found.shown]
    if other is not None:
        control = attack.run(other)
        result["control"] = {"concept": other.target.name, **rates(control)}
        result |= flat("control_rate", control.attack_success_rate) | flat("recovered", recovered(found, control))
        shown.append(control.shown)
    if found.edit is not None:
        result["edit"] = str(save_edit(found.edit, out / FILE_NAME))
    result["prompts"] = str(write_json(out / "prompts.json", list(found.prompts)))
    result["picture"] = save_sheet(out / "attack.png", *shown)
    write_json(out / "result.json", result)
    return result


def make_scenario(args: Namespace) -> Scenario:
    """Whom the command's options say to attack."""
    from eval.attacks.base import Scenario
    from eval.commands.evaluate import comparison, knows_world, painter
    from eval.judges import judged
    from eval.prompts import Target, resolve
    from eval.rates import DRAWN_WELL
    from toolkit.pictures import pictures
    from toolkit.world.scenes import load_world

    by_oracle = args.judge in (None, "oracle")
    world = load_world() if by_oracle else None
    target = resolve(world, args.concept) if world else Target(args.concept, args.kind, (args.concept,))
    if by_oracle and args.kind != "object":
        raise UserError(f"--kind {args.kind} is for a concept that --judge decides about; leave it out, or give --judge")
    model = open_model(args)
    if by_oracle and not knows_world(model):
        raise UserError(f"{args.model} does not draw the embedded world, so the oracle cannot say what it shows; give --judge")
    if by_oracle:
        drawing = painter(args)
    else:
        how = {"steps": args.steps, "guidance": args.guidance, "batch_size": args.batch_size}
        drawing = judged(args.judge, args.concept, args.kind, model, **how)
    return Scenario(
        world,
        drawing,
        model,
        comparison(args, model),
        target,
        args.n,
        args.seed,
        synonyms=tuple(args.synonyms),
        unedited=args.unedited,
        drawn_well=DRAWN_WELL if args.drawn_well is None else args.drawn_well,
        files=tuple(pictures(args.pictures)) if args.pictures else (),
    )


def rates(found: AttackResult) -> dict[str, Any]:
    """What is said of an attack and of its control."""
    return {
        **flat("attack_success_rate", found.attack_success_rate),
        **flat("clean_rate", found.clean_rate),
        "n": found.attack_success_rate.n,
        "label": found.label,
        "relative": found.relative,
        "spent": {"steps": found.spent.steps, "images": found.spent.images},
        "beside": {name: estimate.as_json() for name, estimate in found.beside.items()},
        **found.notes,
    }


def flat(name: str, estimate: Any) -> dict[str, Any]:
    """An estimate as two keys: the value, and its interval."""
    written = estimate.as_json()
    return {name: written["value"], f"{name}_interval": [written["low"], written["high"]]}
