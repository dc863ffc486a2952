"""Experiments about what is learnt: pairs out of one picture, pictures with one background, and methods compared with one another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval import stored
from eval.bench import Bench
from eval.bench_bars import Row, rows
from eval.bench_learnt import QUESTIONS, difference, lesson
from eval.bench_page import Report
from eval.bench_results import Costs, Measured
from eval.cells import Cell, plan
from eval.experiment import Experiment
from eval.prompts import Prompt
from eval.subjects import PICTURES, Given, Portrait, side_by_side
from tests.eval.experiments import smaller
from tests.eval.images import Renderer, reading, shown
from toolkit.model import Model
from toolkit.world.oracle import Oracle, Reading
from toolkit.world.scenes import World

SINGLE, PAIRS, ENTANGLED, COMPRESSED, MASKED = (
    "8 subjects",
    "6 pairs, each out of one picture",
    "6 subjects on one background",
    "4 subjects, compressed",
    "4 subjects, as masks",
)
READ_BY = {"version": "v", "threshold": 0.5, "steps": 1, "guidance": 5.0}
Draw = Callable[[Cell, Prompt], Reading | None]


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return smaller("customize", 8)


@pytest.fixture(scope="module")
def learners(world: World, experiment: Experiment) -> list[Cell]:
    return plan(world, experiment)


def measured(cell: Cell, draw: Draw, bytes: int = 4096) -> Measured:
    """A cell as if the edited model drew what `draw` says (None: what is asked for), and the unedited one no subject."""
    images = {
        label: [(shown(a, None if label == "kept" else reading({})), shown(b, draw(cell, b))) for a, b in pairs]
        for label, pairs in cell.asked.items()
    }
    return Measured(cell, images, Costs(1.0, 900.0, bytes), 10, (None, None))


def right(cell: Cell, prompt: Prompt) -> Reading | None:
    return None


def found(lines: Sequence[Row], *parts: str) -> Row:
    (row,) = [row for row in lines if all(part in row.what for part in parts)]
    return row


# --- what is taught and asked -----------------------------------------------------------------------------------------
def test_learners_have_the_tasks_asked_for(world: World, learners: list[Cell]) -> None:
    both = {"textual_inversion", "dreambooth_lora-keeping", "break_a_scene", "attencraft", "disendiff"}
    single = both | {"disenbooth", "multibooth", "detex", "custom_diffusion", "class_diffusion", "cones"}
    behind = {f"{label}-no_prior" for label in ("dreambooth_lora", "disenbooth", "detex")}
    behind |= {"dreambooth_lora-no_prior-masks", "detex-no_prior-masks"}
    pairs = both | {"mcpl", "mcpl-cut_outs", "concept_express", "disendiff-cut_outs"}
    for section, methods, tasks in ((SINGLE, single, 8), (PAIRS, pairs, 6), (ENTANGLED, behind, 6)):
        assert Counter(cell.method for cell in learners if cell.section == section) == dict.fromkeys(methods, tasks)
    taught = {name for cell in learners for name in lesson(cell).names}
    assert taught <= set(world.names("held_out")) and not taught & {"rocket", "snowman", "butterfly", "key"}, "options were chosen on these"
    asked = [b for cell in learners for label, pairs in cell.asked.items() if label != "kept" for _, b in pairs]
    assert not {prompt.scene.background for prompt in asked} & {background for background, _ in PICTURES}


def test_a_pair_is_asked_for_alone_and_together(learners: list[Cell]) -> None:
    for cell in learners:
        if cell.section != PAIRS:
            continue
        goal = lesson(cell)
        assert len(goal.pictures) == 1 and tuple(name for _, name in goal.pictures[0].items) == goal.names
        assert Counter(b.names for _, b in cell.asked["alone"]) == {(name,): 12 for name in goal.names}
        orders = Counter(b.names for _, b in cell.asked["together"])
        assert set(orders) == {goal.names, goal.names[::-1]} and sum(orders.values()) == 12
        for label in ("alone", "together"):
            for a, b in cell.asked[label]:
                words = dict(zip(goal.names, goal.words, strict=True))
                assert a.scene == b.scene and a.seed == b.seed and a.words == a.names and b.words == tuple(words[name] for name in b.names)
                assert all(f"a {word} " in b.text for word in b.words)


def test_what_a_method_is_given_is_what_it_is_asked_by(world: World, tmp_path: Path) -> None:
    pair = [Portrait("penguin", "bird", "<pal>"), Portrait("umbrella", "parachute", "<toy>")]
    plain = side_by_side(pair, "noto", 1, 3)
    assert [scene.background for scene in plain.pictures] == ["yellow", "green", "pink"]
    assert [dict(scene.items)["left"] for scene in plain.pictures] == ["penguin", "umbrella", "penguin"]
    assert plain.caption(plain.pictures[1]) == "a <toy> on the left and a <pal> on the right on a green background"
    given = Given.from_config({"masks": True, "class_after": True})
    full = replace(plain, given=given)
    assert full.caption(full.pictures[0]) == "a <pal> bird on the left and a <toy> parachute on the right on a yellow background"
    one, two = full.task(world, tmp_path).subjects
    assert one.images == two.images and one.captions == two.captions and len(one.masks) == len(two.masks) == 3
    for index, scene in enumerate(full.pictures):
        _, covers = world.render(scene, np.random.default_rng(index))
        for (_, name), cover in zip(scene.items, covers, strict=True):
            mask = (one if name == "penguin" else two).masks[index]
            assert np.array_equal(np.asarray(Image.open(mask)), cover)
    bare = replace(plain, given=Given.from_config({"captions": False})).task(world, tmp_path / "bare").subjects
    assert all(subject.captions == subject.masks == () for subject in bare)


def test_one_background_is_said_nowhere(world: World, learners: list[Cell], tmp_path: Path) -> None:
    cells = [cell for cell in learners if cell.section == ENTANGLED and cell.method == "disenbooth-no_prior"]
    assert len({cell.task.split(" on ")[1] for cell in cells}) == 5, "backgrounds in turn"
    for cell in cells:
        assert len({scene.background for scene in lesson(cell).pictures}) == 1
        (subject,) = lesson(cell).task(world, tmp_path / cell.task).subjects
        assert len(subject.captions) == len(PICTURES)
        assert not [caption for caption in subject.captions if "background" in caption]


def test_cut_outs_leave_what_is_asked_for_new(world: World, tmp_path: Path) -> None:
    pair = (Portrait("penguin", "bird", "<pal>"), Portrait("umbrella", "parachute", "<toy>"))
    for given in (Given(masks=True, each=True, cut_outs=6), Given(class_after=True, cut_outs=6)):
        made = replace(side_by_side(pair, "noto", 0, 1), given=given)
        pal, toy = made.task(world, tmp_path / repr(given)).subjects
        assert bool(pal.masks) == bool(toy.masks) == given.masks and len({*pal.images, *toy.images}) == 1 + 6
        said = {caption.split(" on a ")[-1].removesuffix(" background") for caption in (*pal.captions, *toy.captions)}
        assert len(said) > 3 and said <= {background for background, _ in PICTURES}
        assert all("<pal> bird" in caption for caption in pal.captions) == given.class_after
        both = {image for image in pal.images if image in toy.images}
        alone = [caption for image, caption in zip(pal.images, pal.captions, strict=True) if image in both and "<toy>" not in caption]
        assert bool(alone) == given.each
    assert "cut_outs=6" in repr(given) and "world" not in repr(given)


# --- measuring --------------------------------------------------------------------------------------------------------
def test_every_method_learns_what_it_is_given(world: World, learners: list[Cell], untrained: Oracle, tiny: Model, tmp_path: Path) -> None:
    firsts = {(cell.method, cell.kind): cell for cell in reversed(learners)}
    assert len({method for method, _ in firsts}) == 22 and len({kind for _, kind in firsts}) == 3
    made = Bench(world, tiny, Renderer(untrained), tmp_path)
    for (method, _), cell in firsts.items():
        quick = {"max_train_steps": 1, "train_batch_size": 1} | ({"words_steps": 0} if method == "break_a_scene" else {})
        quick |= {"clip": "metric-clip"} if "clip" in cell.fitted.config() else {}
        less = replace(cell, fitted=cell.fitted.from_config({**cell.fitted.config(), **quick}), asked={"alone": cell.asked["alone"][:1]})
        made.measure(less)
        result = made.measured(less)
        assert result is not None and result.costs.bytes > 500


def test_results_that_the_project_keeps_are_found(
    world: World, learners: list[Cell], untrained: Oracle, tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = next(cell for cell in learners if cell.method == "textual_inversion" and cell.section == PAIRS)
    cell = replace(cell, fitted=cell.fitted.from_config({"max_train_steps": 1}))
    less = replace(cell, asked={"alone": cell.asked["alone"]})
    monkeypatch.setattr(stored, "RESULTS", tmp_path / "kept")
    (tmp_path / "kept").mkdir()
    Bench(world, tiny, Renderer(untrained), tmp_path / "kept").measure(less)
    kept = {path.name: path.read_bytes() for path in (tmp_path / "kept").glob("*.json")}
    painter = Renderer(untrained)
    made = Bench(world, tiny, painter, tmp_path / "out")
    assert made.missing(less) == [] and made.measured(less) is not None and made.missing(cell) == ["together", "kept"]
    (tmp_path / "out").mkdir()
    made.measure(cell)
    assert painter.painted == 2 * (len(cell.asked["together"]) + len(cell.asked["kept"])), "what was kept is not drawn again"
    assert {path.name: path.read_bytes() for path in (tmp_path / "kept").glob("*.json")} == kept, "new results go to --out"
    assert made.missing(cell) == [] and Bench(world, tiny, painter, tmp_path / "none").missing(cell) == ["together", "kept"]


# --- the report -------------------------------------------------------------------------------------------------------
def test_perfect_learners_meet_every_bar(experiment: Experiment, learners: list[Cell]) -> None:
    sizes = {"cones": 100, "keys_and_values-compressed": 800}
    made = Report(experiment, learners, [measured(cell, right, sizes.get(cell.method, 4096)) for cell in learners], "c", "m", READ_BY)
    text = made.page()
    assert not made.missed() and "{" not in text[: text.index("## One by one")] and "not measured here" not in text
    lines = rows(made.results, "cones", experiment.sections)
    assert found(lines, MASKED, "size of the edit").bar == 0.1 and found(lines, MASKED, "size").estimate.value == 100 / 4096
    assert found(lines, SINGLE, "drawn in new contexts").bar == 0.8 and [line for line in lines if COMPRESSED in line.what] == []
    lines = rows(made.results, "dreambooth_lora-keeping", experiment.sections)
    assert found(lines, PAIRS, "each alone").bar == 0.7 and found(lines, PAIRS, "both in one prompt").bar == 0.5
    lines = rows(made.results, "dreambooth_lora-no_prior", experiment.sections)
    assert found(lines, ENTANGLED, "pictures' background").estimate.value == 0
    assert '"given": {"each": true, "masks": true, "world": true, "cut_outs": 12}}`' in text and text.count('"given"') == 15
    assert text.count("Less what custom_diffusion reaches") == 1 and text.count("Less what dreambooth_lora-keeping reaches") == 1
    assert text.count("Less what dreambooth_lora-no_prior reaches") == 1
    assert text.count("Less what keys_and_values reaches") == 2


def test_a_pair_that_is_not_told_apart_misses_its_bars(learners: list[Cell]) -> None:
    def both(cell: Cell, prompt: Prompt) -> Reading | None:
        return reading(dict(zip(("left", "right"), lesson(cell).names, strict=True)), background=prompt.scene.background)

    def one(cell: Cell, prompt: Prompt) -> Reading | None:
        return reading({"left": lesson(cell).names[0]}, background=prompt.scene.background)

    cells = [cell for cell in learners if cell.section == PAIRS and cell.method == "disendiff"]
    mixed, single = (rows([measured(cell, draw) for cell in cells], "disendiff") for draw in (both, one))
    assert found(mixed, "each alone").missed and found(mixed, "each alone").estimate.value == 0
    assert found(mixed, "the other is drawn").estimate.value == 1 and found(mixed, "both in one prompt").met
    assert found(single, "each alone").estimate.value == found(single, "the other is drawn").estimate.value == 0.5
    assert found(single, "both in one prompt").missed


def test_words_alone_are_held_to_their_ceiling(learners: list[Cell]) -> None:
    def half(cell: Cell, prompt: Prompt) -> Reading | None:
        return None if prompt.scene.background == "red" or cell.section == PAIRS else reading({}, background="red")

    words = [measured(cell, half) for cell in learners if cell.method in ("textual_inversion", "concept_express")]
    single = [result for result in words if result.cell.section == SINGLE]
    share = QUESTIONS["subjects"][0].share(single).value
    lines = rows(words, "textual_inversion")
    assert 0 < share < 1 and found(lines, SINGLE, "drawn in new contexts").bar is found(lines, SINGLE, "beside another object").bar is None
    for method in ("textual_inversion", "concept_express"):
        lines = rows(words, method)
        assert found(lines, PAIRS, "each alone").bar == pytest.approx(0.7 * share) and not found(lines, PAIRS, "each alone").missed
        assert found(lines, PAIRS, "both in one prompt").bar == pytest.approx(0.5 * share)
    alone = rows([result for result in words if result.cell.section == PAIRS], "concept_express")
    assert found(alone, PAIRS, "each alone").bar is None, "no ceiling without its measurement"


def test_a_background_that_is_learnt_is_seen(learners: list[Cell]) -> None:
    def draw(cell: Cell, prompt: Prompt) -> Reading | None:
        return reading({"center": lesson(cell).names[0]}, background=lesson(cell).pictures[0].background)

    lines = rows([measured(cell, draw) for cell in learners if cell.section == ENTANGLED], "detex-no_prior")
    assert found(lines, "pictures' background").estimate.value == 1 and found(lines, "background right").estimate.value == 0
    assert found(lines, "drawn on other").met


def test_methods_are_compared_image_by_image(experiment: Experiment, learners: list[Cell]) -> None:
    def half(cell: Cell, prompt: Prompt) -> Reading | None:
        return None if len(prompt.names) == 1 or prompt.scene.background == "red" else reading({}, background="red")

    own = [measured(cell, right, 1024) for cell in learners if cell.section == SINGLE and cell.method == "class_diffusion"]
    other = [measured(cell, half, 4096) for cell in learners if cell.section == SINGLE and cell.method == "custom_diffusion"]
    alone, beside, *_ = QUESTIONS["subjects"]
    share = beside.share(other).value
    more = difference(beside, own, other)
    assert 0 < share < 1 and more.value == pytest.approx(1 - share) and more.low < more.value < more.high <= 1
    assert difference(alone, own, other).value == 0 and difference(beside, other, own).value == pytest.approx(share - 1)
    page = Report(experiment, learners, [*own, *other], "c", "m", READ_BY).section(experiment.sections[0])
    assert f"{100 * (1 - share):.0f} % [" in page and "25 % [25, 25]" in page
    assert difference(beside, own[:3], other[2:]).n == len(other[2].images["beside"]), "tasks that both have"
