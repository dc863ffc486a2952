"""The recipe of the embedded model: every objective has a loss with a gradient, and the text encoder survives conversion."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from toolkit.world.oracle import NONE
from toolkit.world.scenes import QUADRANTS, Scene, load_world
from trainers.loop import Batch
from trainers.world.clip import CLIPObjective, encode_text, sibling, to_text_model
from trainers.world.legs import next_leg
from trainers.world.oracle import OracleObjective, draw, spoil
from trainers.world.tokenizer import build_tokenizer
from trainers.world.unet import UNetObjective
from trainers.world.vae import CONFIG, CROP, VAEObjective, crop_batch, training_scene


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_the_tokenizer_is_clips(tokenizer):
    ids = tokenizer(["A Pistol on a red background", "zażółć 123"]).input_ids
    assert 2000 <= len(tokenizer) <= 4000
    assert tokenizer.eos_token_id == len(tokenizer) - 1 and tokenizer.eos_token_id != 2
    assert all(row[0] == tokenizer.bos_token_id and row[-1] == tokenizer.eos_token_id for row in ids)
    assert tokenizer.decode(ids[0], skip_special_tokens=True).strip() == "a pistol on a red background"
    single = [name for name in load_world().names("scored") if " " not in name]
    assert all(len(tokenizer(name).input_ids) == 3 for name in single), "every object's name is one token"


def test_the_converted_text_encoder_gives_the_same_features(tokenizer):
    clip = CLIPObjective(tokenizer, seed=0).module.eval()
    text = to_text_model(clip, tokenizer)
    ids = tokenizer(["a cat on the left", "two"], padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = encode_text(clip, ids)
        actual = text(ids).pooler_output @ clip.text_projection
    assert torch.allclose(actual, expected, atol=1e-5)


def test_chunks_of_captions_come_back_in_order(tokenizer):
    objective = CLIPObjective(tokenizer, seed=0)
    objective.module.eval()
    captions = ["a cat", "a dog on the left and a car on the right, blue background", "bomb", "a red apple in noto style"] * 2
    with torch.no_grad():
        together = objective.encode_captions(captions, torch.device("cpu"))
        alone = torch.cat([encode_text(objective.module, torch.tensor([tokenizer(text).input_ids])) for text in captions])
    assert torch.allclose(together, alone, atol=1e-5)


def test_a_sibling_differs_in_one_thing():
    world, rng = load_world(), np.random.default_rng(0)
    for _ in range(100):
        scene = training_scene(world, rng)
        other = sibling(world, scene, rng)
        same = (scene.background == other.background) + (scene.style == other.style) + (scene.items == other.items)
        assert same == 2


def test_crops_are_inside_the_image():
    assert crop_batch(load_world(), np.random.default_rng(0)).shape == (64, 3, CROP, CROP)


@pytest.mark.parametrize("step", [0, 5])
def test_the_autoencoder_learns_from_windows_and_from_whole_images(step):
    objective = VAEObjective(AutoencoderKL(**{**CONFIG, "block_out_channels": (16, 16, 16)}), leg=0, whole_from=5, batch_size=2)
    loss, values = objective.loss(Batch(step))
    loss.backward()
    assert loss.isfinite() and values["psnr"] > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.module.parameters())


def test_spoilt_objects_count_as_none():
    world, rng = load_world(), np.random.default_rng(0)
    scene = Scene("white", "noto", tuple(zip(QUADRANTS, world.names("scored")[:4], strict=True)))
    truths = [draw(world, scene, rng)[1] for _ in range(100)]
    share = np.mean([truth[place] == NONE for truth in truths for place, _ in scene.items])
    assert 0.08 < share < 0.24
    sprite = world.sprite("dog", "noto", 30)
    assert all(spoil(world, sprite, rng).size == sprite.size for _ in range(30))


def test_the_oracle_has_a_gradient_everywhere():
    objective = OracleObjective(batch_size=8)
    objective.loss(Batch(0))[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.module.parameters())


def test_the_denoiser_sees_more_noisy_timesteps_than_others():
    t = UNetObjective.timesteps(1000)
    assert t.min() >= 0 and t.max() <= 999 and t.unique().numel() > 500
    assert 0.05 < (t < 200).float().mean() < 0.09


def test_legs_are_numbered_and_an_interrupted_one_is_taken_up(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), next_leg(tmp_path, "unet") as (leg, folder):
        (folder / "checkpoint-5").mkdir()
        raise KeyboardInterrupt
    assert leg == 0 and (folder / "checkpoint-5").exists()
    with next_leg(tmp_path, "unet") as again:
        assert again == (0, folder)
    assert not (folder / "checkpoint-5").exists()
    with next_leg(tmp_path, "unet") as following:
        assert following == (1, tmp_path / "unet.run1")
