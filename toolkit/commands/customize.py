"""palimpsest customize: fit an edit that teaches a model new subjects from pictures."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from toolkit.commands import add_fit_arguments, add_training_arguments, fit_and_save, open_method
from toolkit.concepts import CustomizeTask, Subject
from toolkit.errors import UserError
from toolkit.pictures import captioned, masks_of, pictures

HELP = "fit an edit that teaches a model new subjects from pictures"


def add_arguments(parser: ArgumentParser) -> None:
    add_fit_arguments(parser)
    add_training_arguments(parser)
    help_images = "a folder of pictures per subject; captions in its metadata.jsonl are used, of several for a picture those with the token"
    help_class = "what each subject is, e.g. dog; methods that find subjects do without"
    parser.add_argument("--images", nargs="+", action="extend", required=True, metavar="DIR", help=help_images)
    parser.add_argument("--masks", nargs="+", action="extend", default=[], metavar="DIR", help="a folder of masks, named as the pictures")
    help_cut = "train on N more pictures, of the subjects cut out by their masks and put elsewhere on plain backgrounds"
    parser.add_argument("--cut-outs", type=int, default=0, metavar="N", help=help_cut)
    parser.add_argument("--class-name", nargs="+", action="extend", default=[], metavar="N", help=help_class)
    help_world = "keep everything that the embedded model draws as it is, by prior distillation"
    parser.add_argument("--preserve-world", action="store_true", help=help_world)
    parser.add_argument("--token", nargs="+", action="extend", required=True, metavar="T", help="each subject's new word, e.g. '<toy>'")


def run(args: Namespace) -> dict[str, Any]:
    """Writes edit.safetensors, config.json and result.json, and cut-outs/ if asked for. Gives `edit`, `method`, `config`, the cost and
    `edit_bytes`."""
    from toolkit.cut_outs import with_cut_outs
    from toolkit.runs import check_writable

    method = open_method("customize", args.method, args.set, keep_world=args.preserve_world)
    task = CustomizeTask(subjects(args))
    if args.cut_outs:
        alone = "outside_weight" in method.config()  # else what is said of one subject would be learnt of the other as well
        task = with_cut_outs(task, Path(args.out) / "cut-outs", args.cut_outs, class_after=method.class_after, each=alone)
    return fit_and_save(args, method, task, check_writable(args.out))


def subjects(args: Namespace) -> tuple[Subject, ...]:
    """One subject per --token, with its --images, --class-name and --masks in the same order."""
    for option, given in (("--images", args.images), ("--class-name", args.class_name), ("--masks", args.masks)):
        if len(given) != len(args.token) and (given or option == "--images"):
            raise UserError(f"{len(given)} {option} for {len(args.token)} --token; give one of each per subject, in the same order")
    made = []
    class_names = args.class_name or [""] * len(args.token)
    for index, (token, class_name, folder) in enumerate(zip(args.token, class_names, args.images, strict=True)):
        images, captions = captioned(pictures(folder), folder, token)
        masks = masks_of(images, args.masks[index]) if args.masks else ()
        made.append(Subject(token, class_name, images, masks, captions))
    return tuple(made)
