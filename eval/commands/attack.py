"""palimpsest attack: try to bring an erased concept back."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from toolkit import registry
from toolkit.commands import add_model_arguments, check_counts, open_model, pairs
from toolkit.errors import UserError

HELP = "try to bring an erased concept back"


def add_arguments(parser: ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--base", metavar="M", help="the unedited model; default: --model without its edits")
    parser.add_argument("--method", required=True, metavar="NAME", help=", ".join(registry.names("attack")))
    parser.add_argument("--concept", required=True, metavar="C", help="what was erased: an object, a synonym of it, or weapon")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="K=V", help="options of the attack")
    parser.add_argument("--n", type=int, default=64, help="images per object (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (default %(default)s)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance scale (default: 2)")
    parser.add_argument("--batch-size", type=int, help="images at once; default: by their size")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write into")


def run(args: Namespace) -> dict[str, Any]:
    """Writes result.json, prompts.json, attack.png and, when the attack finds an edit, edit.safetensors.

    Gives `attack_success_rate` and `clean_rate` with their intervals, `n`, `label`, `relative` and `seconds`.
    """
    from eval.attacks.base import Scenario
    from eval.commands.evaluate import comparison, knows_world, painter
    from eval.pictures import save_sheet
    from eval.prompts import resolve
    from toolkit.io.files import FILE_NAME, save_edit
    from toolkit.runs import check_writable, timed, write_json
    from toolkit.world.scenes import load_world

    attack = registry.load("attack", args.method).from_config(pairs(args.set, "--set"))
    world = load_world()
    target = resolve(world, args.concept)
    check_counts(args)
    out = check_writable(args.out)
    model = open_model(args)
    if not knows_world(model):
        raise UserError(f"{args.model} does not draw the embedded world, so nothing says what it shows; attack emoji-sd")
    scenario = Scenario(world, painter(args), model, comparison(args, model), target, args.n, args.seed)
    with timed() as cost:
        found = attack.run(scenario)
    success, clean = found.attack_success_rate.as_json(), found.clean_rate.as_json()
    result: dict[str, Any] = {
        "attack_success_rate": success["value"],
        "attack_success_rate_interval": [success["low"], success["high"]],
        "clean_rate": clean["value"],
        "clean_rate_interval": [clean["low"], clean["high"]],
        "n": success["n"],
        "seconds": cost.seconds,
        "method": args.method,
        "config": attack.config(),
        "concept": target.name,
        "label": found.label,
        "relative": found.relative,
        "measured_by": scenario.painter.measured_by(),
    }
    if found.edit is not None:
        result["edit"] = str(save_edit(found.edit, out / FILE_NAME))
    result["prompts"] = str(write_json(out / "prompts.json", list(found.prompts)))
    result["picture"] = save_sheet(out / "attack.png", found.shown)
    write_json(out / "result.json", result)
    return result
