"""palimpsest compose: one edit out of several."""

from __future__ import annotations

import functools
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from toolkit.commands import MODEL_HELP, open_edit, open_for, open_method, open_model, save_fitted, save_result
from toolkit.commands.erase import concepts
from toolkit.errors import UserError

if TYPE_CHECKING:
    from toolkit.edits.base import Edit

HELP = "make one edit out of several: applied in this order, or solved for by a method that merges"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("edits", nargs="+", metavar="EDIT", help="FILE[@SCALE], two or more")
    parser.add_argument("--model", help=f"what a method merges on, and what LoRA files of other tools are for: {MODEL_HELP}")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write into")
    solving = parser.add_argument_group("with a method that merges")
    solving.add_argument("--method", metavar="NAME", help="solve for one edit with this method of kind merge, see: palimpsest methods")
    solving.add_argument("--concept", nargs="+", action="extend", default=[], metavar="C", help="what each EDIT is about, if not its words")
    solving.add_argument("--synonyms", nargs="+", action="extend", default=[], metavar="S", help="other words: C=gun,revolver")
    solving.add_argument("--style", action="store_true", help="the concepts are styles, not objects")
    solving.add_argument("--set", nargs="+", action="extend", default=[], metavar="K=V", help="options of the method")
    solving.add_argument("--export", metavar="FORMAT", help="also write the edit in this format, see: palimpsest export --help")
    parser.set_defaults(edit=[], anchor=[])


def run(args: Namespace) -> dict[str, Any]:
    """Writes edit.safetensors, config.json and result.json. Gives `edit`, `kind`, the cost and `edit_bytes`.

    With --method, also `method` and `config`.
    """
    if len(args.edits) < 2:
        raise UserError("one edit given, composing needs two or more; give another EDIT")
    return _solve(args) if args.method else _apply_in_order(args)


def _solve(args: Namespace) -> dict[str, Any]:
    """One edit that the method solves for. Whether each edit fits the model is told by the method, which attaches them."""
    from dataclasses import asdict

    from toolkit.concepts import MergeTask
    from toolkit.edits.chain import Chain
    from toolkit.runs import check_writable, timed

    method = open_method("merge", args.method, args.set)
    for option in ("synonyms", "style"):
        if getattr(args, option) and not args.concept:
            raise UserError(f"--{option} is about a concept, and none is given; give --concept C for each EDIT, or leave it out")
    about = concepts(args)
    args.model = args.model or "emoji-sd"
    base = functools.cache(lambda: open_for(args, method))  # loaded last, unless an edit needs it
    given = [open_edit(written, base) for written in args.edits]
    task = MergeTask(tuple(edit if scale == 1 else Chain.of([edit], [scale]) for edit, scale in given), about)
    said = {"edits": args.edits, "concepts": [asdict(concept) for concept in task.about]}
    out = check_writable(args.out)
    model = base()
    with timed() as cost:
        edit = method.fit(model, task)
    return save_fitted(args, method, model, edit, out, said, {"kind": edit.kind(), **asdict(cost)})


def _apply_in_order(args: Namespace) -> dict[str, Any]:
    """The edits' sum, or their chain."""
    from dataclasses import asdict

    from toolkit.runs import check_writable, timed

    for option in ("concept", "synonyms", "style", "set", "export"):
        if getattr(args, option):
            raise UserError(f"--{option} is for a method that merges, and none is given; give --method NAME, or leave it out")
    base = functools.cache(lambda: open_model(args)) if args.model else None
    given = [open_edit(written, base) for written in args.edits]
    for name, problem in problems(args.edits, [edit for edit, _ in given]):
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


def problems(names: Sequence[str], edits: Sequence[Edit]) -> list[tuple[str, str]]:
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
