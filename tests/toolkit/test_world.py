"""The embedded world: what is rendered is what is said."""

import numpy as np
import pytest
import torch

from toolkit.world.captions import AT, caption
from toolkit.world.oracle import NONE, Oracle, as_pixels, windows
from toolkit.world.scenes import BACKGROUNDS, PLACES, SIZE, Scene, allowed, held_out_triple, load_world, random_scene


@pytest.fixture(scope="module")
def world():
    return load_world()


def test_the_world_is_as_large_as_it_says(world):
    assert len(world.names("scored")) >= 64
    assert len(world.names("held_out")) >= 12
    assert {"pistol", "knife", "bomb"} <= set(world.group("weapon"))
    assert world.styles == ("twemoji", "noto", "fluent 3d", "fluent flat")


def test_every_word_names_one_object(world):
    words = [word for thing in world.things.values() for word in (thing.name, *thing.synonyms)]
    assert len(words) == len(set(words))


def test_half_of_the_synonyms_are_held_back(world):
    for name in world.names("scored"):
        thing = world.things[name]
        assert thing.given and thing.held_back
        assert abs(len(thing.given) - len(thing.held_back)) <= 1


def test_rendering_depends_on_the_scene_and_the_generator_only(world):
    scene = Scene("blue", "noto", (("left", "dog"), ("right", "car")))
    first, masks = world.render(scene, np.random.default_rng(1))
    again, _ = world.render(scene, np.random.default_rng(1))
    other, _ = world.render(scene, np.random.default_rng(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert masks.shape == (2, SIZE, SIZE) and masks.any((1, 2)).all()


def test_masks_cover_the_objects_and_nothing_else(world):
    rng = np.random.default_rng(0)
    for name in world.names("scored")[:12]:
        scene = Scene("purple", "twemoji", (("center", name),))
        image, masks = world.render(scene, rng)
        changed = np.abs(image.astype(int) - image[0, 0].astype(int)).max(-1) > 40
        assert not changed[0].any(), "the first row is background"
        reach = masks[0].copy()  # the mask and the soft edge of one pixel around it
        reach[1:] |= masks[0][:-1]
        reach[:-1] |= masks[0][1:]
        reach[:, 1:] |= masks[0][:, :-1]
        reach[:, :-1] |= masks[0][:, 1:]
        assert (changed & ~reach).sum() <= 0.02 * reach.sum(), f"{name} is drawn outside its mask"
        assert (changed & masks[0]).sum() >= 0.5 * masks[0].sum(), f"{name} is not where its mask is"


def test_styles_are_different_pictures(world):
    for name in world.names("scored", "held_out"):
        sprites = [np.asarray(world.sprite(name, style, 32)).astype(int) for style in world.styles]
        assert all(np.abs(a - b).mean() > 1 for i, a in enumerate(sprites) for b in sprites[:i]), name


def test_a_tenth_of_the_triples_is_held_out(world):
    triples = [held_out_triple(n, b, p) for n in world.names("scored") for b in BACKGROUNDS for p in PLACES]
    assert 0.08 < np.mean(triples) < 0.13
    rng = np.random.default_rng(0)
    assert all(allowed(random_scene(world, world.names("scored"), rng)) for _ in range(300))


def test_full_captions_say_everything(world):
    rng = np.random.default_rng(3)
    for _ in range(200):
        scene = random_scene(world, world.names("scored"), rng)
        text = caption(world, scene, rng, full=True, synonyms=0)
        assert scene.background in text
        for place, name in scene.items:
            assert name in text and AT[place][0] in text
        assert not scene.items or scene.style in text


def test_windows_look_at_their_places():
    pixels = torch.zeros(1, 3, SIZE, SIZE)
    for index, (x, y, _) in enumerate(PLACES.values()):
        pixels.zero_()
        pixels[:, :, y - 2 : y + 2, x - 2 : x + 2] = 1
        seen = windows(pixels)[0]
        assert seen.shape == (len(PLACES), 3, 32, 32)
        assert seen[index, :, 15:17, 15:17].min() > 0.9 and seen[index, :, :8].max() < 0.1, f"window {index} is not centred on its place"


def test_an_unsure_oracle_says_none():
    oracle = Oracle(threshold=1.1).eval()
    reading = oracle.read(torch.rand(2, 3, 64, 64))[0]
    assert set(reading.objects.values()) == {NONE} and not reading.styles and not reading.present()


def test_images_of_any_kind_are_read_alike(world):
    image, _ = world.render(Scene("red", "noto", ()), np.random.default_rng(0))
    from PIL import Image

    tensor = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255
    assert torch.allclose(as_pixels([Image.fromarray(image)]), as_pixels(tensor), atol=1e-6)
