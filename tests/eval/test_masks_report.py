"""The report on found masks: overlaps and partners against cases by hand, what counts as right, and the page."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from eval import masks_report
from eval.intervals import Estimate
from eval.masks_report import (
    NEAREST,
    Overlap,
    Truth,
    crafted,
    expressed,
    in_pixels,
    main,
    overlap_lines,
    rendered,
)
from eval.overlap import at_places, iou, partners
from eval.world_report import Line
from toolkit.concepts import Subject
from toolkit.errors import PalimpsestError, UserError
from toolkit.model import Model
from toolkit.runs import check_writable
from toolkit.world.scenes import Scene, World
from trainers.customize import attencraft
from trainers.customize.attencraft import AttenCraft
from trainers.customize.concept_express import ConceptExpress
from trainers.found_concepts import Found
from trainers.scenes import Scenes

GRID = (16, 16)


def boxes(*of: tuple[int, int, int, int], side: int = 16) -> Tensor:
    """Masks [k, side, side], each of a box (top, left, bottom, right)."""
    masks = torch.zeros(len(of), side, side, dtype=torch.bool)
    for mask, (top, left, bottom, right) in zip(masks, of, strict=True):
        mask[top:bottom, left:right] = True
    return masks


@pytest.fixture
def truth(tmp_path: Path) -> Truth:
    """A dog and a penguin, each a square of 4 x 4 places."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "scene.png")
    scene = Scene("red", "noto", (("left", "dog"), ("right", "penguin")))
    return Truth(scene, tmp_path / "scene.png", boxes((16, 0, 32, 16), (16, 32, 32, 48), side=64), 3)


def test_intersection_over_union() -> None:
    true = boxes((0, 0, 4, 4), (8, 8, 12, 12))
    found = boxes((0, 0, 4, 4), (0, 2, 4, 6), (8, 8, 10, 12), (0, 0, 0, 0))
    expected = torch.tensor([[1, 8 / 24, 0, 0], [0, 0, 8 / 16, 0]], dtype=torch.float64)
    torch.testing.assert_close(iou(true, found), expected)
    assert iou(true, found[:0]).shape == (2, 0) and iou(boxes((0, 0, 0, 0)), found[3:]).item() == 0


def test_partners_are_one_to_one_and_best_together() -> None:
    assert partners(torch.tensor([[0.9, 0.8], [0.7, 0.1]])) == [1, 0], "not the largest first"
    assert partners(torch.tensor([[0.2], [0.6], [0.5]])) == [None, 0, None]
    assert partners(torch.zeros(2, 0)) == [None, None]
    draw = torch.Generator().manual_seed(0)
    for rows, columns in itertools.product((1, 2, 3, 4), repeat=2):
        overlap = torch.rand(rows, columns, generator=draw, dtype=torch.float64)
        given = partners(overlap)
        taken = [column for column in given if column is not None]
        assert len(set(taken)) == len(taken) == min(rows, columns)
        wide = torch.cat([overlap, torch.zeros(rows, rows, dtype=torch.float64)], 1)
        best = max(sum(wide[i, j].item() for i, j in enumerate(way)) for way in itertools.permutations(range(rows + columns), rows))
        assert sum(overlap[i, j].item() for i, j in enumerate(given) if j is not None) == pytest.approx(best)


def test_a_place_is_an_objects_that_covers_more_than_half_of_it() -> None:
    masks = boxes((0, 0, 4, 7), (0, 0, 4, 6), side=64)
    assert at_places(masks, GRID).flatten(1).sum(1).tolist() == [2, 1]
    assert torch.equal(in_pixels(at_places(masks, GRID))[0], boxes((0, 0, 4, 8), side=64)[0])


def test_pictures_are_the_worlds_and_their_masks_are_known(world: World, tmp_path: Path) -> None:
    made = rendered(world, "held_out", 3, 4, 5, tmp_path)
    again = rendered(world, "held_out", 3, 4, 5, tmp_path)
    other = rendered(world, "held_out", 3, 4, 6, check_writable(tmp_path / "other"))
    assert [one.scene for one in made] == [one.scene for one in again]
    assert made[0].scene not in [one.scene for one in other]
    for one in made:
        pixels, own = np.asarray(Image.open(one.image)), one.masks.any(0).numpy()
        assert len(one.masks) == 3 and set(world.names("held_out")) >= {name for _, name in one.scene.items}
        drawn = (np.abs(pixels.astype(int) - pixels[0, 0]) > 40).any(-1)
        assert (drawn & own).sum() > 0.9 * drawn.sum(), "what is not background is in the masks"


def test_what_new_objects_are_nearest_to_is_known(world: World) -> None:
    assert list(NEAREST) == world.names("held_out") and set(NEAREST.values()) <= set(world.names("scored", "extra"))
    assert len(set(NEAREST.values())) == len(NEAREST), "two in one picture have different names"


def test_what_is_found_is_counted_and_a_missed_object_is_0(tiny: Model, truth: Truth, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(*of: tuple[int, int, int, int]) -> Overlap:
        masks = boxes(*of).float()
        monkeypatch.setattr(ConceptExpress, "find", lambda *given: Found(masks, masks))
        return expressed(tiny, truth)

    both = found((4, 8, 8, 12), (4, 0, 8, 2))
    assert both == Overlap([0.5, 1.0], [0.5, 1.0], [1.0, 1.0], True)
    missed, more = found((4, 8, 8, 12)), found((4, 8, 8, 12), (4, 0, 8, 2), (12, 12, 16, 16))
    assert (missed.at_places, missed.right) == ([0.0, 1.0], False)
    assert (more.at_places, more.right) == ([0.5, 1.0], False)
    assert found().at_places == [0.0, 0.0]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_words_mask_is_compared_with_its_own_object(
    tiny: Model, truth: Truth, monkeypatch: pytest.MonkeyPatch, order: tuple[int, int]
) -> None:
    """Attention is played: the prompt's first word at the left, the second at the right, or both everywhere."""
    shows = torch.cat([boxes((4, 0, 8, 4), (4, 8, 8, 12)).float(), torch.full((1, *GRID), 0.5)])
    monkeypatch.setattr(attencraft, "spread", lambda *given: (shows, shows))
    one = crafted(tiny, truth, order)
    assert one.right is (order == (0, 1)) and one.at_places == ([1.0, 1.0] if one.right else [0.0, 0.0])
    shows = torch.ones(3, *GRID)
    apart = crafted(tiny, truth, order)
    assert not apart.right and apart.at_places == [0.0, 0.0]
    monkeypatch.setattr(attencraft, "spread", _refuse)
    with pytest.raises(UserError, match="mine"):
        crafted(tiny, truth)


def test_what_a_prompt_says(tiny: Model, truth: Truth, monkeypatch: pytest.MonkeyPatch) -> None:
    """The nearest class of a new object, names in the order that is asked, places in captions."""
    seen: list[tuple[str, tuple[str, ...]]] = []

    def learning(self: AttenCraft, model: Model, weights: object, subjects: Sequence[Subject]) -> None:
        scenes = Scenes(model.arch, subjects, self, attencraft.TEMPLATE, attencraft.alone_or_all)
        seen.append((scenes.whole(0), tuple(one.class_name for one in subjects)))
        raise PalimpsestError("told enough")

    monkeypatch.setattr(AttenCraft, "learning", learning)
    for order in ((0, 1), (1, 0)):
        for captioned in (False, True):
            crafted(tiny, truth, order, captioned=captioned)
    left, right = "a <toy> on the left", "a <pal> on the right"
    assert seen == [
        ("a photo of <toy> and <pal>", ("dog", "bird")),
        (f"{left} and {right} on a red background", ("dog", "bird")),
        ("a photo of <pal> and <toy>", ("bird", "dog")),
        (f"{right} and {left} on a red background", ("bird", "dog")),
    ]


def _refuse(*given: object) -> None:
    raise UserError("mine")


def test_means_are_of_objects_clustered_by_picture() -> None:
    same = [Overlap([value] * 3, [value] * 3, [1.0] * 3, True) for value in (0.2, 0.8)]
    places, pixels, best = overlap_lines("all", same)
    e = places.estimate
    assert (e.value, e.low, e.high) == pytest.approx((0.5, 0.2, 0.8)) and e.n == 6
    assert not places.met and pixels.met and pixels.bar is None and best.estimate.value == 1
    assert str(places) == "| all: IoU at the masks' places | ≥ 0.60 (missed) | 0.50 [0.20, 0.80] | 6 |"


def test_the_page_is_made_of_a_few_pictures(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolkit.model.load_model", lambda: tiny)
    monkeypatch.setattr(masks_report, "COUNTS", (2,))
    page = tmp_path / "page.md"
    assert main(["--n", "1", "--out", str(page)]) == 0
    text = page.read_text()
    assert text.count("| new objects") == 4 + 2 + 2 * 3 * 2 and text.count("number found right | ≥ 80.0 %") == 2
    assert text.count("IoU at the masks' places | ≥ 0.60") == 2 * (1 + 6) and "named from right to left, captions, chosen options" in text
    assert "`mask_draws=6 mask_shares=true mask_threshold=0.05`" in text


def test_bars_that_are_missed_are_named(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("toolkit.model.load_model", lambda: tiny)
    line = Line("a", Estimate(0.5, 0.4, 0.6, 8), 0.6, unit="")
    monkeypatch.setattr(masks_report, "measure", lambda *given: ([line], [Line("b", line.estimate)]))
    assert main(["--out", str(tmp_path / "page.md")]) == 0
    assert "bars missed: a\n" in capsys.readouterr().err
