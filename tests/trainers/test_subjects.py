"""Subjects' pictures as samples: drawn by step, kept or read again, in groups of one size, with weights for noise levels."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from toolkit.arch.flux import Flux
from toolkit.arch.sd import SD
from toolkit.concepts import CustomizeTask, Subject
from toolkit.errors import PalimpsestError
from toolkit.model import Model
from toolkit.runs import seeded
from trainers import subjects as module
from trainers.customize.textual_inversion import TextualInversion
from trainers.loop import Batch
from trainers.photos import bucket_of
from trainers.subjects import Photos, Prompts, min_snr

SIZES = ((40, 40), (40, 20), (20, 40), (41, 20))


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path, ...]:
    """Pictures of noise, wide and high."""
    made = []
    for index, (wide, high) in enumerate(SIZES):
        pixels = np.random.default_rng(index).integers(0, 255, (high, wide, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        made.append(tmp_path / f"{index}.png")
    return tuple(made)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for each test."""
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def photos(model: Model, paths: tuple[Path, ...], **options: Any) -> Photos:
    return Photos.of(model.arch, (Subject("<toy>", "cat", paths),), TextualInversion(**options), ("a {}", "my {}"))


def test_a_step_is_the_same_at_once_and_in_parts(tiny: Model, paths: tuple[Path, ...]) -> None:
    for buckets in (False, True):
        pool = photos(tiny, paths, aspect_buckets=buckets)
        for step in range(6):
            whole = pool.draw("x", TextualInversion(train_batch_size=4), Batch(step))
            parts = [pool.draw("x", TextualInversion(train_batch_size=2), Batch(step, part, 2)) for part in (0, 1)]
            assert whole.rows == [row for part in parts for row in part.rows]
            assert whole.prompts == [prompt for part in parts for prompt in part.prompts]
            for name in ("latents", "weights", "noise", "t"):
                assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))


def test_pictures_keep_their_proportions_in_groups_of_one_size(tiny: Model, paths: tuple[Path, ...]) -> None:
    assert [bucket_of(path, 64, 8) for path in paths] == [(64, 64), (48, 80), (80, 48), (48, 80)]
    pool = photos(tiny, paths, aspect_buckets=True)
    assert list(map(len, pool.groups.values())) == [1, 2, 1]
    assert all(height * width <= 16 * 16 and max(height, width) > min(height, width) for height, width in list(pool.groups)[1:])
    drawn = [pool.draw("x", TextualInversion(), Batch(step)) for step in range(60)]
    assert all(len({pool.sizes[row] for row in one.rows}) == 1 for one in drawn)
    assert {row for one in drawn for row in one.rows} == {0, 1, 2, 3}
    high, wide = pool.at(2, "", seeded("none")).latent.shape[2:]
    assert high > wide
    edit = TextualInversion(max_train_steps=4, aspect_buckets=True).fit(tiny, CustomizeTask((Subject("<toy>", "cat", paths),)))
    assert edit.delta("text_encoder:<toy>").isfinite().all()


def test_pictures_are_encoded_once_and_kept(tiny: Model, paths: tuple[Path, ...], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    own = module.to_latents
    monkeypatch.setattr(module, "to_latents", lambda arch, pixels: calls.append(len(pixels)) or own(arch, pixels))
    draws = {}
    for cache in ("memory", "disk", "no"):
        calls.clear()
        pool = photos(tiny, paths, cache=cache)
        draws[cache] = [pool.draw("x", TextualInversion(), Batch(step)).latents for step in range(3)]
        assert calls == [1, 1, 1, 1] + ([4, 4, 4] if cache == "no" else []), "without a cache those of a step at once"
    for kept, stored, anew in zip(*draws.values(), strict=True):
        assert torch.equal(kept, stored)
        torch.testing.assert_close(anew, kept, atol=1e-5, rtol=1e-5)  # several at once are rounded otherwise
    calls.clear()
    photos(tiny, paths, cache="disk")
    assert not calls and len(list((folder / "latents").iterdir())) == 4
    photos(tiny, paths, cache="disk", aspect_buckets=True)
    assert len(calls) == 3, "three of them are cut differently"
    calls.clear()
    Image.new("RGB", (40, 40)).save(paths[0])
    photos(Model(SD.tiny(seed=1)), paths, cache="disk")
    assert len(calls) == 4, "another image encoder"
    calls.clear()
    photos(tiny, paths, cache="disk")
    assert len(calls) == 1, "another picture under the old name"


def test_prompts_are_encoded_once_until_the_encoder_changes(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    own = tiny.arch.encode
    monkeypatch.setattr(tiny.arch, "encode", lambda prompts, **options: calls.extend(prompts) or own(prompts, **options))
    cases: tuple[tuple[Any, int, int], ...] = (("memory", 2, 0), ("no", 2, 2), ("disk", 2, 0))
    for cache, first, again in cases:
        calls.clear()
        prompts = Prompts(tiny.arch, cache)
        hidden = prompts(["a cat", "a dog", "a cat"]).hidden
        assert len(calls) == first and torch.equal(hidden[0], hidden[2]) and not torch.equal(hidden[0], hidden[1])
        calls.clear()
        assert torch.equal(prompts(["a dog"]).hidden[0], hidden[1]) and len(calls) == again // 2
    calls.clear()
    assert torch.equal(Prompts(tiny.arch, "disk")(["a cat"]).hidden, own(["a cat"]).hidden) and not calls
    with torch.no_grad():
        next(iter(tiny.arch.token_embeddings().values())).weight.add_(0.1)
    assert torch.equal(Prompts(tiny.arch, "disk")(["a cat"]).hidden, own(["a cat"]).hidden) and calls == ["a cat"]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_is_the_papers(prediction: Any) -> None:
    arch = SD.tiny(prediction_type=prediction)
    t = torch.tensor([1, 200, 500, 999])
    snr = arch.alphas_cumprod[t] / (1 - arch.alphas_cumprod[t])
    expected = snr.clamp(max=5) / (snr if prediction == "epsilon" else snr + 1)
    torch.testing.assert_close(min_snr(arch, t, 5.0).flatten(), expected, rtol=1e-3, atol=1e-6)
    assert torch.equal(min_snr(arch, t, 0.0), torch.ones(4, 1, 1, 1))


def test_min_snr_of_a_flow_counts_the_clean_images_error() -> None:
    arch = Flux.tiny()
    t = torch.tensor([250.0, 500.0, 900.0])
    sigma = t / 1000
    snr = ((1 - sigma) / sigma) ** 2
    torch.testing.assert_close(min_snr(arch, t, 5.0).flatten(), snr.clamp(max=5) * sigma**2, rtol=1e-4, atol=1e-6)


def test_the_noise_level_weighs_the_loss(tiny: Model, paths: tuple[Path, ...]) -> None:
    def rows(**options: Any) -> torch.Tensor:
        task = CustomizeTask((Subject("<toy>", "cat", paths),))
        return TextualInversion(max_train_steps=3, **options).fit(tiny, task).delta("text_encoder:<toy>")

    assert not torch.equal(rows(), rows(snr_gamma=5.0)) and torch.equal(rows(), rows(snr_gamma=0.0))


def test_a_loss_that_is_not_finite_names_the_files(tiny: Model, paths: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny.arch, "_predict", lambda latents, t, text: text.hidden.sum() * latents * float("nan"))
    with pytest.raises(PalimpsestError, match=r"became nan at step 0, with .*[0-3]\.png"):
        TextualInversion(max_train_steps=2).fit(tiny, CustomizeTask((Subject("<toy>", "cat", paths),)))
