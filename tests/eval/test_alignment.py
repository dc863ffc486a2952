from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from eval.alignment import Clip, load_metric_clip, load_open_clip, world_clip, world_pairs
from toolkit.arch.sd import SD
from toolkit.errors import UserError
from toolkit.world.scenes import World
from trainers.world.clip import build_clip, clip_config


def lookup(vectors: dict[str, torch.Tensor]) -> Clip:
    """A CLIP whose image features are the first pixels and whose text features are given."""
    return Clip(lambda images: images[:, 0, 0, :4], lambda texts: torch.stack([vectors[text] for text in texts]), {"model": "lookup"})


@pytest.fixture(scope="module")
def own() -> Clip:
    torch.manual_seed(0)
    tokenizer: Any = SD.tiny().tokenizers()["text_encoder"]
    return world_clip(build_clip(clip_config(len(tokenizer))), tokenizer)


def test_similarity_is_the_cosine_of_each_pair() -> None:
    images = torch.rand(3, 3, 8, 8)
    vectors = {"a": torch.tensor([1.0, 0, 0, 0]), "b": torch.rand(4)}
    texts = ["a", "b", "a"]
    cosines = [F.cosine_similarity(image[0, 0, :4], vectors[text], dim=0).item() for image, text in zip(images, texts, strict=True)]
    assert lookup(vectors).similarity(images, texts).tolist() == pytest.approx(cosines, abs=1e-6)


def test_top1_counts_the_nearest_caption_within_each_group() -> None:
    unit = torch.eye(4)
    images = torch.zeros(4, 3, 8, 8)
    images[:, 0, 0, :4] = unit
    vectors = dict(zip("abcd", unit, strict=True))
    clip = lookup(vectors)
    assert clip.top1(images, list("abcd")).value == 1
    assert clip.top1(images, list("bacd")).value == 0.5
    assert clip.top1(images, list("bacd"), among=1).value == 1  # alone, every caption is the nearest


def test_the_world_clip_encodes_images_of_any_size(own: Clip) -> None:
    small, large = own.encode_images(torch.rand(2, 3, 64, 64)), own.encode_images(torch.rand(2, 3, 96, 96))
    assert small.shape == large.shape == own.encode_text(["a dog", "a photo of a cat"]).shape
    assert own.measured_by["model"] == "metric-clip"


def test_padding_does_not_change_a_text(own: Clip) -> None:
    alone, beside = own.encode_text(["a dog"])[0], own.encode_text(["a dog", "a picture of a very long dog"])[0]
    assert torch.allclose(alone, beside, atol=1e-5)


def test_an_untrained_clip_is_at_chance(own: Clip, world: World) -> None:
    images, captions = world_pairs(world, 64)
    assert len(set(captions)) == 64
    assert own.top1(images, captions).high < 0.3


def test_world_pairs_are_the_same_every_time(world: World) -> None:
    images, captions = world_pairs(world, 8)
    again, same = world_pairs(world, 8)
    assert torch.equal(images, again) and captions == same


def test_a_clip_that_cannot_be_loaded_is_one_line(tmp_path: Any) -> None:
    with pytest.raises(UserError, match="no metric CLIP"):
        load_metric_clip(tmp_path)
    with pytest.raises(UserError, match="cannot load the CLIP"):
        load_open_clip("local-dir:/nowhere")
