from __future__ import annotations

import pytest

from eval import prompts as make
from eval.prompts import resolve
from toolkit.errors import UserError
from toolkit.world.scenes import BACKGROUNDS, World, held_out_triple


def test_prompts_are_the_same_every_time_and_new_with_another_seed(world: World) -> None:
    assert make.single(world, "pistol", 64) == make.single(world, "pistol", 64)
    first, second = make.single(world, "pistol", 64), make.single(world, "pistol", 64, seed=9)
    assert [p.text for p in first] == [p.text for p in second]
    assert {p.seed for p in first}.isdisjoint(p.seed for p in second)


def test_a_concept_has_enough_prompts_over_templates_styles_and_backgrounds(world: World) -> None:
    prompts = make.single(world, "pistol", 64)
    assert len({(p.text, p.seed) for p in prompts}) == 64
    assert {p.scene.style for p in prompts} == {"", *world.styles}
    assert {p.scene.background for p in prompts} == set(BACKGROUNDS)
    assert {p.text.split("pistol")[0] for p in prompts} >= {"a ", "a photo of a ", "a picture of a ", "a noto "}


def test_more_images_than_texts_take_further_seeds(world: World) -> None:
    prompts = make.single(world, "pistol", 250)
    assert len({(p.text, p.seed) for p in prompts}) == 250
    assert {p.seed for p in prompts} == {0, 1, 2}


def test_the_text_says_what_the_scene_holds(world: World) -> None:
    prompts = [*make.single(world, "dog", 40, places=("left",)), *make.several(3, world.names("scored"), 10), *make.empty(5)]
    for prompt in prompts:
        assert prompt.scene.background in prompt.text
        assert prompt.scene.style in prompt.text
        assert all(word in prompt.text for word in prompt.words)
    assert all("on the left" in prompt.text for prompt in prompts[:40])


def test_synonyms_stand_for_their_object(world: World) -> None:
    words = world.things["pistol"].held_back
    prompts = make.single(world, "pistol", 32, words=words)
    assert {p.words[0] for p in prompts} == set(words)
    assert all(p.names == ("pistol",) and "pistol" not in p.text for p in prompts)


def test_held_out_combinations_are_flagged(world: World) -> None:
    prompts = [p for name in world.names("scored")[:20] for p in make.single(world, name, 60)]
    flagged = [p for p in prompts if p.held_out]
    assert all(held_out_triple(p.names[0], p.scene.background, "center") for p in flagged)
    assert 0.04 < len(flagged) / len(prompts) < 0.18


def test_several_objects_have_their_own_places(world: World) -> None:
    for prompt in make.several(2, world.names("scored"), 20):
        assert [place for place, _ in prompt.scene.items] == ["left", "right"]
        assert len(set(prompt.names)) == 2
    assert len(make.several(4, world.names("scored"), 1)[0].scene.items) == 4
    with pytest.raises(UserError, match="two to four"):
        make.several(5, world.names("scored"), 1)


def test_everything_else_is_asked_for_equally_often(world: World) -> None:
    prompts = make.objects(world, ["dog", "cat", "frog"], 10)
    assert [p.names[0] for p in prompts] == ["dog"] * 4 + ["cat"] * 4 + ["frog"] * 4


def test_words_are_resolved(world: World) -> None:
    assert resolve(world, "Pistol").names == ("pistol",)
    assert resolve(world, "gun").name == "pistol"
    assert set(resolve(world, "weapons").names) == set(world.group("weapon"))
    assert resolve(world, "fluent  3D").kind == "style"
    with pytest.raises(UserError, match="did you mean pistol"):
        resolve(world, "pistl")


def test_styles_can_be_left_out(world: World) -> None:
    prompts = make.objects(world, ["dog", "cat"], 100, without={"noto"})
    assert len(prompts) == 100
    assert {p.scene.style for p in prompts} == {"", "twemoji", "fluent 3d", "fluent flat"}


def test_contexts_are_captions_that_no_evaluation_asks_with(world: World) -> None:
    name = world.names("scored")[0]
    contexts = make.contexts(world, 60)
    assert contexts[0] == "{}" and len(set(contexts)) == 60
    assert all(template.count("{}") == 1 and name not in template for template in contexts)
    assert not {template.format(name) for template in contexts} & {prompt.text for prompt in make.single(world, name, 500)}
    assert contexts == make.contexts(world, 80)[:60]
    text = " ".join(contexts)
    assert all(word in text for word in (*BACKGROUNDS, *world.styles))
