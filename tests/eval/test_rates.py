from __future__ import annotations

import pytest
import torch

from eval import prompts as make
from eval.fidelity import features, oracle_kid, polynomial_mmd
from eval.prompts import Prompt
from eval.rates import (
    Painter,
    Shown,
    background_right,
    drawn_instead,
    drawn_well,
    draws,
    instead,
    most_drawn,
    object_right,
    place_right,
    relative,
    retained,
    share,
    style_right,
    target_accuracy,
)
from tests.eval.images import Renderer, reading, shown
from toolkit.model import Model
from toolkit.sample import sample
from toolkit.world.oracle import NONE, Oracle, Reading
from toolkit.world.scenes import Scene, World

DOG = Prompt("a noto dog on a red background", 0, Scene("red", "noto", (("center", "dog"),)), ("dog",))
PAIR = Prompt("a dog on the left and a cat on the right", 0, Scene("red", "", (("left", "dog"), ("right", "cat"))), ("dog", "cat"))
EMPTY = Prompt("an empty red background", 0, Scene("red", "", ()), ())


def test_an_object_counts_anywhere_and_a_place_only_there() -> None:
    moved = shown(DOG, reading({"left": "dog"}))
    assert object_right(moved) and not place_right(moved)
    assert object_right(shown(DOG)) and place_right(shown(DOG))


def test_all_objects_must_be_there() -> None:
    swapped = shown(PAIR, reading({"left": "cat", "right": "dog"}))
    assert object_right(swapped) and not place_right(swapped)
    assert not object_right(shown(PAIR, reading({"left": "dog"})))


def test_an_empty_scene_is_right_when_nothing_is_drawn() -> None:
    assert object_right(shown(EMPTY)) and place_right(shown(EMPTY))
    assert not object_right(shown(EMPTY, reading({"center": "dog"})))


def test_style_is_judged_when_asked_for_and_wrong_when_nothing_is_drawn() -> None:
    assert style_right(shown(DOG)) is True
    assert style_right(shown(DOG, reading({"center": "dog"}, style="twemoji"))) is False
    assert style_right(shown(DOG, reading({}))) is False
    assert style_right(shown(PAIR)) is None
    assert not background_right(shown(DOG, reading({"center": "dog"}, background="blue")))


def test_drawing_any_erased_object_or_style_counts() -> None:
    group = {"pistol", "knife"}
    assert draws(shown(DOG, reading({"top left": "knife", "center": "dog"})), group)
    assert not draws(shown(DOG), group)
    assert draws(shown(DOG), {"noto"})


@pytest.mark.parametrize(
    ("read", "answer"),
    [
        (reading({"center": "dog"}), "erased"),
        (reading({}), "none"),
        (reading({"center": "frog"}), "other"),
        (reading({"center": "cat"}), "anchor"),
        (reading({"left": "frog", "right": "cat"}), "unclear"),
        (reading({"center": "frog"}, background=NONE), "unclear"),
    ],
)
def test_what_is_drawn_instead(read: Reading, answer: str) -> None:
    assert instead(shown(DOG, read), {"dog"}, anchor="cat") == answer


def test_what_is_drawn_instead_is_counted_among_images_without_it() -> None:
    reads = [reading({"center": "dog"}), reading({}), reading({}), reading({"center": "frog"}), reading({"center": "frog"})]
    images = [shown(DOG, read) for read in reads]
    counted = drawn_instead(images, {"dog"})
    assert {kind: (e.value, e.n) for kind, e in counted.items()} == {"none": (0.5, 4), "other": (0.5, 4), "unclear": (0.0, 4)}
    assert most_drawn(images, {"dog"}) == [("frog", 2)]
    assert target_accuracy(images, {"dog"}).value == pytest.approx(0.2)


def drawn(world: World, name: str, right: int, of: int) -> list[Shown]:
    """Images of an object of which the first `right` show it and the rest nothing."""
    return [shown(p, None if i < right else reading({})) for i, p in enumerate(make.single(world, name, of))]


def test_retained_compares_pairs_of_objects_that_were_drawn_well(world: World) -> None:
    before = [*drawn(world, "dog", 10, 10), *drawn(world, "cat", 9, 10), *drawn(world, "frog", 7, 10)]
    after = [*drawn(world, "dog", 10, 10), *drawn(world, "cat", 3, 10), *drawn(world, "frog", 10, 10)]
    result = retained(before, after)
    assert drawn_well(before) == {"dog", "cat"}
    assert set(result.per_object) == {"dog", "cat"}
    assert result.accuracy.value == pytest.approx(13 / 20)
    assert result.objects.value == pytest.approx(13 / 19)
    assert result.worst[0] == "cat"
    assert result.worst[1].value == pytest.approx(3 / 9)
    assert result.backgrounds.value < 1  # the empty images are on red whatever was asked for


def test_before_and_after_must_be_of_the_same_prompts(world: World) -> None:
    with pytest.raises(ValueError, match="different prompts"):
        relative(drawn(world, "dog", 2, 2), drawn(world, "cat", 2, 2), object_right)


def test_images_of_one_prompt_are_a_cluster() -> None:
    images = [shown(DOG, None if right else reading({})) for right in (True,) * 8]
    others = [shown(PAIR, reading({})) for _ in range(8)]
    clustered = share([*images, *others], object_right)
    assert clustered.high - clustered.low > 0.6  # two prompts tell little


def test_a_painter_samples_what_it_is_asked_once(tiny: Model, untrained: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counted(model: Model, prompts: list[str], seeds: list[int], **options: object) -> torch.Tensor:
        calls.extend(prompts)
        return sample(model, prompts, seeds, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("eval.rates.sample", counted)
    painter = Painter(untrained, steps=1)
    first = painter.draw(tiny, [DOG, PAIR, DOG])
    again = painter.draw(tiny, [PAIR, EMPTY])
    assert calls == [DOG.text, PAIR.text, EMPTY.text]
    assert [item.prompt for item in first] == [DOG, PAIR, DOG]
    assert again[0] is first[1]


def test_a_painter_draws_again_after_an_edit(edited: Model, untrained: Oracle) -> None:
    painter = Painter(untrained, steps=1)
    after = painter.draw(edited, [DOG])
    before = painter.draw(edited.reference(), [DOG])
    edited.detach_all()
    detached = painter.draw(edited, [DOG])
    assert not torch.equal(after[0].pixels, before[0].pixels)
    assert torch.equal(before[0].pixels, detached[0].pixels)


def test_mmd_is_unbiased_and_grows_with_the_distance() -> None:
    torch.manual_seed(0)
    same = [polynomial_mmd(torch.randn(40, 16), torch.randn(40, 16)) for _ in range(60)]
    values = torch.tensor([e.value for e in same])
    assert values.mean().abs() < 3 * values.std() / 60**0.5
    assert sum(e.low <= 0 <= e.high for e in same) >= 50
    far = polynomial_mmd(torch.randn(40, 16), torch.randn(40, 16) + 1)
    assert far.low > 0.1


def test_mmd_is_the_naive_sum() -> None:
    torch.manual_seed(1)
    x, y = torch.randn(7, 5), torch.randn(7, 5)

    def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a.double() @ b.double() / 5 + 1) ** 3)

    pairs = [(i, j) for i in range(7) for j in range(7) if i != j]
    naive = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) - 2 * kernel(x[i], y[j]) for i, j in pairs) / len(pairs)
    assert polynomial_mmd(x, y).value == pytest.approx(naive, rel=1e-9)


def test_oracle_kid_is_small_for_renders_and_large_for_ruins(world: World, untrained: Oracle, tiny: Model) -> None:
    painter = Renderer(untrained)
    images = painter.draw(tiny, make.single(world, "pistol", 24))
    ruined = [Shown(item.prompt, reading({}), torch.randint_like(item.pixels, 256)) for item in images]
    good, bad = oracle_kid(world, untrained, images), oracle_kid(world, untrained, ruined)
    assert bad.low > good.high
    assert features(untrained, torch.zeros(2, 3, 64, 64)).shape == (2, 7 * 224)
