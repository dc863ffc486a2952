"""The command line: finds the command by file, runs it, and prints what it returns.

Exit codes: 0 done, 1 failure, 2 the user's mistake; the last two with one line on stderr.
"""

from __future__ import annotations

import json
import sys
import warnings
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from toolkit import registry
from toolkit.errors import PalimpsestError, UserError, unknown
from toolkit.options import shortened


class Parser(ArgumentParser):
    """An argument parser whose errors are the project's one-line errors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            return _run(argv)
        except Exception as error:
            if "--debug" in argv:
                raise
            message = str(error) if isinstance(error, PalimpsestError) else f"{type(error).__name__}: {error}"
            print("palimpsest:", " ".join(message.split()), file=sys.stderr)
            return getattr(error, "exit_code", 1)
        except KeyboardInterrupt:
            print("palimpsest: interrupted", file=sys.stderr)
            return 130


def _run(argv: Sequence[str]) -> int:
    commands = registry.names("command")
    chosen = next((word for word in argv if not word.startswith("-")), None)
    if chosen is not None and chosen not in commands:
        raise unknown("command", chosen, commands)
    about = "Write, erase and measure concepts in text-to-image diffusion models."
    parser = Parser(prog="palimpsest", description=about, allow_abbrev=False)
    _add_output_arguments(parser, False)
    rooms = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name in commands:
        subparser = rooms.add_parser(name, help=registry.help_line(name), description=registry.help_line(name), allow_abbrev=False)
        if name == chosen:
            command = registry.load("command", name)
            command.add_arguments(subparser)
            _add_run_arguments(subparser)
            _add_output_arguments(subparser, SUPPRESS)
            args, extra = parser.parse_known_args(argv)
            if extra:
                raise _unexpected(extra[0], subparser)
            result = command.run(args)
            if result:  # empty in all but the main one of several processes
                print(json.dumps(result, ensure_ascii=False, default=str) if args.json else render(result))
            return 0
    parser.parse_args(argv)
    parser.print_help()
    return 0


def _add_output_arguments(parser: ArgumentParser, default: Any) -> None:
    """Options that may stand before or after the command's name."""
    parser.add_argument("--json", action="store_true", default=default, help="print one JSON object")
    parser.add_argument("--debug", action="store_true", default=default, help="show the traceback of a failure")


def _add_run_arguments(parser: ArgumentParser) -> None:
    """The options that every command takes."""
    group = parser.add_argument_group("where and how to run")
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps; default: cuda if there is one, else cpu")
    group.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the weights")
    group.add_argument("--attention", default="sdpa", choices=("sdpa", "xformers"), help="what computes attention; xformers: on CUDA only")
    group.add_argument("--offload", action="store_true", help="keep the parts that are not in use on the CPU")
    group.add_argument("--strict", action="store_true", help="an edit that was fitted on another base is an error")


def _unexpected(word: str, parser: ArgumentParser) -> UserError:
    if word.startswith("-"):
        return unknown(f"option of {parser.prog}", word.partition("=")[0], parser._option_string_actions)
    return UserError(f"unexpected argument {word!r}; see {parser.prog} --help")


def _show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
    if issubclass(category, UserWarning):
        print("palimpsest: warning:", " ".join(str(message).split()), file=sys.stderr)


def render(result: Mapping[str, Any]) -> str:
    """A command's result for people: one line per key, tables for lists and dicts of records."""
    lines = []
    for key, value in result.items():
        if isinstance(value, Mapping) and value and all(isinstance(row, Mapping) for row in value.values()):
            value = [{key: name, **row} for name, row in value.items()]
        if isinstance(value, list) and value and all(isinstance(row, Mapping) for row in value):
            lines += _table(value)
        else:
            lines.append(f"{key}: {_cell(value)}")
    return "\n".join(lines)


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Aligned columns under a heading."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, *([_cell(row.get(name, "")) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={_cell(shortened(item))}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_cell, value))
    return str(value)
