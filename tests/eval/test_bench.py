"""Experiments: what is measured, that nothing is measured twice, and what the report says about the bars."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eval.bench import Bench
from eval.cells import Cell, plan
from eval.commands import bench as command_module
from eval.experiment import read
from eval.stored import from_json, to_json
from eval.subjects import PICTURES
from tests.eval.experiments import ALONE, FILES, GROUP, LEARNER, smaller
from tests.eval.images import Renderer, reading, shown, true_reading
from toolkit import cli
from toolkit.concepts import EraseTask
from toolkit.model import Model
from toolkit.world.oracle import Oracle
from toolkit.world.scenes import World


# --- what is measured -------------------------------------------------------------------------------------------------
def test_the_main_job_has_the_tasks_asked_for(world: World, cells: list[Cell]) -> None:
    assert len({cell.name for cell in cells}) == len(cells) == 63
    count = Counter((cell.method, cell.kind) for cell in cells)
    assert count == {
        ("uce", "objects"): 12 + 2 + 1,
        ("rece", "objects"): 12 + 2 + 1 + 12,
        (GROUP, "objects"): 1,
        ("uce", "styles"): 6,
        ("rece", "styles"): 6,
        (LEARNER, "subjects"): 8,
    }
    assert len({world.things[cell.task].group for cell in cells if cell.section == ALONE}) >= 9
    goals = {cell.name: cell.goal for cell in cells if isinstance(cell.goal, EraseTask)}
    crowd = "rece-contexts-weapons,-in-40-contexts"
    wanted = ("uce-pistol", "rece-pistol-without-synonyms", crowd, "rece-noto-to-nothing", "uce-cat-to-dog")
    pistol, bare, weapon, style, cat = (goals[name] for name in wanted)
    others = set(world.names("scored")) - {"pistol"}
    assert pistol.concepts[0].synonyms == world.things["pistol"].given and set(pistol.preserve[: len(others)]) == others
    assert {words.split(" on a ")[0] for words in pistol.preserve} == others and len(set(pistol.preserve)) == 2 * len(others)
    assert bare.concepts[0].synonyms == () and style.concepts[0].anchor is None and style.concepts[0].kind == "style"
    assert cat.concepts[0].anchor == "dog"
    weapons = {concept.name for concept in weapon.concepts}
    assert weapons == set(world.group("weapon")) and not weapons & set(weapon.preserve)
    assert set(weapon.preserve) == set(world.names("scored")) - weapons and len(set(weapon.templates)) == 40


def test_the_closed_forms_are_measured_on_up_to_twenty_objects(world: World) -> None:
    experiment = read(FILES / "closed-form.toml")
    cells = plan(world, experiment)
    six = {"uce", "rece", "realera_embedding", "trce_embedding", "mace_refine", "speed"}
    assert {method.name() for method in experiment.methods.values()} == six
    assert all(len({cell.method for cell in cells if len(cell.erased) == count}) == 6 for count in (1, 5, 10, 20))
    assert {len(cell.erased) for cell in cells} == {1, 5, 10, 20}
    assert all(cell.asked.keys() == {"name", "given", "held_back", "beside", "kept"} for cell in cells)
    for cell in cells:
        for prompt, _ in cell.asked["beside"]:
            first, second = prompt.names
            assert first in cell.erased and second not in cell.erased and dict(prompt.scene.items)["left"] == first


def test_everything_else_is_asked_for_evenly_and_never_what_is_hidden(world: World) -> None:
    full = [cell for cell in plan(world, read(FILES / "main-job.toml")) if cell.method == "uce"]
    kept = {cell.task: [p for p, _ in cell.asked["kept"]] for cell in full if cell.section == ALONE}
    assert not [p for name, prompts in kept.items() for p in prompts if name == p.names[0]]
    every = [p for prompts in kept.values() for p in prompts]
    times = Counter(p.names[0] for p in every)
    assert len(set(every)) == len(every) >= 512
    assert set(times) == set(world.names("scored")) and max(times.values()) - min(times.values()) <= 2
    styles = [p for cell in full if "noto" in cell.erased for p, _ in cell.asked["kept"]]
    assert styles and not [p for p in styles if p.scene.style == "noto"]


def test_subjects_are_asked_for_where_no_picture_shows_them(cells: list[Cell]) -> None:
    subjects = [cell for cell in cells if cell.kind == "subjects"]
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


# --- the file ---------------------------------------------------------------------------------------------------------
OK = '[methods.uce]\n[[sections]]\ntitle = "one"\nobjects = ["dog"]\n'
LEARN = OK.replace("uce", "textual_inversion").replace("objects", "subjects")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = ", "is not TOML"),
        ("steps = 4", "[methods.NAME]"),
        (f"step = 4\n{OK}", "did you mean steps"),
        (f"steps = 0\n{OK}", "at least 1"),
        (OK.replace("uce", "uec"), "did you mean uce"),
        (OK.replace("[methods.uce]", "[methods.mine]\nlamb = 2"), "unknown method 'mine'"),
        (OK.replace("[[s", "lambda = 2\n[[s"), "unknown option of uce"),
        (OK.replace("uce", "textual_inversion"), "no method of the experiment can erase"),
        (OK + 'styles = ["noto"]', "needs one of objects, styles, subjects"),
        (OK + 'methods = ["rece"]', "unknown method to erase"),
        (OK + 'ask = ["names"]', "did you mean name"),
        (OK + "templates = -1", "has -1 templates"),
        (OK + "preserve_times = 0", "needs a number above 0"),
        (OK + 'anchors = ["cat", "cow"]', "2 anchors for 1 objects"),
        (OK + OK[OK.index("[[") :], "a name of its own"),
        (OK.replace("dog", "dgo"), "did you mean dog"),
        (OK.replace("dog", "noto"), "move it to styles"),
        (LEARN + 'class_names = ["cat"]', "unknown subject"),
        (LEARN, "0 class_names for 1 subjects"),
        (OK + 'class_names = ["cat"]', "1 class_names for 1 objects"),
        (LEARN.replace("subjects", "pairs") + 'class_names = ["cat"]', "needs two for each pair"),
        (LEARN + 'class_names = ["cat"]\npictures = 2', "has 2 pictures"),
        (LEARN + 'class_names = ["cat"]\nsize = 0.1', "more with against"),
        (LEARN + 'class_names = ["cat"]\nagainst = "uce"', "unknown method in against"),
        (OK + 'against = "uce"', "compares what is learnt"),
        (LEARN.replace("\n", "\ngiven = { mask = true }\n", 1), "did you mean masks"),
        (OK.replace("\n", "\ngiven = { masks = true }\n", 1), "learns from no pictures"),
        (OK + "[methods.concept_express]\ngiven = { masks = true }\n", "is told nothing of its pictures"),
    ],
)
def test_mistakes_in_the_file_are_told_in_one_line(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "e.toml").write_text(text)
    assert cli.main(["bench", str(tmp_path / "e.toml"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


# --- measuring --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["uce-pistol", "rece-noto-to-nothing", "textual_inversion-penguin"])
def test_a_cell_is_what_its_file_says(name: str, world: World, untrained: Oracle, tiny: Model, tmp_path: Path) -> None:
    (cell,) = [cell for cell in plan(world, smaller("main-job", 2)) if cell.name == name]
    if cell.kind == "subjects":
        cell = replace(cell, fitted=cell.fitted.from_config({"max_train_steps": 1}))
    made = Bench(world, tiny, Renderer(untrained), tmp_path)
    assert made.measured(cell) is None and made.missing(cell) == list(cell.asked)
    made.measure(cell)
    result = made.measured(cell)
    assert result is not None and tiny.edits == () and result.costs.seconds > 0 and result.costs.bytes > 500
    assert {label: [(a.prompt, b.prompt) for a, b in pairs] for label, pairs in result.images.items()} == {
        k: list(v) for k, v in cell.asked.items()
    }
    assert all(item.reading == true_reading(item.prompt) for pairs in result.images.values() for pair in pairs for item in pair)
    assert result.steps == (1 if cell.kind == "subjects" else None)


def test_only_what_is_missing_in_a_cell_is_drawn(world: World, untrained: Oracle, tiny: Model, tmp_path: Path) -> None:
    cell = next(cell for cell in plan(world, smaller("main-job", 2)) if cell.name == "uce-pistol")
    less = replace(cell, asked={label: cell.asked[label] for label in ("name", "kept")})
    Bench(world, tiny, Renderer(untrained), tmp_path).measure(less)
    painter = Renderer(untrained)
    made = Bench(world, tiny, painter, tmp_path)
    assert made.missing(less) == [] and made.missing(cell) == ["given", "held_back"]
    made.measure(cell)
    assert painter.painted == 2 * (len(cell.asked["given"]) + len(cell.asked["held_back"])) and made.missing(cell) == []
    fewer = replace(cell, asked={**cell.asked, "name": cell.asked["name"][1:]})
    other = replace(cell, asked={**cell.asked, "name": cell.asked["kept"]})
    result = made.measured(fewer)
    assert result is not None and [(a.prompt, b.prompt) for a, b in result.images["name"]] == list(fewer.asked["name"])
    assert made.missing(other) == ["name"] and made.measured(other) is None
    made.measure(other)
    assert made.missing(cell) == made.missing(other) == [], "what was drawn for one experiment is there for another"


def test_the_unedited_model_draws_once_for_all_cells(world: World, untrained: Oracle, tiny: Model, tmp_path: Path) -> None:
    one = next(cell for cell in plan(world, smaller("main-job", 2)) if cell.name == "uce-pistol")
    two = replace(one, method="other", fitted=one.fitted.from_config({"lamb": 2.0}))
    count, (first, second) = sum(map(len, one.asked.values())), (Renderer(untrained), Renderer(untrained))
    Bench(world, tiny, first, tmp_path).measure(one)
    Bench(world, tiny, second, tmp_path).measure(two)
    again = len(one.asked["kept"])  # the file holds no pixels, which drift is measured on
    assert (first.painted, second.painted) == (2 * count, count + again)
    results = [Bench(world, tiny, first, tmp_path).measured(cell) for cell in (one, two)]
    before = [[(a.prompt, a.reading) for pairs in result.images.values() for a, _ in pairs] for result in results if result]
    assert before[0] == before[1] and len(before[0]) == count
    assert len({result.kid[0] for result in results if result}) == 1
    assert all(result and len(result.drift) == again and max(result.drift) < 1e-6 for result in results), "renders, whatever the edit"


def test_an_image_without_pixels_reads_the_same(cells: list[Cell]) -> None:
    prompt = cells[0].asked["name"][0][0]
    item = shown(prompt, reading({"left": "dog", "right": "cat"}, "twemoji", "none"))
    same, other = shown(prompt), shown(replace(prompt, text="a noto <pal>", words=("<pal>",)))
    for after in (item, same, other):
        back = from_json(json.loads(json.dumps(to_json(item, after))))
        assert [(one.prompt, one.reading) for one in back] == [(one.prompt, one.reading) for one in (item, after)]


TWO = """
title = "Two"
n = 2
steps = 1
[methods.uce]
[methods.strong]
method = "uce"
lamb = LAMB
[[sections]]
title = "animals"
objects = ["dog", "cat"]
ask = ["name", "beside", "kept"]
"""


@pytest.fixture
def command(
    untrained: Oracle, tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[dict[str, Any], int]]:
    """Runs the command on the tiny model; gives what it prints and how many images were drawn."""
    monkeypatch.setattr(command_module, "open_model", lambda args: tiny)
    monkeypatch.setattr("eval.commands.evaluate.knows_world", lambda model: True)
    monkeypatch.setattr("toolkit.world.oracle.load_oracle", lambda: untrained)

    def run(*words: str, lamb: float = 0.1) -> tuple[dict[str, Any], int]:
        painter = Renderer(untrained, spoil=lambda prompt: reading({}, background=prompt.scene.background))
        monkeypatch.setattr("eval.rates.Painter", lambda *_: painter)
        (tmp_path / "two.toml").write_text(TWO.replace("LAMB", str(lamb)))
        where = ["--out", str(tmp_path / "out"), "--report", str(tmp_path / "docs" / "page.md")]
        assert cli.main(["bench", str(tmp_path / "two.toml"), *where, *words, "--json"]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1]), painter.painted

    return run


def test_a_run_goes_on_where_it_was(command: Callable[..., tuple[dict[str, Any], int]], tmp_path: Path) -> None:
    result, drawn = command("--only", "dog")
    assert result["measured"] == 2 and result["of"] == 4 and drawn > 0 and len(result["results"]) == 2
    text = (tmp_path / "docs" / "page.md").read_text()
    assert "2 of 4 tasks are not measured" in text and "| strong |" in text and "### animals" in text
    files = {path: path.read_bytes() for path in (tmp_path / "out").glob("*.json") if "unedited" not in path.name}
    assert command("--only", "dog")[1] == 0
    result, drawn = command()
    assert result["measured"] == 2 and drawn > 0 and "not measured" not in (tmp_path / "docs" / "page.md").read_text()
    assert all(path.read_bytes() == data for path, data in files.items())
    assert any("strong, animals: other objects kept" in line for line in result["missed"])


def test_other_options_are_measured_anew(command: Callable[..., tuple[dict[str, Any], int]], tmp_path: Path) -> None:
    command("--only", "strong")
    result, drawn = command("--only", "strong", lamb=2)
    assert drawn > 0 and result["measured"] == 2 and len(list((tmp_path / "out").glob("strong-dog.*"))) == 2
    assert '"lamb": 2.0' in (tmp_path / "docs" / "page.md").read_text()
