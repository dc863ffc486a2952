"""palimpsest customize: fit an edit that teaches a model new subjects from pictures."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from toolkit.commands import add_fit_arguments, fit_and_save, open_method
from toolkit.concepts import CustomizeTask, Subject
from toolkit.errors import UserError

HELP = "fit an edit that teaches a model new subjects from pictures"
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def add_arguments(parser: ArgumentParser) -> None:
    add_fit_arguments(parser)
    parser.add_argument("--images", nargs="+", action="extend", required=True, metavar="DIR", help="a folder of pictures per subject")
    parser.add_argument("--masks", nargs="+", action="extend", default=[], metavar="DIR", help="a folder of masks, named as the pictures")
    parser.add_argument("--class-name", nargs="+", action="extend", required=True, metavar="N", help="what each subject is, e.g. dog")
    parser.add_argument("--token", nargs="+", action="extend", required=True, metavar="T", help="each subject's new word, e.g. '<toy>'")


def run(args: Namespace) -> dict[str, Any]:
    """Writes edit.safetensors, config.json and result.json. Gives `edit`, `method`, `config`, the cost and `edit_bytes`."""
    from toolkit.runs import check_writable

    method = open_method("customize", args.method, args.set)
    task = CustomizeTask(subjects(args))
    return fit_and_save(args, method, task, check_writable(args.out))


def subjects(args: Namespace) -> tuple[Subject, ...]:
    """One subject per --token, with its --images, --class-name and --masks in the same order."""
    for option, given in (("--images", args.images), ("--class-name", args.class_name), ("--masks", args.masks)):
        if len(given) != len(args.token) and (given or option != "--masks"):
            raise UserError(f"{len(given)} {option} for {len(args.token)} --token; give one of each per subject, in the same order")
    made = []
    for index, (token, class_name, folder) in enumerate(zip(args.token, args.class_name, args.images, strict=True)):
        images = pictures(folder)
        masks = masks_of(images, args.masks[index]) if args.masks else ()
        made.append(Subject(token, class_name, images, masks))
    return tuple(made)


def pictures(folder: str) -> tuple[Path, ...]:
    """The picture files of a folder by name. No folder or no picture is a UserError."""
    if not Path(folder).is_dir():
        raise UserError(f"{folder} is not a folder; give a folder of pictures")
    found = tuple(sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in PICTURES))
    if not found:
        raise UserError(f"no picture in {folder}; put files of type {', '.join(sorted(PICTURES))} there")
    return found


def masks_of(images: tuple[Path, ...], folder: str) -> tuple[Path, ...]:
    """The mask with the same name (suffixes may differ) for every picture."""
    by_name = {path.stem: path for path in pictures(folder)}
    for image in images:
        if image.stem not in by_name:
            raise UserError(f"no mask for {image.name} in {folder}; give one file named {image.stem} per picture")
    return tuple(by_name[image.stem] for image in images)
