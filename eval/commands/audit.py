"""palimpsest audit: one page of evidence about an edit that erases, for whoever signs off a checkpoint."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from toolkit import registry
from toolkit.commands import MODEL_HELP, check_counts, named_options, open_edit, open_model

if TYPE_CHECKING:
    from eval.attacks.base import Attack

HELP = "one page of evidence about an edit that erases: how it was attacked, what survived, what was not tested"
CHEAP = ("paraphrase", "closed_form_preimage", "concept_inversion")


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
    from eval.auditor import Auditor
    from eval.commands.evaluate import comparison
    from eval.report_edit import facts
    from toolkit.runs import check_writable, timed, write_atomic, write_json

    check_counts(args)
    drawing = {name: getattr(args, name) for name in ("n", "seed", "steps", "guidance", "batch_size", "erased_only")}
    judging = {"judge": args.judge, "kind": args.kind, "synonyms": tuple(args.synonyms), "pictures": args.pictures}
    auditor = Auditor(open_attacks(args), **drawing, **judging)
    out = check_writable(args.out)
    args.edit = []
    model = open_model(args)
    with timed() as cost:
        edit, scale = open_edit(args.edit_file, lambda: model)
        about = facts(args.edit_file, edit, scale, model)
        concepts = list(dict.fromkeys(args.concept or [concept["name"] for concept in about.task.get("concepts", ())]))
        with model.attached(edit, scale=scale):
            typed = auditor.command(args.edit_file, args.model, args.concept, base=args.base, out=args.out)
            audit = auditor.look(model, comparison(args, model), about, concepts, typed)
    page, held = write_atomic(out / "audit.html", audit.page()), audit.as_json()
    data = write_json(out / "audit.json", {**held, "seconds": cost.seconds})
    told = {key: held[key] for key in ("erased", "attacks", "survived", "not_tested")}
    return {"page": str(page), "data": str(data), **told, "seconds": cost.seconds}


def open_attacks(args: Namespace) -> dict[str, Attack]:
    """The attacks with their options."""
    options = named_options(args.set, args.attacks, "attack")
    return {name: registry.load("attack", name).from_config(given) for name, given in options.items()}
