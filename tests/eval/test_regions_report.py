"""The report on regions: what each box is asked for, and what counts as right."""

import pytest
import torch

from eval import prompts as make
from eval.rates import Shown
from eval.regions_report import BOXES, boxes_right, regions_of
from toolkit.world.oracle import Reading
from toolkit.world.scenes import PLACES, World


def test_a_box_has_the_prompt_of_its_wording(world: World) -> None:
    (prompt,) = make.several(2, ["dog", "cat"], 1)
    (_, one), (_, other) = prompt.scene.items
    where = f"on a {prompt.scene.background} background"
    assert [region.prompt for region in regions_of(prompt, "alone")] == [f"a {one} on the left {where}", f"a {other} on the right {where}"]
    assert [region.prompt for region in regions_of(prompt, "everywhere")] == [
        f"a {name} on the left and a {name} on the right {where}" for name in (one, other)
    ]
    assert [region.box for region in regions_of(prompt, "alone")] == [BOXES["left"], BOXES["right"]]
    assert regions_of(prompt, "none") == []


@pytest.mark.parametrize("count", [3, 4])
def test_every_place_is_of_the_boxs_object(world: World, count: int) -> None:
    for prompt in make.several(count, world.names("scored"), 8):
        for region, (place, name) in zip(regions_of(prompt, "everywhere"), prompt.scene.items, strict=True):
            assert region.box == BOXES[place] and region.prompt.count(f"a {name} in the ") == count
            assert not any(f"a {other} in" in region.prompt for other in prompt.names if other != name)


def test_boxes_are_counted_one_by_one() -> None:
    (prompt,) = make.several(2, ["dog", "cat"], 1)
    (left, one), (_, other) = prompt.scene.items

    def shown(**at: str) -> Shown:
        objects = {place: at.get(place, "none") for place in PLACES}
        return Shown(prompt, Reading(objects, {}, prompt.scene.background), torch.zeros(3, 64, 64, dtype=torch.uint8))

    both, half, swapped = shown(left=one, right=other), shown(left=one), shown(left=other, right=one)
    assert left == "left"
    estimate = boxes_right([both, half, swapped])
    assert estimate.value == pytest.approx(3 / 6) and estimate.n == 6
