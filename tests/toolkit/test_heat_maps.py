"""Heat maps: means of what attention does, in bounded memory, of which the image knows nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from toolkit.arch.flux import Flux
from toolkit.arch.sd import SD
from toolkit.arch.sdxl import SDXL
from toolkit.attention import grid_of, self_attention_sites
from toolkit.cli import main
from toolkit.errors import UserError
from toolkit.heat_maps import heat_maps
from toolkit.images import overlay
from toolkit.model import Model
from toolkit.sample import sample

FAMILIES = pytest.mark.parametrize("family", [SD, SDXL])
LATENT = (8, 8)
DRAWN: dict[str, Any] = {"steps": 3, "guidance": 3.0, "negative": "a dog"}


def written_out(model: Model, prompts: list[str], seeds: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    """The images, and of each layer softmax(q k^T / sqrt(d)) in float64, the heads' mean: [steps, n, places, tokens] of the prompts."""
    noted: dict[str, dict[str, list[Tensor]]] = {}
    handles = []
    for site, attention in model.arch.cross_attention_sites().items():
        for name in ("to_q", "to_k"):

            def note(module: Any, given: Any, output: Tensor, site: str = site, name: str = name) -> None:
                noted.setdefault(site, {}).setdefault(name, []).append(output[: len(prompts)].double())

            handles.append(getattr(attention, name).register_forward_hook(note))
    images = sample(model, prompts, seeds, **DRAWN)
    for handle in handles:
        handle.remove()
    found = {}
    for site, both in noted.items():
        attention: Any = model.arch.cross_attention_sites()[site]
        q, k = (torch.stack(both[name]).unflatten(-1, (attention.heads, -1)).transpose(2, 3) for name in ("to_q", "to_k"))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        found[site] = (scores.exp() / scores.exp().sum(-1, keepdim=True)).mean(2)
    return images, found


@FAMILIES
def test_maps_are_the_means_of_attention(family: type[SD]) -> None:
    model, prompts = Model(family.tiny()), ["a cat", "two red dogs"]
    plain, seen = written_out(model, prompts, [0, 1])
    with heat_maps(model, groups=2) as maps:
        assert torch.equal(sample(model, prompts, [0, 1], hooks=[maps], **DRAWN), plain)
    with heat_maps(model, ["red dogs", "cat"], groups=2) as words:
        assert torch.equal(sample(model, prompts, [0, 1], hooks=[words], **DRAWN), plain)
    text, alone = model.arch.encode(prompts), model.arch.encode(["red dogs"])
    length = int(alone.length[0]) - 2
    start = int(text.length[1]) - 1 - length  # "red dogs" is the last of its prompt
    assert maps.sites == words.sites and set(maps.sites) == set(seen)
    for site, each in seen.items():
        for row in (0, 1):
            for group, steps in ((0, slice(0, 2)), (1, slice(2, 3)), (None, slice(0, 3))):
                expected = each[steps, row].mean(0).T
                torch.testing.assert_close(maps.mean(row, site, group).double(), expected, atol=1e-6, rtol=0)
                spoken = words.mean(row, site, group).double()
                torch.testing.assert_close(spoken[0], row * expected[start : start + length].sum(0), atol=1e-6, rtol=0)
                assert bool(spoken[1].any()) == (row == 0)


@FAMILIES
def test_a_words_map_is_the_mean_of_the_enlarged_ones(family: type[SD]) -> None:
    model = Model(family.tiny())
    _, seen = written_out(model, ["a cat"], [0])
    with heat_maps(model) as every, heat_maps(model, ["cat"]) as one:
        sample(model, ["a cat"], [0], hooks=[every, one], **DRAWN)
    length = int(model.arch.encode(["cat"]).length[0]) - 2
    end = int(model.arch.encode(["a cat"]).length[0]) - 1
    each = [site[:, 0, :, end - length : end].sum(-1).mean(0) for site in seen.values()]
    large = [F.interpolate(x.view(1, 1, *grid_of(len(x), LATENT)), (16, 16), mode="bicubic").clamp(min=0) for x in each]
    expected = torch.stack(large).mean(0)[0, 0].float()
    for maps in (every, one):
        torch.testing.assert_close(maps.of("cat", size=(16, 16)), expected, atol=1e-6, rtol=0)
        assert maps.of("cat").shape == LATENT
        assert maps.of("cat", sites=maps.sites[:1]).shape == LATENT and (maps.of("cat", sites=maps.sites[:1]) != maps.of("cat")).any()


def test_an_image_has_the_same_maps_in_any_batch(tiny: Model) -> None:
    prompts, seeds = ["a cat", "two red dogs", "a cat and a dog"], [0, 1, 2]
    with heat_maps(tiny) as together, heat_maps(tiny) as alone:
        sample(tiny, prompts, seeds, hooks=[together], **DRAWN)
        sample(tiny, prompts, seeds, hooks=[alone], batch_size=1, **DRAWN)
    for image, word in enumerate(("cat", "red dogs", "dog")):
        torch.testing.assert_close(together.of(word, image), alone.of(word, image), atol=1e-5, rtol=1e-4)
    with pytest.raises(IndexError, match="image 3 of 3"):
        alone.of("cat", 3)


@pytest.mark.parametrize("steps", [2, 7])
def test_memory_is_bounded_whatever_the_steps(tiny: Model, steps: int) -> None:
    """The bytes that the docstring says, all on the CPU, and no queries or keys."""
    places = 0
    with heat_maps(tiny, ["cat"], groups=2) as words, heat_maps(tiny, groups=2) as tokens:
        sample(tiny, ["a cat"] * 3, [0, 1, 2], steps=steps, hooks=[words, tokens])
        assert words._maps.sites == tokens._maps.sites == []
    for batch in words._batches:
        places = sum(mean.shape[-1] for mean in batch.means.values())
        assert all(mean.device.type == "cpu" and not mean.requires_grad for mean in batch.means.values())
    assert words.bytes == 4 * 2 * 3 * places and tokens.bytes == 77 * words.bytes


def test_nothing_stays_in_the_model(tiny: Model) -> None:
    with pytest.raises(RuntimeError), heat_maps(tiny, ["cat"]) as maps:
        sample(tiny, ["a cat"], [0], steps=2, hooks=[maps])
        raise RuntimeError
    assert not any(module._forward_hooks for module in tiny.arch.components()["denoiser"].modules())


def test_mistakes_are_told(tiny: Model) -> None:
    with heat_maps(tiny, ["cat"]) as maps, heat_maps(tiny) as every:
        sample(tiny, ["a dog"], [0], steps=1, hooks=[maps, every])
    with pytest.raises(UserError, match="'a dog' does not say 'cat'"):
        maps.of("cat")
    with pytest.raises(UserError, match="unknown word of these heat maps 'dog'"):
        maps.of("dog")
    assert every.of("dog").shape == LATENT
    with pytest.raises(UserError, match="unknown layer"):
        every.of("dog", sites=["nowhere"])
    with pytest.raises(UserError, match="groups is 0"), heat_maps(tiny, groups=0):
        pass
    with pytest.raises(UserError, match="unknown cross-attention"), heat_maps(tiny, sites=self_attention_sites(tiny.arch)[:1]):
        pass
    with pytest.raises(UserError, match="flux has no cross-attention"), heat_maps(Model(Flux.tiny())):
        pass


def test_an_overlay_is_brightest_where_the_map_is_highest() -> None:
    image, heat = Image.new("RGB", (32, 16), "blue"), torch.zeros(4, 8)
    heat[1, 6] = 3.0
    pixels = torch.tensor(list(overlay(image, heat, 1.0).tobytes())).view(16, 32, 3)
    row, column = divmod(int(pixels.sum(-1).argmax()), 32)
    assert 4 <= row < 8 and 24 <= column < 28 and pixels[row, column].tolist()[:2] == [255, 255]
    assert overlay(image, heat, 0.0).convert("L").tobytes() == image.convert("L").tobytes()
    assert pixels[12:, :12].max() < 40
    assert overlay(image, torch.ones(4, 8)).size == image.size


def test_the_command_line_draws_them_beside_the_images(tiny: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tiny.save(tmp_path / "model"))
    base = ["generate", "--model", folder, "--prompt", "a red cat", "a dog", "--steps", "2", "--json", "--out"]
    assert main([*base, str(tmp_path / "plain")]) == 0
    plain = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert main([*base, str(tmp_path / "heat"), "--heat-map", "red cat", "dog"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [Path(file).name for file in result["heat_maps"]] == ["0000-red_cat.png", "0001-dog.png"] and "heat_maps" not in plain
    for one, other in zip(plain["images"], result["images"], strict=True):
        assert Path(one).read_bytes() == Path(other).read_bytes()
    with Image.open(result["heat_maps"][0]) as drawn, Image.open(result["images"][0]) as image:
        assert drawn.size == image.size
    for words, message in ((["bird"], "'bird' is in none of the prompts"), (["dog", "<dog>"], "the same file names"), ([""], "in none")):
        assert main([*base, str(tmp_path / "none"), "--heat-map", *words]) == 2
        assert message in capsys.readouterr().err
