"""The HTML page of an experiment: how well methods hold, what they leave, and what their images look like."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from PIL import Image

from eval import report_parts as part
from eval.bench import Bench
from eval.bench_attacks import (
    FALLS,
    PROOF,
    Attacked,
    by_attack,
    control_of,
    falls_to,
    pooled_rates,
    proof,
    recovered,
    strongest,
)
from eval.bench_page import COMPARE, COMPARED, COST, Report, mean_cost
from eval.bench_results import BY_WORD, Measured, by_section, drawn_most, kept, still_drawn
from eval.cells import Cell
from eval.experiment import Section
from eval.intervals import NOTHING, Estimate, mean
from eval.prompts import Prompt

IN_A_ROW = 8  # images of a strip
KINDS = {"one": "erases in closed form", "two": "erases by training"}
ABOUT_RETENTION = "Retention is how many images of everything else stay right, relative to before. Lines are intervals; best is top right."


def arena_page(report: Report, bench: Bench) -> str:
    """The page of a report, with the images that the bench keeps."""
    by = report.measured_by
    measured_by = f"oracle {by['version']} at threshold {by['threshold']}, images of {by['steps']} steps with guidance {by['guidance']}"
    about = {
        "measured": f"{len(report.results)} of {len(report.cells)} tasks, {len(report.attacks)} attacks",
        "model": f"emoji-sd, weights {report.model}",
        "read by": measured_by,
        "made by": report.command,
    }
    return part.page(
        report.experiment.header.title,
        part.paragraph(" ".join(report.experiment.header.about.split())),
        part.facts(about),
        part.paragraph("Rates are in percent, with 95 % intervals, clustered by prompt. Click on a heading to sort by it.", "soft"),
        *(one_section(report, bench, section) for section in report.experiment.sections),
        part.section("Bars missed", part.points(report.missed()) or part.paragraph("None.")),
        part.section("Commands", part.commands([report.command]), _folded_commands(report, bench)),
    )


def one_section(report: Report, bench: Bench, section: Section) -> str:
    """What was measured in a section."""
    found = by_section(report.results).get(section.title, {})
    found = {label: found[label] for label in report.experiment.methods if label in found}
    tried = report.attacks_in(section)
    if section.objects:
        about = [robustness(found, tried), side_by_side(found, tried)]
    else:
        lines = [[label, *COMPARE[section.kind](own), *mean_cost(own)] for label, own in found.items()]
        about = [part.table(("method", *COMPARED[section.kind], *COST), lines)]
    return part.section(
        section.title,
        *about,
        *heat_maps(found, tried),
        part.table(*_proof(tried)),
        part.section("Images", *grids(report, bench, section), level=3),
    )


# --- figures and tables -----------------------------------------------------------------------------------------------
def robustness(found: dict[str, list[Measured]], tried: Sequence[Attacked]) -> str:
    """Each method's robustness against what it leaves: to attacks that need no more than prompts, and to all but new training."""
    held_back = {label: still_drawn(own, "held_back") for label, own in found.items()}
    if not tried:
        return _scatter(found, held_back, "what held-back synonyms bring back")
    prompts = [item for item in tried if item.needs == "text-only"]
    others = [item for item in tried if item.needs != "fine-tuning"]  # which brings back whatever it is given pictures of
    figures = [
        _scatter(found, {label: strongest(_of(some, label))[1] for label in found}, f"what the strongest attack {kind} brings back")
        for kind, some in (("by prompts alone", prompts), ("without new training", others if len(others) > len(prompts) else ()))
    ]
    return part.beside(*figures)


def _scatter(found: dict[str, list[Measured]], left: dict[str, Estimate], what: str) -> str:
    """Robustness is all that is not left; both over all concepts."""
    points = [
        part.Point(
            label,
            kept(own),
            Estimate(1 - left[label].value, 1 - left[label].high, 1 - left[label].low, left[label].n),
            "one" if own[0].cell.fitted.training_free else "two",
        )
        for label, own in found.items()
        if not math.isnan(left[label].value) and not math.isnan(kept(own).value)
    ]
    about = f"Robustness is 100 % less {what}, over all concepts. {ABOUT_RETENTION}"
    return part.scatter(points, "others kept, %", "robustness, %", KINDS, about)


def side_by_side(found: dict[str, list[Measured]], tried: Sequence[Attacked]) -> str:
    """Every method with its rates."""
    labels = list(by_attack(tried))
    rows: list[list[part.Value]] = []
    for method, own in found.items():
        attacks = _of(tried, method)
        rates, (label, most) = pooled_rates(attacks), strongest(attacks)
        worst = drawn_most(own)
        rows.append(
            [
                method,
                *(still_drawn(own, word) for word in BY_WORD),
                worst[2],
                *(rates.get(name, NOTHING) for name in labels),
                label,
                most,
                float(len(falls_to(attacks))) if attacks else math.nan,
                kept(own),
                mean([value for result in own for value in result.drift]),
                own[0].costs.seconds if len(own) == 1 else sum(result.costs.seconds for result in own) / len(own),
                sum(result.costs.bytes for result in own) / len(own) / 1024,
            ]
        )
    columns = (
        "method",
        *BY_WORD.values(),
        "worst by name",
        *labels,
        "strongest attack",
        "it brings back",
        "falls to",
        "others kept",
        "drift",
    )
    caption = f"How often what was erased is drawn. A method falls to an attack that brings it back in {100 * FALLS:.0f} % of the images."
    return part.table((*columns, "fit, s", "edit, KiB"), rows, caption if tried else caption.split(".")[0] + ".")


def heat_maps(found: dict[str, list[Measured]], tried: Sequence[Attacked]) -> list[str]:
    """How often what was erased is drawn, by method and by how it is asked for: over all concepts, and for each of several."""
    cells = {result.cell.task: result.cell for own in found.values() for result in own if result.cell.kind in ("objects", "styles")}
    labels = [label for label, items in by_attack(tried).items() if not all(item.impossible for item in items)]
    over_all = [("what was erased", set(cells))] if len(cells) > 1 else []
    maps = []
    for said, tasks in (*over_all, *((task, {task}) for task in cells)):
        rows: dict[str, list[Estimate]] = {}
        for method, own in found.items():
            here = [result for result in own if result.cell.task in tasks]
            rates = pooled_rates([item for item in _of(tried, method) if item.cell.task in tasks])
            rows[method] = [*(still_drawn(here, word) for word in BY_WORD), *(rates.get(label, NOTHING) for label in labels)]
        maps.append(part.heat_map((*BY_WORD.values(), *labels), rows, f"{said}: how often it is drawn, in %"))
    return maps


def _proof(tried: Sequence[Attacked]) -> tuple[Sequence[str], list[list[part.Value]], str]:
    """Attacks with their controls and costs."""
    rows: list[list[part.Value]] = []
    for (label, items), line in zip(by_attack(tried).items(), proof(tried), strict=True):
        done = [item for item in items if not item.impossible]
        took = [float(word) if word else math.nan for word in line[4:7]]
        rows.append([label, items[0].needs, control_of(done), recovered(done), *took, line[7]])
    control = "A control is what an attack draws of an object that no model knew; of words, what random ones of the same length draw"
    return PROOF, rows, f"Attacks. {control}. Costs are means over the tasks."


def _of(tried: Sequence[Attacked], method: str) -> list[Attacked]:
    """The attacks on a method's cells."""
    return [item for item in tried if item.cell.method == method]


# --- images -----------------------------------------------------------------------------------------------------------
def grids(report: Report, bench: Bench, section: Section) -> list[str]:
    """For each task of each method its images before, after and attacked, as far as they are kept."""
    shown = []
    for cell in (cell for cell in report.cells if cell.section == section.title):
        pairs = next((cell.asked[label] for label in ("name", "alone") if label in cell.asked), ())
        rows = [
            ("before", bench.unedited.file.stem, [before for before, _ in pairs]),
            ("after", bench.file(cell).stem, [after for _, after in pairs]),
            *(
                (f"{item.label}, {_percent(item.rate)}", item.stem, [one.prompt for one in item.shown])
                for item in report.attacks
                if item.cell is cell
            ),
        ]
        strips = [strip(bench, label, of, prompts, cell) for label, of, prompts in rows]
        if any(strips):
            shown.append(part.folded(f"{cell.method}, {cell.task}", *strips))
    return shown


def strip(bench: Bench, label: str, of: str, prompts: Sequence[Prompt], cell: Cell) -> str:
    """The first images of these prompts that are kept."""
    files = ((bench.gallery.file(of, prompt), prompt) for prompt in prompts)
    found = list(islice(((file, prompt) for file, prompt in files if file.is_file()), IN_A_ROW))
    said = f"{len(found)} images of {cell.task}, {label}: {'; '.join(prompt.text for _, prompt in found)}"
    return part.strip(label, [_open(file) for file, _ in found], said)


def _open(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")


def _percent(rate: Estimate) -> str:
    return "not tried" if math.isnan(rate.value) else f"{100 * rate.value:.0f} %"


# --- commands ---------------------------------------------------------------------------------------------------------
def _folded_commands(report: Report, bench: Bench) -> str:
    lines = attack_commands(report, bench)
    return part.folded("Each attack by itself", part.commands(lines)) if lines else ""


def attack_commands(report: Report, bench: Bench) -> list[str]:
    """What to type to try each attack on the edits that are kept."""
    header, lines = report.experiment.header, []
    for item in report.attacks:
        edit = bench.edit_file(item.cell)
        if item.impossible or len(item.cell.erased) != 1 or not edit.is_file():
            continue
        attack = item.cell.attacks[item.label]
        options = [f"{name}={attack.config()[name]}" for name in attack.changed()]
        words = ["palimpsest", "attack", "--edit", str(edit), "--method", attack.name(), "--concept", item.cell.erased[0]]
        words += ["--n", str(item.cell.n), "--steps", str(header.steps), "--guidance", str(header.guidance)]
        lines.append(shlex.join([*words, *(["--set", *options] if options else []), "--out", f"out/attacks/{item.stem}"]))
    return lines
