"""palimpsest erase: fit an edit that removes concepts."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from toolkit.commands import add_fit_arguments, add_training_arguments, fit_and_save, open_method, per_name
from toolkit.concepts import Concept, EraseTask
from toolkit.errors import UserError

HELP = "fit an edit that erases concepts from a model"
TEMPLATE_HELP = "prompt templates with {} for the concept, or a .txt file with one a line"


def add_arguments(parser: ArgumentParser) -> None:
    add_fit_arguments(parser)
    add_training_arguments(parser)
    parser.add_argument("--concept", nargs="+", action="extend", required=True, metavar="C", help="what to erase")
    parser.add_argument("--synonyms", nargs="+", action="extend", default=[], metavar="S", help="other words: gun, or C=gun,revolver")
    parser.add_argument("--anchor", nargs="+", action="extend", default=[], metavar="A", help="what to draw instead: A, or C=A")
    parser.add_argument("--preserve", nargs="+", action="extend", default=[], metavar="P", help="what must stay as it is")
    parser.add_argument("--style", action="store_true", help="the concepts are styles, not objects")
    parser.add_argument("--template", nargs="+", action="extend", default=[], metavar="T", help=TEMPLATE_HELP)


def run(args: Namespace) -> dict[str, Any]:
    """Writes edit.safetensors, config.json and result.json. Gives `edit`, `method`, `config`, the cost and `edit_bytes`."""
    from toolkit.runs import check_writable

    method = open_method("erase", args.method, args.set)
    task = EraseTask(concepts(args), tuple(args.preserve), templates(args))
    return fit_and_save(args, method, task, check_writable(args.out))


def templates(args: Namespace) -> tuple[str, ...]:
    """What --template says, and what the files that it names say."""
    found: list[str] = []
    for word in args.template:
        if not word.endswith(".txt"):
            found.append(word)
            continue
        if not Path(word).is_file():
            raise UserError(f"no file {word!r} for --template; give a .txt with one template a line")
        lines = [line.strip() for line in Path(word).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        if not lines:
            raise UserError(f"no template in {word!r}; write one a line, with {{}} for the concept")
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
