"""palimpsest debias: fit an edit that draws concepts with several attributes, each in its part of the images."""

from __future__ import annotations

import dataclasses
import functools
from argparse import ArgumentParser, Namespace
from typing import Any

from toolkit.commands import add_fit_arguments, check_counts, open_for, open_method, save_fitted
from toolkit.commands.erase import TEMPLATE_HELP, concepts, with_files
from toolkit.concepts import DebiasTask

HELP = "fit an edit that draws concepts with several attributes in wanted parts"


def add_arguments(parser: ArgumentParser) -> None:
    add_fit_arguments(parser)
    parser.add_argument("--concept", nargs="+", action="extend", required=True, metavar="C", help="what to balance, e.g. doctor")
    parser.add_argument("--synonyms", nargs="+", action="extend", default=[], metavar="S", help="other words: medic, or C=medic,surgeon")
    parser.add_argument("--style", action="store_true", help="the concepts are styles, not objects")
    parser.add_argument("--attributes", nargs="+", required=True, metavar="A", help="what it is to be drawn as, e.g. woman man")
    parser.add_argument(
        "--ratios", nargs="+", type=float, default=[], metavar="R", help="the wanted part of each, 1 in all; default: equal"
    )
    parser.add_argument("--preserve", nargs="+", action="extend", default=[], metavar="P", help="what must stay as it is")
    parser.add_argument("--template", nargs="+", action="extend", default=[], metavar="T", help=TEMPLATE_HELP)
    parser.add_argument("--clip", metavar="SOURCE", help="a CLIP that tells the attributes apart: hf-hub:OWNER/NAME or local-dir:FOLDER")
    parser.add_argument("--n", type=int, default=32, help="images of a concept for each count (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (default %(default)s)")
    parser.add_argument("--guidance", type=float, help="guidance scale, 1 is off (default: what suits the model)")
    parser.add_argument("--batch-size", type=int, help="images at once; default: by their size")
    parser.set_defaults(anchor=[])


def run(args: Namespace) -> dict[str, Any]:
    """Writes edit.safetensors, config.json and result.json.

    Gives `edit`, `method`, `config`, the cost, `edit_bytes`, what the method notes (`notes`), and `ratios`: of each concept the part
    of every attribute with its interval, on images with other seeds than those that were counted while fitting.
    """
    from eval.alignment import load_clip
    from eval.attributes import AttributeCounter
    from eval.commands.evaluate import check_clip
    from toolkit.runs import check_writable, timed

    check_counts(args)
    method = open_method("debias", args.method, args.set)
    clip = functools.cache(lambda: load_clip(args.clip))
    attributes, contexts = tuple(args.attributes), with_files(args.template, "--template")
    count = AttributeCounter(clip, attributes, contexts, args.n, args.seed, args.steps, args.guidance, args.batch_size)
    task = DebiasTask(concepts(args), attributes, count, tuple(args.ratios), tuple(args.preserve), contexts)
    out = check_writable(args.out)
    model = open_for(args, method)
    check_clip(args.clip, model)
    with timed() as cost:
        edit = method.fit(model, task)
    fresh = dataclasses.replace(count, seed=args.seed + args.n)
    with model.attached(edit):
        ratios = {each.name: {name: rate.as_json() for name, rate in fresh.rates(model, each).items()} for each in task.concepts}
    said = {field.name: getattr(task, field.name) for field in dataclasses.fields(task) if field.name not in ("concepts", "classify")}
    said["concepts"] = [dataclasses.asdict(concept) for concept in task.concepts]
    said["counted"] = {"clip": clip().measured_by, **{name: getattr(args, name) for name in ("n", "seed", "steps", "guidance")}}
    measured = {**dataclasses.asdict(cost), "notes": dict(edit.info.notes), "ratios": ratios}
    return save_fitted(args, method, model, edit, out, said, measured)
