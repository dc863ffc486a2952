"""palimpsest compose: one edit out of several."""

from __future__ import annotations

import functools
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from toolkit.commands import open_edit, open_model, save_result
from toolkit.errors import UserError

if TYPE_CHECKING:
    from toolkit.edits.base import Edit

HELP = "make one edit out of several, applied in this order"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("edits", nargs="+", metavar="EDIT", help="FILE[@SCALE], two or more")
    parser.add_argument("--model", help="what LoRA files of other tools are for; edits need none")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write into")
    parser.set_defaults(edit=[])


def run(args: Namespace) -> dict[str, Any]:
    """Writes edit.safetensors, config.json and result.json. Gives `edit`, `kind`, the cost and `edit_bytes`."""
    from dataclasses import asdict

    from toolkit.runs import check_writable, timed

    if len(args.edits) < 2:
        raise UserError("one edit given, composing needs two or more; give another EDIT")
    base = functools.cache(lambda: open_model(args)) if args.model else None
    given = [open_edit(written, base) for written in args.edits]
    for name, problem in _problems(args.edits, [edit for edit, _ in given]):
        if args.strict:
            raise UserError(f"{name} {problem}")
        warnings.warn(f"{name} {problem}", stacklevel=2)
    out = check_writable(args.out)
    with timed() as cost:
        edit = compose(given)
    return save_result(out, edit, {"edits": args.edits}, {"kind": edit.kind(), **asdict(cost)})


def compose(edits: Sequence[tuple[Edit, float]]) -> Edit:
    """One edit that does what these do with their scales, attached in this order.

    Neighbouring low-rank edits add up exactly to one low-rank edit; what is left is a chain.
    """
    from toolkit.edits.chain import Chain
    from toolkit.edits.low_rank import LowRank

    parts: list[tuple[Edit, float]] = []
    for kind, group in groupby((part for edit, scale in edits for part in edit.parts(scale)), key=lambda part: type(part[0])):
        run_of_kind = list(group)
        if kind is LowRank and len(run_of_kind) > 1:
            same, scales = zip(*run_of_kind, strict=True)
            parts.append((LowRank.merge(same, scales, _info(same)), 1.0))
        else:
            parts += run_of_kind
    whole, scales = zip(*parts, strict=True)
    return whole[0] if len(parts) == 1 else Chain.of(whole, scales)


def _info(edits: Sequence[Edit]) -> Any:
    """Where a merged edit comes from: its parts' methods and configurations, and their base."""
    from toolkit.edits.base import EditInfo

    parts = [{"method": edit.info.method, "config": dict(edit.info.config)} for edit in edits]
    base = next((edit.info.base for edit in edits if edit.info.base), {})  # other tools' files do not say theirs
    return EditInfo(method="compose", base=base, notes={"parts": parts})


def _problems(names: Sequence[str], edits: Sequence[Edit]) -> list[tuple[str, str]]:
    """(edit, what is wrong) for edits of another base than the first, or that change what an earlier one was fitted to."""
    from toolkit.fingerprint import same_base

    found = []
    for index, (name, edit) in enumerate(zip(names, edits, strict=True)):
        for earlier_name, earlier in zip(names[:index], edits, strict=False):
            if clash := earlier.reads & edit.writes:
                changed = " and ".join(sorted(clash))
                found.append((name, f"changes the {changed} that {earlier_name} was fitted to; give it before that one"))
        if not same_base(edit.info.base, edits[0].info.base):
            found.append((name, f"was fitted on another base than {names[0]}; fit both on the same model"))
    return found
