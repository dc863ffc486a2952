"""palimpsest erase: fit an edit that removes concepts."""

from __future__ import annotations

import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from toolkit.commands import add_fit_arguments, add_training_arguments, fit_and_save, open_method, per_name
from toolkit.concepts import Concept, EraseTask
from toolkit.errors import UserError

HELP = "fit an edit that erases concepts from a model"
PRESERVE_HELP = "what must stay as it is: words, or a .txt file with one a line"
TEMPLATE_HELP = "prompt templates with {} for the concept, or a .txt file with one a line"


def add_arguments(parser: ArgumentParser) -> None:
    add_fit_arguments(parser)
    add_training_arguments(parser)
    parser.add_argument("--concept", nargs="+", action="extend", required=True, metavar="C", help="what to erase")
    parser.add_argument("--synonyms", nargs="+", action="extend", default=[], metavar="S", help="other words: gun, or C=gun,revolver")
    parser.add_argument("--anchor", nargs="+", action="extend", default=[], metavar="A", help="what to draw instead: A, or C=A")
    parser.add_argument("--preserve", nargs="+", action="extend", default=[], metavar="P", help=PRESERVE_HELP)
    parser.add_argument("--preserve-world", action="store_true", help="preserve everything else that the embedded model draws, too")
    parser.add_argument("--style", action="store_true", help="the concepts are styles, not objects")
    parser.add_argument("--template", nargs="+", action="extend", default=[], metavar="T", help=TEMPLATE_HELP)


def run(args: Namespace) -> dict[str, Any]:
    """Writes edit.safetensors, config.json and result.json. Gives `edit`, `method`, `config`, the cost and `edit_bytes`."""
    from toolkit.runs import check_writable

    method = open_method("erase", args.method, args.set)
    task = EraseTask(concepts(args), preserved(args), with_files(args.template, "--template"))
    result = fit_and_save(args, method, task, check_writable(args.out))
    if method.training_free and not task.preserve and not method.config().get("prior"):  # nothing else holds the rest where it is
        warnings.warn("nothing was preserved, so much else may have changed; name what must stay with --preserve", stacklevel=2)
    return result


def preserved(args: Namespace) -> tuple[str, ...]:
    """What --preserve says, and with --preserve-world what the embedded world has besides what is erased."""
    given = with_files(args.preserve, "--preserve")
    if not args.preserve_world:
        return given
    from toolkit.world.kept import everything_else
    from toolkit.world.scenes import load_world

    world, words = load_world(), {word for concept in concepts(args) for word in concept.words}
    styles = [style for style in world.styles if args.style and style not in words]
    return tuple(dict.fromkeys((*given, *styles, *everything_else(world, words))))


def with_files(words: Iterable[str], option: str) -> tuple[str, ...]:
    """Words that were given to an option, and in the place of .txt files their lines."""
    found: list[str] = []
    for word in words:
        if not word.endswith(".txt"):
            found.append(word)
            continue
        if not Path(word).is_file():
            raise UserError(f"no file {word!r} for {option}; give a .txt with one a line")
        lines = [line.strip() for line in Path(word).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        if not lines:
            raise UserError(f"nothing in {word!r} for {option}; write one a line")
        found += lines
    return tuple(found)


def concepts(args: Namespace) -> tuple[Concept, ...]:
    """The concepts that --concept, --synonyms, --anchor and --style describe. Plain --anchor is for all of them."""
    names = list(dict.fromkeys(args.concept))
    synonyms = per_name(args.synonyms, names, "--synonyms")
    if len(args.anchor) == 1 and "=" not in args.anchor[0]:
        anchors = dict.fromkeys(names, args.anchor[0])
    else:
        anchors = per_name(args.anchor, names, "--anchor")
    return tuple(
        Concept(
            name,
            synonyms=tuple(word.strip() for word in synonyms[name].split(",")) if name in synonyms else (),
            anchor=anchors.get(name),
            kind="style" if args.style else "object",
        )
        for name in names
    )
