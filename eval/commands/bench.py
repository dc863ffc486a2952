"""palimpsest bench: measure methods on tasks, and compare them."""

from __future__ import annotations

import shlex
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.commands import MODEL_HELP, open_model
from toolkit.errors import UserError, unknown

if TYPE_CHECKING:
    from eval.cells import Cell

HELP = "measure methods on the tasks of an experiment, only what is missing, and write a report"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a TOML file that describes the experiment, see eval/experiments/")
    parser.add_argument("--model", default="emoji-sd", help=MODEL_HELP)
    parser.add_argument("--only", nargs="+", action="extend", default=[], metavar="NAME", help="these methods, sections or tasks only")
    parser.add_argument(
        "--out",
        metavar="DIR",
        default="out/bench",
        help="folder that results are written to, one JSON file each (default %(default)s); those in eval/results are found too",
    )
    parser.add_argument("--report", metavar="FILE", help="the report (default: FILE's name with .md, in that folder)")
    parser.add_argument("--html", metavar="FILE", help="the report as a page by itself as well, with figures and the images that are kept")
    parser.add_argument("--images", action="store_true", help="keep every image in the folder images of that folder")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="the I-th of N parts of the tasks, for N machines (default: all)")
    parser.set_defaults(edit=[])


def run(args: Namespace) -> dict[str, Any]:
    """Writes what is missing, then the report from all results there are.

    Gives `report`, `html` when it was asked for, `results` (their files), `measured` (how many this process made now), `of` (how many
    there are in all) and `missed`. Processes that share a folder, launched together or not, share the work.
    """
    from eval.bench import Bench
    from eval.bench_page import Report
    from eval.bench_work import Part, leave_group, share
    from eval.cells import plan
    from eval.commands.evaluate import knows_world
    from eval.experiment import read
    from eval.rates import Painter
    from eval.report_arena import arena_page
    from eval.stored import found
    from toolkit.runs import check_writable, timed, write_atomic
    from toolkit.world.oracle import load_oracle
    from toolkit.world.scenes import load_world

    experiment, world, shard = read(args.file), load_world(), Part.read(args.shard)
    cells = plan(world, experiment)
    check_names(cells, args.only)
    chosen = shard.of([cell for cell in cells if asked_for(cell, args.only)])
    out = check_writable(args.out)
    report = Path(args.report or out / f"{Path(args.file).stem}.md")
    for file in (report, *([Path(args.html)] if args.html else [])):
        check_writable(file.parent)
    model = open_model(args)
    if not knows_world(model):
        raise UserError(f"{args.model} does not draw the embedded world, so nothing says what it shows; bench emoji-sd")
    process = leave_group()
    painter = Painter(load_oracle(), experiment.header.steps, experiment.header.guidance)
    bench = Bench(world, model, painter, out, args.images)
    missing = [cell for cell in chosen if bench.missing(cell)]
    measured: list[Cell] = []

    def measure(cell: Cell) -> None:
        with timed() as cost:
            bench.measure(cell)
        measured.append(cell)
        print(f"[{len(measured)}/{len(missing)}] {cell.section}, {cell.name}: {cost.seconds:.0f} s", file=sys.stderr, flush=True)

    share(process.first(missing), bench.file, lambda cell: bool(bench.missing(cell)), measure)
    results = [result for cell in cells if (result := bench.measured(cell))]
    attacks = [attacked for cell in cells for attacked in bench.attacked(cell)]
    page = Report(experiment, cells, results, command(args), model.fingerprint["weights"][:12], bench.measured_by, attacks)
    write_atomic(report, page.page())
    if args.html:
        write_atomic(args.html, arena_page(page, bench))
    if process.i > 1:  # the first of several processes says what all of them made
        return {}
    files = [*(bench.file(result.cell) for result in results), *(bench.attack_file(one.cell, one.label) for one in attacks)]
    return {
        "report": str(report),
        **({"html": args.html} if args.html else {}),
        "results": [str(found(file)) for file in files],
        "measured": len(measured),
        "of": len(cells),
        "missed": page.missed(),
    }


def command(args: Namespace) -> str:
    """What to type to make the same report."""
    given = [
        ("--model", args.model, "emoji-sd"),
        ("--out", args.out, "out/bench"),
        ("--report", args.report, None),
        ("--html", args.html, None),
    ]
    words = [word for option, value, default in given if value != default for word in (option, value)]
    return shlex.join(["palimpsest", "bench", args.file, *words, *(["--images"] if args.images else [])])


def asked_for(cell: Cell, only: list[str]) -> bool:
    """Whether a cell is one of these methods, sections, tasks or names; all are when none is given."""
    return not only or not {cell.method, cell.section, cell.task, cell.name}.isdisjoint(only)


def check_names(cells: list[Cell], only: list[str]) -> None:
    """Whether every word of --only names something."""
    known = {name for cell in cells for name in (cell.method, cell.section, cell.task, cell.name)}
    for word in only:
        if word not in known:
            raise unknown("method, section or task for --only", word, known)
