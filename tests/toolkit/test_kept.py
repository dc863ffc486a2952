"""What of the embedded world an edit is told to keep."""

import pytest

from toolkit import registry
from toolkit.errors import UserError
from toolkit.world.kept import DRAWING_STEPS, everything_else, keeping_world, one_of_each
from toolkit.world.scenes import load_world


def test_everything_but_what_is_erased_by_any_name() -> None:
    world = load_world()
    kept, all_but_one = everything_else(world, ["weapon"]), everything_else(world, ["gun"])
    assert len(all_but_one) == 2 * (len(world.names("scored")) - 1)
    assert not {"pistol", "knife", "axe"}.intersection(kept) and {"dog", "dog on a red background"}.intersection(kept)


def test_one_caption_names_each_object() -> None:
    names = load_world().names("scored")
    prompts = one_of_each(load_world())
    assert len(set(prompts)) == len(names) and all(name in prompt for name, prompt in zip(names, prompts, strict=True))
    assert prompts == one_of_each(load_world())


def test_a_method_that_learns_keeps_the_world() -> None:
    learns, prompts = registry.load("method", "dreambooth_lora"), one_of_each(load_world())
    kept = learns.from_config(keeping_world(learns, {"rank": "2", "prior_weight": "0.5"})).config()
    assert (kept["rank"], kept["prior_weight"], kept["prior"], kept["class_image_steps"]) == (2, 0.5, "distillation", DRAWING_STEPS)
    assert kept["class_prompts"] == prompts and kept["num_class_images"] == len(prompts)
    with pytest.raises(UserError, match="class_prompts given beside the world"):
        keeping_world(learns, {"class_prompts": "a dog"})
    with pytest.raises(UserError, match="textual_inversion has no pictures of anything else"):
        keeping_world(registry.load("method", "textual_inversion"), {})
