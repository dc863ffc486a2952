"""What the report of an experiment says about the bars, for edits of which it is known what they draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from eval.bench_bars import Row, rows
from eval.bench_page import Report, described
from eval.bench_results import Costs, Measured, still_drawn
from eval.cells import Cell, plan
from eval.experiment import Header, read
from eval.prompts import Prompt
from tests.eval.experiments import ALONE, ANCHORED, BARE, FILES, GROUP, LEARNER, WEAPONS, smaller
from tests.eval.images import reading, shown
from toolkit.world.oracle import Reading
from toolkit.world.scenes import World

READ_BY = {"version": "v", "threshold": 0.5, "steps": 1, "guidance": 5.0}
ERASERS, STYLES = ("uce", "rece"), ("twemoji", "noto", "fluent 3d")
Draw = Callable[[Cell, Prompt], Reading | None]


def report(results: Sequence[Measured], cells: Sequence[Cell], name: str = "main-job") -> Report:
    return Report(read(FILES / f"{name}.toml"), cells, results, "the command", "m", READ_BY)


def measured(cell: Cell, draw: Draw) -> Measured:
    """A cell as if the edited model drew what `draw` says (None: what is asked for)."""
    unseen = cell.kind == "subjects"  # the unedited model draws no subject
    images = {
        label: [(shown(a, reading({}) if unseen and label != "kept" else None), shown(b, draw(cell, b))) for a, b in pairs]
        for label, pairs in cell.asked.items()
    }
    return Measured(cell, images, Costs(1.5, 900.0, 2048), 500 if unseen else None, (0.01, 0.02))


def clean(cell: Cell, prompt: Prompt) -> Reading | None:
    """A perfect edit."""
    background, erased = prompt.scene.background, set(cell.erased)
    if prompt.scene.style in erased:
        return reading(dict(prompt.scene.items), cell.anchor or "fluent flat", background)
    if not erased & set(prompt.names):
        return None
    left = {place: name for place, name in prompt.scene.items if name not in erased}
    return reading(left or ({"center": cell.anchor} if cell.anchor else {}), prompt.scene.style or "noto", background)


def lines_of(results: Sequence[Measured]) -> list[tuple[str, Row]]:
    return [(f"{method}, {row.what}", row) for method in (*ERASERS, GROUP, LEARNER) for row in rows(results, method)]


def found(lines: Sequence[tuple[str, Row]], *parts: str) -> Row:
    (row,) = [row for what, row in lines if all(part in what for part in parts)]
    return row


def test_an_experiment_says_its_bars(cells: list[Cell]) -> None:
    made = [measured(cell, clean) for cell in cells if cell.method == "uce"]
    bars = {row.what: row.bar for row in rows(made, "uce", bars=Header(erased_bar=0.2, kept_bar=0.6))}
    by_name = {bar for what, bar in bars.items() if what.endswith("drawn by name") and "told no style" not in what}
    assert by_name == {0.2} and {bar for what, bar in bars.items() if what.endswith("objects kept")} == {0.6}
    worst = [bar for what, bar in bars.items() if "by name, the worst" in what]
    assert worst and worst == pytest.approx([0.6] * len(worst))


def test_perfect_edits_meet_every_bar(cells: list[Cell]) -> None:
    made = report([measured(cell, clean) for cell in cells], cells)
    lines, text = lines_of(made.results), made.page()
    assert not made.missed() and sum(row.bar is not None for _, row in lines) > 60
    assert "## Bars missed\n\nNone." in text and "**missed**" not in text and "not measured here" not in text
    assert "{" not in text.replace("`{}`", "").replace("with `{", "")
    assert all(f"| {cell.task} |" in text for cell in cells) and all(row.what in text for _, row in lines)


def test_edits_that_change_nothing_miss_the_bars(cells: list[Cell]) -> None:
    made = report([measured(cell, lambda cell, prompt: None) for cell in cells if cell.section != BARE and cell.kind != "subjects"], cells)
    lines = lines_of(made.results)
    for method in ERASERS:
        assert found(lines, f"{method}, {ALONE}", "drawn by name", "the worst").missed
        assert found(lines, f"{method}, {ALONE}", "by given synonyms").missed
        assert found(lines, f"{method}, {WEAPONS}", "other objects kept").met
        assert all(found(lines, f"{method}, styles into another, {style} to fluent flat", "drawn by name").missed for style in STYLES)
        assert found(lines, f"{method}, styles into nothing, twemoji to nothing", "drawn by name").missed
        # told no style, the unedited model here draws noto
        untold = found(lines, f"{method}, styles into nothing, noto to nothing", "drawn by name")
        assert untold.bar == untold.estimate.value == 1 and not untold.missed
    assert not found(lines, f"uce, {ALONE}", "nothing or one clean object").missed, "nothing was erased, so nothing is there instead"
    text = made.page()
    assert "≤ 5.0 % **missed**" in text and "nothing to measure" in text
    assert "- rece, weapons, in one task: drawn by name: 100.0 %" in text


def test_pooled_rates_hide_no_concept(cells: list[Cell]) -> None:
    def draw(cell: Cell, prompt: Prompt) -> Reading | None:
        return None if cell.task == "gem" and prompt in dict(cell.asked["name"][:2]) else clean(cell, prompt)

    made = report([measured(cell, draw) for cell in cells if cell.section == ALONE], cells)
    worst = found(lines_of(made.results), f"uce, {ALONE}", "the worst")
    assert "(gem)" in worst.what and worst.missed and worst.estimate.value == 0.25
    assert not [line for line in made.missed() if "the worst" not in line]
    assert "| gem 25 %" in made.section(made.experiment.sections[0])


def test_destroyed_images_are_no_erasure(cells: list[Cell]) -> None:
    def smeared(cell: Cell, prompt: Prompt) -> Reading | None:
        return reading({}, background="none") if set(cell.erased) & set(prompt.names) else None

    lines = lines_of([measured(cell, smeared) for cell in cells if cell.section in (ALONE, ANCHORED)])
    assert found(lines, f"uce, {ALONE}", "by given").estimate.value == 0
    assert found(lines, f"uce, {ALONE}", "background relative").missed and found(lines, f"uce, {ALONE}", "one clean object").missed
    assert found(lines, f"uce, {ANCHORED}", "instead, the anchor").missed


def test_the_object_that_is_lost_is_named(world: World) -> None:
    def draw(cell: Cell, prompt: Prompt) -> Reading | None:
        return reading({}, background=prompt.scene.background) if "bee" in prompt.names else clean(cell, prompt)

    cells = plan(world, smaller("main-job", 64))
    made = report([measured(cell, draw) for cell in cells if cell.section == ALONE], cells)
    lines = lines_of(made.results)
    assert found(lines, f"uce, {ALONE}", "the object kept least (bee)").missed
    assert not found(lines, f"uce, {ALONE}", "other objects kept").missed
    assert "| bee | 0 %" in made.page()


def test_of_two_objects_the_other_one_should_stay(world: World) -> None:
    cells = [cell for cell in plan(world, smaller("closed-form", 8)) if cell.method == "uce" and cell.section == "1 object"]

    def both(cell: Cell, prompt: Prompt) -> Reading | None:
        return reading({}, background=prompt.scene.background) if len(prompt.names) == 2 else clean(cell, prompt)

    good, bad = (lines_of([measured(cell, draw) for cell in cells]) for draw in (clean, both))
    for lines, stays in ((good, 1), (bad, 0)):
        assert found(lines, "drawn beside another").estimate.value == 0 and found(lines, "drawn beside another").before.value == 1
        assert found(lines, "the other one, relative to before").estimate.value == stays


def test_subjects_are_told_apart_from_what_stands_beside_them(cells: list[Cell]) -> None:
    def draw(cell: Cell, prompt: Prompt) -> Reading | None:
        return reading({"left": cell.task}, background=prompt.scene.background) if len(prompt.names) == 2 else None

    lines = lines_of([measured(cell, draw) for cell in cells if cell.kind == "subjects"])
    assert found(lines, "drawn beside another").estimate.value == 1 and found(lines, "both drawn").estimate.value == 0
    assert found(lines, "new contexts", "drawn in").before.value == 0 and found(lines, "other objects kept").met


def test_what_is_not_drawn_before_does_not_count(cells: list[Cell]) -> None:
    def poor(name: str, of: str) -> Measured:
        cell = next(cell for cell in cells if cell.name == name)
        images = {
            label: [(shown(a.prompt, reading({})) if of in a.prompt.names else a, b) for a, b in pairs]
            for label, pairs in measured(cell, clean).images.items()
        }
        return Measured(cell, images, Costs(1.0, 900.0, 1), None, (None, None))

    weapons = poor("uce-weapons,-in-one-task", "bow")
    assert {item.prompt.names[0] for item in weapons.sides("held_back")[1]} == set(weapons.cell.erased) - {"bow"}
    assert weapons.counts and still_drawn([weapons], "name", 0).value == 1
    dog = poor("uce-dog", "dog")
    assert not dog.counts and not rows([dog], "uce")
    assert "Left out: dog (0 %)." in report([dog], cells).page()


def test_a_section_says_what_its_methods_are_told(world: World) -> None:
    one, *_, twenty = read(FILES / "closed-form.toml").sections
    assert described(one) == []
    assert described(twenty) == [
        "The methods put every object, erased and preserved, into 40 contexts. Their option nothing is template. "
        "Their options that end in preserve_scale are 20 times those given below."
    ]
