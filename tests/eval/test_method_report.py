"""The report about the methods: what is measured, that nothing is measured twice, and what the page says about the bars."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from eval import method_report
from eval.method_cells import ANCHORED, ERASERS, LEARNER, OBJECTS, SPARES, STYLES, Cell, Chosen, plan
from eval.method_page import Settings, missed, page
from eval.method_report import Bench, configured, from_json, main, to_json
from eval.method_results import Measured, Row, rows, still_drawn
from eval.prompts import Prompt
from eval.rates import Painter
from eval.subjects import PICTURES
from tests.eval.images import Renderer, reading, shown, true_reading
from toolkit.concepts import EraseTask
from toolkit.model import Model
from toolkit.world.oracle import Oracle, Reading
from toolkit.world.scenes import World

CHOSEN = Chosen(OBJECTS, ANCHORED)
READ_BY = {"version": "v", "threshold": 0.5, "steps": 1, "guidance": 5.0}
SETTINGS = Settings("the command", 8, READ_BY, "m", {name: {} for name in (*ERASERS, LEARNER)}, 62, {"bell": 0.5})
Draw = Callable[[Cell, Prompt], Reading | None]


@pytest.fixture(scope="module")
def cells(world: World) -> list[Cell]:
    return plan(world, CHOSEN, 8)


def measured(cell: Cell, draw: Draw) -> Measured:
    """A cell as if the edited model drew what `draw` says (None: what is asked for)."""
    unseen = cell.section == "subjects"  # the unedited model draws no subject
    images = {
        label: [(shown(a, reading({}) if unseen and label != "kept" else None), shown(b, draw(cell, b))) for a, b in pairs]
        for label, pairs in cell.asked.items()
    }
    return Measured(cell, images, 1.5, 2048, 500 if unseen else None, (0.01, 0.02))


def clean(cell: Cell, prompt: Prompt) -> Reading | None:
    """A perfect edit."""
    background, erased = prompt.scene.background, set(cell.erased)
    if prompt.scene.style in erased:
        return reading(dict(prompt.scene.items), cell.anchor or "fluent flat", background)
    if not erased & set(prompt.names):
        return None
    return reading({"center": cell.anchor} if cell.anchor else {}, prompt.scene.style or "noto", background)


def lines_of(results: Sequence[Measured]) -> list[tuple[str, Row]]:
    return [(f"{method}, {row.what}", row) for method in (*ERASERS, LEARNER) for row in rows(results, method)]


def found(lines: Sequence[tuple[str, Row]], *parts: str) -> Row:
    (row,) = [row for what, row in lines if all(part in what for part in parts)]
    return row


# --- what is measured -------------------------------------------------------------------------------------------------
def test_the_lists_hold_well_spread_scored_objects(world: World) -> None:
    names = [*OBJECTS, *SPARES]
    assert len(OBJECTS) == 12 and "pistol" in OBJECTS and len(set(names)) == len(names) and set(names) <= set(world.names("scored"))
    assert len({world.things[name].group for name in OBJECTS}) >= 9
    assert all(world.things[name].given and world.things[name].held_back for name in world.names("scored"))


def test_the_tasks_are_the_ones_asked_for(world: World, cells: list[Cell]) -> None:
    assert len({cell.name for cell in cells}) == len(cells) == SETTINGS.cells
    count = Counter((cell.method, cell.section) for cell in cells)
    each = {"objects": 12, "anchored": 2, "group": 1, "styles": 6}
    assert count == {(m, s): k for m in ERASERS for s, k in each.items()} | {("rece", "bare"): 12, (LEARNER, "subjects"): 8}
    goals = {cell.name: cell.goal for cell in cells if isinstance(cell.goal, EraseTask)}
    wanted = ("uce-pistol", "rece-pistol-without-synonyms", "uce-weapon", "rece-noto-to-nothing")
    pistol, bare, weapon, style = (goals[name] for name in wanted)
    others = set(world.names("scored")) - {"pistol"}
    assert pistol.concepts[0].synonyms == world.things["pistol"].given and set(pistol.preserve[: len(others)]) == others
    assert {words.split(" on a ")[0] for words in pistol.preserve} == others and len(set(pistol.preserve)) == 2 * len(others)
    assert bare.concepts[0].synonyms == () and style.concepts[0].anchor is None and style.concepts[0].kind == "style"
    weapons = {concept.name for concept in weapon.concepts}
    assert weapons == set(world.group("weapon")) and not weapons & set(weapon.preserve)


def test_everything_else_is_asked_for_evenly_and_never_what_is_hidden(world: World) -> None:
    full = [cell for cell in plan(world, CHOSEN, 64) if cell.method == "uce"]
    kept = {cell.task: [p for p, _ in cell.asked["kept"]] for cell in full if cell.section == "objects"}
    assert not [p for name, prompts in kept.items() for p in prompts if name == p.names[0]]
    every = [p for prompts in kept.values() for p in prompts]
    times = Counter(p.names[0] for p in every)
    assert len(set(every)) == len(every) >= 512
    assert set(times) == set(world.names("scored")) and max(times.values()) - min(times.values()) <= 2
    styles = [p for cell in full if "noto" in cell.erased for p, _ in cell.asked["kept"]]
    assert styles and not [p for p in styles if p.scene.style == "noto"]


def test_subjects_are_asked_for_where_no_picture_shows_them(cells: list[Cell]) -> None:
    subjects = [cell for cell in cells if cell.section == "subjects"]
    assert len({cell.task for cell in subjects}) == 8
    for cell in subjects:
        for label, count in (("alone", 8), ("beside", 4)):
            pairs = cell.asked[label]
            assert len(pairs) == count and not {b.scene.background for _, b in pairs} & {background for background, _ in PICTURES}
            assert all(a.scene == b.scene and b.text == a.text.replace(f"a {cell.task}", "a <pal>", 1) for a, b in pairs)
        assert all(dict(b.scene.items)["left"] == cell.task and len(b.names) == 2 for _, b in cell.asked["beside"])


def test_an_unnamed_style_is_the_same_prompt_without_it(cells: list[Cell]) -> None:
    for cell in cells:
        for before, after in cell.asked.get("unnamed", ()):
            assert cell.erased[0] in after.text and before.scene == replace(after.scene, style="")
            assert before.text.removeprefix("a picture of ") == f"a {after.names[0]} on a {after.scene.background} background"


# --- measuring --------------------------------------------------------------------------------------------------------
def bench(world: World, painter: Painter, model: Model, work: Path) -> Bench:
    return Bench(world, model, painter, 2, work, configured([f"{LEARNER}.max_train_steps=1"]))


def test_spares_take_the_place_of_what_is_not_drawn(world: World, untrained: Oracle, tiny: Model, tmp_path: Path) -> None:
    bad = {"dog", "mushroom"}

    def spoil(prompt: Prompt) -> Reading | None:
        return reading({}, background=prompt.scene.background) if bad & set(prompt.names) else None

    chosen, poorly = bench(world, Renderer(untrained, spoil=spoil, always=True), tiny, tmp_path).choose()
    assert chosen.objects == (*(name for name in OBJECTS if name != "dog"), "helicopter")
    assert ("cat", "dog") not in chosen.anchored and len(chosen.anchored) == 2
    again = Renderer(untrained)
    assert (
        bench(world, again, tiny, tmp_path).choose() == (chosen, poorly) and again.painted == 0 and poorly == dict.fromkeys(sorted(bad), 0)
    )


@pytest.mark.parametrize("name", ["uce-pistol", "rece-noto-to-nothing", "textual_inversion-penguin"])
def test_a_cell_is_what_its_file_says(name: str, world: World, untrained: Oracle, tiny: Model, tmp_path: Path) -> None:
    (cell,) = [cell for cell in plan(world, CHOSEN, 2) if cell.name == name]
    made = bench(world, Renderer(untrained), tiny, tmp_path)
    assert made.measured(cell) is None
    made.measure(cell)
    result = made.measured(cell)
    assert result is not None and tiny.edits == () and result.seconds > 0 and result.bytes > 500
    assert {label: [(a.prompt, b.prompt) for a, b in pairs] for label, pairs in result.images.items()} == {
        k: list(v) for k, v in cell.asked.items()
    }
    assert all(item.reading == true_reading(item.prompt) for pairs in result.images.values() for pair in pairs for item in pair)
    assert result.steps == (1 if cell.section == "subjects" else None)


def test_an_image_without_pixels_reads_the_same(world: World) -> None:
    prompt = plan(world, CHOSEN, 2)[0].asked["name"][0][0]
    item = shown(prompt, reading({"left": "dog", "right": "cat"}, "twemoji", "none"))
    back = from_json(json.loads(json.dumps(to_json(item))))
    assert (back.prompt, back.reading) == (item.prompt, item.reading)


@pytest.fixture
def command(untrained: Oracle, tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, int]]:
    """Runs the command on the tiny model; gives its exit code and how many images were drawn."""
    monkeypatch.setattr("toolkit.model.load_model", lambda **_: tiny)
    monkeypatch.setattr(method_report, "load_oracle", lambda: untrained)

    def run(*words: str) -> tuple[int, int]:
        painter = Renderer(untrained, spoil=lambda prompt: reading({}, background=prompt.scene.background))
        monkeypatch.setattr(method_report, "Painter", lambda *_, **__: painter)
        where = ["--n", "2", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "docs" / "page.md")]
        return main([*where, *words]), painter.painted

    return run


def test_a_run_goes_on_where_it_was(command: Callable[..., tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, drawn = command("--only", "uce-pistol", "uce-gem")
    files = {path: path.read_bytes() for path in (tmp_path / "work").iterdir()}
    assert code == 0 and drawn > 0 and len(files) == 3
    text = (tmp_path / "docs" / "page.md").read_text()
    assert "2 objects, each alone: drawn by name" in text and "60 of 62 tasks are not measured" in text
    with monkeypatch.context() as forbidden:
        forbidden.setattr(Bench, "measure", lambda *_: pytest.fail("measured again"))
        assert command("--only", "uce-gem") == (0, 0)
    next(path for path in files if "uce-gem" in path.name).unlink()
    assert command("--only", "uce-pistol", "uce-gem")[0] == 0
    assert {path.name for path in (tmp_path / "work").iterdir()} == {path.name for path in files}
    assert all(path.read_bytes() == data for path, data in files.items() if "gem" not in path.name)


def test_other_settings_are_measured_anew(command: Callable[..., tuple[int, int]], tmp_path: Path) -> None:
    command("--only", "uce-pistol")
    command("--only", "uce-pistol", "--set", "uce.lamb=2")
    assert len(list((tmp_path / "work").glob("uce-pistol.*"))) == 2
    assert '"lamb": 2.0' in (tmp_path / "docs" / "page.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "pistil"], "did you mean pistol"),
        (["--set", "lamb=2"], "does not say the method"),
        (["--set", "esd.lamb=2"], "unknown method in --set"),
        (["--set", "uce.lambda=2"], "unknown option of uce"),
        (["--n", "0"], "at least 1"),
    ],
)
def test_mistakes_are_told_in_one_line(
    command: Callable[..., tuple[int, int]], words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*words) == (2, 0), "nothing is drawn before a mistake is told"
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


# --- the page ---------------------------------------------------------------------------------------------------------
def test_perfect_edits_meet_every_bar(cells: list[Cell]) -> None:
    results = [measured(cell, clean) for cell in cells]
    lines = lines_of(results)
    assert not missed(results) and sum(row.bar is not None for _, row in lines) > 60
    text = page(results, SETTINGS)
    assert (
        "## Bars missed\n\nNone." in text
        and "**missed**" not in text
        and "not measured here" not in text
        and "{" not in text.replace("`{}`", "")
    )
    assert "left out of it: bell (50 %)." in text
    assert all(f"| {cell.task} |" in text for cell in cells if cell.section != "bare")
    assert all(row.what in text for _, row in lines)


def test_edits_that_change_nothing_miss_the_bars(cells: list[Cell]) -> None:
    results = [measured(cell, lambda cell, prompt: None) for cell in cells if cell.section not in ("bare", "subjects")]
    lines = lines_of(results)
    for method in ERASERS:
        assert found(lines, f"{method}, 12 objects", "drawn by name", "the worst").missed
        assert found(lines, f"{method}, weapons", "other objects kept").met
        assert all(found(lines, f"{method}, style {style} to fluent flat", "drawn by name").missed for style in STYLES)
        assert found(lines, f"{method}, style twemoji to nothing", "drawn by name").missed
        untold = found(lines, f"{method}, style noto to nothing", "drawn by name")  # told no style, the unedited model here draws noto
        assert untold.bar == untold.estimate.value == 1 and not untold.missed
    assert found(lines, "rece, 12 objects", "by given synonyms").missed and found(lines, "uce, 12 objects", "by given synonyms").bar is None
    assert not found(lines, "uce, 12 objects", "nothing or one clean object").missed, "nothing was erased, so nothing is there instead"
    text = page(results, SETTINGS)
    assert "≤ 5.0 % **missed**" in text and "nothing to measure" in text and "- rece, weapons, in one task: drawn by name: 100.0 %" in text


def test_pooled_rates_hide_no_concept(cells: list[Cell]) -> None:
    def draw(cell: Cell, prompt: Prompt) -> Reading | None:
        return None if cell.task == "gem" and prompt in dict(cell.asked["name"][:2]) else clean(cell, prompt)

    results = [measured(cell, draw) for cell in cells if cell.section == "objects"]
    lines = lines_of(results)
    worst = found(lines, "uce, 12 objects", "the worst")
    assert "(gem)" in worst.what and worst.missed and worst.estimate.value == 0.25
    assert not [line for line in missed(results) if "the worst" not in line]


def test_destroyed_images_are_no_erasure(cells: list[Cell]) -> None:
    def smeared(cell: Cell, prompt: Prompt) -> Reading | None:
        return reading({}, background="none") if set(cell.erased) & set(prompt.names) else None

    lines = lines_of([measured(cell, smeared) for cell in cells if cell.section in ("objects", "anchored")])
    assert found(lines, "uce, 12 objects", "by given").estimate.value == 0
    assert found(lines, "uce, 12 objects", "background relative").missed and found(lines, "uce, 12 objects", "one clean object").missed
    assert found(lines, "uce, 2 objects with an anchor", "instead, the anchor").missed


def test_the_object_that_is_lost_is_named(cells: list[Cell]) -> None:
    def draw(cell: Cell, prompt: Prompt) -> Reading | None:
        return reading({}, background=prompt.scene.background) if "bee" in prompt.names else clean(cell, prompt)

    results = [measured(cell, draw) for cell in cells if cell.section == "objects"]
    assert found(lines_of(results), "uce, 12 objects", "the object kept least (bee)").missed
    assert not found(lines_of(results), "uce, 12 objects", "other objects kept").missed
    assert "| bee | 0 %" in page(results, SETTINGS)


def test_subjects_are_told_apart_from_what_stands_beside_them(cells: list[Cell]) -> None:
    def draw(cell: Cell, prompt: Prompt) -> Reading | None:
        return reading({"left": cell.task}, background=prompt.scene.background) if len(prompt.names) == 2 else None

    lines = lines_of([measured(cell, draw) for cell in cells if cell.section == "subjects"])
    assert found(lines, "drawn beside another").estimate.value == 1 and found(lines, "both drawn").estimate.value == 0
    assert found(lines, "new contexts", "drawn in").before.value == 0 and found(lines, "other objects kept").met


def test_weapons_that_are_not_drawn_do_not_count(cells: list[Cell]) -> None:
    (cell,) = [cell for cell in cells if cell.name == "uce-weapon"]
    images = {
        label: [(shown(a.prompt, reading({})) if "bow" in a.prompt.names else a, b) for a, b in pairs]
        for label, pairs in measured(cell, clean).images.items()
    }
    counted = Measured(cell, images, 1.0, 1, None, (None, None))
    assert {item.prompt.names[0] for item in counted.sides("held_back")[1]} == set(cell.erased) - {"bow"}
    assert still_drawn([counted], "name", 0).value == 1
