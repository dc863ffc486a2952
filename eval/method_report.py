"""Measures the methods on the shipped embedded model and writes their page.

    python -m eval.method_report [--only NAME ...] [--n N] [--out docs/methods-measured.md] [--work out/method-report]

Every cell (a method on a task, `eval.method_cells`) is one JSON file in --work that holds what the oracle read in every image.
A file that is there for the same model, settings and prompts is not made again, so a run that was interrupted goes on where it
was; the page is made from the files alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from eval import prompts as make
from eval.fidelity import oracle_kid
from eval.method_cells import ANCHORED, ERASERS, LEARNER, OBJECTS, SPARE_ANCHORED, SPARES, Cell, Chosen, plan
from eval.method_page import Settings, missed, page
from eval.method_results import Measured
from eval.prompts import Prompt
from eval.rates import DRAWN_WELL, Painter, Shown, object_right, share
from toolkit import registry
from toolkit.commands import pairs
from toolkit.errors import PalimpsestError, UserError, unknown
from toolkit.io.files import FILE_NAME, save_edit
from toolkit.method import Method
from toolkit.runs import check_writable, timed, write_atomic
from toolkit.world.oracle import NONE, Reading, load_oracle
from toolkit.world.scenes import PLACES, Scene, World, load_world

if TYPE_CHECKING:
    from toolkit.model import Model

EVERY = Chosen((*OBJECTS, *SPARES), (*ANCHORED, *SPARE_ANCHORED))


@dataclass
class Bench:
    """Where cells are measured. n: images of a concept by name. methods: name -> the method with its options."""

    world: World
    model: Model
    painter: Painter
    n: int
    work: Path
    methods: Mapping[str, Method]

    def file(self, name: str, *made_with: Any) -> Path:
        """The JSON file of what is measured with these settings on this model; other settings have another file."""
        key = repr((made_with, self.model.fingerprint, self.painter.measured_by()))
        return self.work / f"{name}.{hashlib.blake2b(key.encode(), digest_size=6).hexdigest()}.json"

    def cell_file(self, cell: Cell) -> Path:
        """The JSON file of a cell."""
        return self.file(cell.name, cell, self.methods[cell.method].config())

    # --- which objects count ------------------------------------------------------------------------------------------
    def choose(self) -> tuple[Chosen, dict[str, float]]:
        """The first of the lists that the unedited model draws well; and how often it draws those that it does not."""
        file = self.file("unedited", EVERY, self.n)
        if not file.is_file():
            poorly: dict[str, float] = {}

            def well(*names: str) -> bool:
                drawn = {name: self.drawn(name) for name in names}
                poorly.update({name: share for name, share in drawn.items() if share < DRAWN_WELL})
                return not poorly.keys() & drawn

            objects = _first(len(OBJECTS), EVERY.objects, well)
            anchored = _first(len(ANCHORED), EVERY.anchored, lambda pair: well(*pair))
            write_atomic(file, json.dumps({"objects": objects, "anchored": anchored, "poorly": poorly}))
        found = json.loads(file.read_text())
        return Chosen(tuple(found["objects"]), tuple((name, anchor) for name, anchor in found["anchored"])), found["poorly"]

    def drawn(self, name: str) -> float:
        """How often the unedited model draws an object that it is asked for by name."""
        shown = self.painter.draw(self.model, make.single(self.world, name, self.n), name)
        return share(shown, object_right).value

    # --- cells --------------------------------------------------------------------------------------------------------
    def measure(self, cell: Cell) -> None:
        """Fit the method, draw everything before and after, and write what the oracle reads."""
        with TemporaryDirectory() as folder:
            method, task = self.methods[cell.method], cell.to_fit(self.world, Path(folder))
            with timed() as cost:
                edit = method.fit(self.model, task)
            size = save_edit(edit, Path(folder) / FILE_NAME).stat().st_size
        asked = [pair for prompts in cell.asked.values() for pair in prompts]
        before = self.painter.draw(self.model, [first for first, _ in asked], f"{cell.name}, before")
        with self.model.attached(edit):
            after = self.painter.draw(self.model, [second for _, second in asked], f"{cell.name}, after")
        by_name = slice(0, len(cell.asked.get("name", ())))
        record = {
            "method": cell.method,
            "task": cell.task,
            "config": method.config(),
            "measured_by": self.painter.measured_by(),
            "seconds": cost.seconds,
            "bytes": size,
            "steps": edit.info.notes.get("steps"),
            "kid": [oracle_kid(self.world, self.painter.oracle, side[by_name]).as_json()["value"] for side in (before, after)],
            "before": [to_json(shown) for shown in before],
            "after": [to_json(shown) for shown in after],
        }
        write_atomic(self.cell_file(cell), json.dumps(record, ensure_ascii=False))

    def measured(self, cell: Cell) -> Measured | None:
        """What the cell's file holds, None when there is none."""
        file = self.cell_file(cell)
        if not file.is_file():
            return None
        record = json.loads(file.read_text())
        pairs = iter(zip(map(from_json, record["before"]), map(from_json, record["after"]), strict=True))
        images = {label: [next(pairs) for _ in prompts] for label, prompts in cell.asked.items()}
        return Measured(cell, images, record["seconds"], record["bytes"], record["steps"], record["kid"])


def _first(count: int, items: Sequence[Any], test: Callable[[Any], bool]) -> list[Any]:
    """The first `count` that pass a test; those after them are not tested."""
    return list(islice(filter(test, items), count))


def to_json(shown: Shown) -> dict[str, Any]:
    """An image without its pixels: what was asked for and what the oracle reads."""
    prompt, reading = shown.prompt, shown.reading
    asked = {"background": prompt.scene.background, "style": prompt.scene.style, "items": prompt.scene.items, "words": prompt.words}
    shows = {"objects": reading.present(), "styles": reading.styles, "background": reading.background}
    return {"prompt": prompt.text, "seed": prompt.seed, "asked": asked, "shows": shows}


def from_json(row: Mapping[str, Any]) -> Shown:
    """The inverse of `to_json`; without pixels."""
    asked, shows = row["asked"], row["shows"]
    scene = Scene(asked["background"], asked["style"], tuple((place, name) for place, name in asked["items"]))
    reading = Reading(dict.fromkeys(PLACES, NONE) | shows["objects"], shows["styles"], shows["background"])
    return Shown(Prompt(row["prompt"], row["seed"], scene, tuple(asked["words"])), reading, torch.empty(0))


# --- command line -----------------------------------------------------------------------------------------------------
def asked_for(cell: Cell, only: Sequence[str]) -> bool:
    """Whether a cell is one of these methods, sections, tasks or names; all are when none is given."""
    return not only or not names(cell).isdisjoint(only)


def names(cell: Cell) -> set[str]:
    """What a cell may be called on the command line."""
    return {cell.method, cell.section, cell.task, cell.name}


def configured(words: list[str]) -> dict[str, Method]:
    """The methods with the options that METHOD.K=V words give them, else their defaults."""
    given: dict[str, dict[str, str]] = {name: {} for name in (*ERASERS, LEARNER)}
    for word, value in pairs(words, "--set").items():
        method, dot, key = word.partition(".")
        if not dot:
            raise UserError(f"--set {word!r} does not say the method; write for example --set {ERASERS[0]}.lamb=0.1")
        if method not in given:
            raise unknown("method in --set", method, given)
        given[method][key] = value
    return {name: registry.load("method", name).from_config(options) for name, options in given.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing and write the page."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m eval.method_report", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--only", nargs="+", action="extend", default=[], metavar="NAME", help="measure these methods, sections or tasks only"
    )
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="METHOD.K=V", help="options of the methods")
    parser.add_argument("--n", type=int, default=64, help="images of an erased concept by name (default %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="denoising steps (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="where the model runs (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("docs/methods-measured.md"), help="the page (default %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("out/method-report"), help="the cells' folder (default %(default)s)")
    try:
        return run(parser.parse_args(argv), shlex.join(["python", "-m", "eval.method_report", *argv]))
    except PalimpsestError as error:
        print(f"palimpsest: {error}", file=sys.stderr)
        return error.exit_code


def run(args: argparse.Namespace, command: str) -> int:
    """Measure the missing cells, then write the page from every cell that is there."""
    from toolkit.model import load_model

    if args.n < 1:
        raise UserError(f"--n is {args.n}, needs at least 1; give the number of images per concept")
    world, methods = load_world(), configured(args.set)
    known = {name for cell in plan(world, EVERY, 1) for name in names(cell)}
    for word in args.only:
        if word not in known:
            raise unknown("method, section or task for --only", word, known)
    check_writable(args.out.parent)
    painter = Painter(load_oracle(), steps=args.steps)
    bench = Bench(world, load_model(device=args.device), painter, args.n, check_writable(args.work), methods)
    chosen, poorly = bench.choose()
    cells = plan(world, chosen, args.n)
    missing = [cell for cell in cells if asked_for(cell, args.only) and not bench.cell_file(cell).is_file()]
    for i, cell in enumerate(missing):
        with timed() as cost:
            bench.measure(cell)
        print(f"[{i + 1}/{len(missing)}] {cell.name}: {cost.seconds:.0f} s", file=sys.stderr, flush=True)
    results = [result for cell in cells if (result := bench.measured(cell))]
    settings = Settings(
        command,
        args.n,
        painter.measured_by(),
        bench.model.fingerprint["weights"][:12],
        {name: method.config() for name, method in methods.items()},
        len(cells),
        poorly,
    )
    write_atomic(args.out, page(results, settings))
    print(f"{args.out}: {len(results)} of {len(cells)} cells; bars missed: {'; '.join(missed(results)) or 'none'}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
