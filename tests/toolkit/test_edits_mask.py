"""Masks: what they shut is shut before anything is added, in any order, and detached they leave nothing."""

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from toolkit.edits.base import Edit, EditInfo
from toolkit.edits.chain import Chain
from toolkit.edits.delta import Delta
from toolkit.edits.low_rank import LowRank
from toolkit.edits.mask import Mask
from toolkit.edits.token import TokenEdit
from toolkit.errors import UserError
from toolkit.io.export import FORMATS, export
from toolkit.io.files import load_edit, save_edit
from toolkit.io.stream import write_checkpoint
from toolkit.model import Model, load_model
from toolkit.runs import seeded


def masks_of(model: Model, seed: int = 0) -> dict[str, Tensor]:
    """Of every layer that reads text, with about two thirds kept."""
    layers = model.arch.text_linears().items()
    return {f"{site}.weight": torch.rand(layer.weight.shape, generator=seeded("mask", seed, site)) > 1 / 3 for site, layer in layers}


def weights(model: Model) -> dict[str, Tensor]:
    return {f"{part}.{name}": p.detach().clone() for part, whole in model.arch.components().items() for name, p in whole.named_parameters()}


def adding(model: Model, seed: int = 0) -> tuple[Delta, LowRank]:
    """Changes of the layers that read text."""
    layers = model.arch.text_linears().items()
    shapes = {site: layer.weight.shape for site, layer in layers}
    deltas = {f"{site}.weight": torch.randn(shape, generator=seeded("delta", seed, site)) for site, shape in shapes.items()}
    factors = {site: (torch.ones(shape[0], 1), torch.full((1, shape[1]), 0.25)) for site, shape in shapes.items()}
    return Delta.from_deltas(deltas), LowRank.from_factors(factors)


def test_it_shuts_what_its_mask_says_at_any_scale(tiny: Model) -> None:
    masks, before = masks_of(tiny), weights(tiny)
    edit = Mask.from_masks(masks)
    for scale in (1.0, 0.5, 0.0):
        with tiny.attached(edit, scale=scale):
            for name, value in weights(tiny).items():
                kept = masks[name].float() if name in masks else torch.ones(())
                assert torch.equal(value, before[name] * (1 - scale * (1 - kept))), name
    assert all(torch.equal(value, before[name]) for name, value in weights(tiny).items())
    name = next(iter(masks))
    assert torch.equal(edit.delta(name), masks[name].float() - 1) and edit.shape(name) == masks[name].shape
    assert edit.writes == {"denoiser"} and "text_encoder" in edit.reads and edit.sites() == list(masks)
    with pytest.raises(UserError, match="unknown site"):
        edit.delta("nowhere")


@pytest.mark.parametrize("count", [1, 7, 8, 9, 24])
def test_bits_are_packed(count: int) -> None:
    mask = torch.rand(count, generator=seeded("bits", count)) > 0.5
    mask[-1] = False
    edit = Mask.from_masks({"denoiser.x": mask.view(1, count), "denoiser.whole": torch.ones(3)})
    assert edit.sites() == ["denoiser.x"] and edit.bits["denoiser.x"].numel() == -(-count // 8)
    assert torch.equal(edit.kept("denoiser.x"), mask.view(1, count))


def test_it_takes_a_thirty_second_of_the_weights(tmp_path: Path) -> None:
    mask = torch.rand(640, 768, generator=seeded("size")) > 0.01
    file = save_edit(Mask.from_masks({"denoiser.x": mask}), tmp_path / "edit.safetensors")
    assert mask.numel() * 4 / 32 <= file.stat().st_size <= mask.numel() * 4 / 32 + 1024


def test_two_are_their_union(tiny: Model) -> None:
    given = [masks_of(tiny, seed) for seed in (0, 1)]
    first = next(iter(given[0]))
    given[1][first] = torch.ones_like(given[1][first])  # one that only the other shuts
    edits = [Mask.from_masks(masks) for masks in given]
    united = Mask.union(edits)
    assert all(torch.equal(united.kept(name), given[0][name] & given[1][name]) for name in given[0])
    with tiny.attached(*edits):
        both = weights(tiny)
    with tiny.attached(united):
        assert all(torch.equal(value, both[name]) for name, value in weights(tiny).items())
    with pytest.raises(UserError, match=r"masks of x are \[2\] and \[1\], need one shape"):
        Mask.union([Mask.from_masks({"x": torch.zeros(2)}), Mask.from_masks({"x": torch.zeros(1)})])


def test_it_acts_before_what_adds_however_they_are_attached(tiny: Model) -> None:
    masks, before, (delta, low_rank) = masks_of(tiny), weights(tiny), adding(tiny)
    edits: tuple[Edit, ...] = (delta, Mask.from_masks(masks), low_rank)
    expected = {name: before[name] * mask + delta.delta(name) + low_rank.delta(name) for name, mask in masks.items()}
    for order in itertools.permutations(edits):
        with tiny.attached(*order):
            torch.testing.assert_close({name: weights(tiny)[name] for name in masks}, expected)
        chain = Chain.of(order)
        with tiny.attached(chain):
            torch.testing.assert_close({name: weights(tiny)[name] for name in masks}, expected)
        torch.testing.assert_close({name: chain.weight(name, before[name], 1.0) for name in masks}, expected)
        with pytest.raises(UserError, match=r"a mask edit and others change .* depends on the model's weights; read"):
            chain.delta(next(iter(masks)))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 0, 3, 2), (2, 3, 0, 1)])
def test_any_order_of_detaching_leaves_nothing(tiny: Model, order: tuple[int, ...]) -> None:
    before = weights(tiny)
    token = TokenEdit.from_rows({"<toy>": {"text_encoder": torch.ones(2, 32)}})
    edits = (adding(tiny)[0], Mask.from_masks(masks_of(tiny)), token, Mask.from_masks(masks_of(tiny, 1)))
    for edit in edits:
        tiny.attach(edit)
    for number in order:
        tiny.detach(edits[number])
        fresh = weights(tiny.reference(tiny.edits))
        assert all(torch.equal(value, fresh[name]) for name, value in weights(tiny).items())
    assert all(torch.equal(value, before[name]) for name, value in weights(tiny).items())


def test_saved_and_loaded_it_is_the_same(tiny: Model, tmp_path: Path) -> None:
    masks = masks_of(tiny)
    edit = Mask.from_masks(masks, EditInfo("cones", {"tau": 0.5}, notes={"shut": [0.3]}))
    for kept in (edit, Chain.of([adding(tiny)[0], edit], [1.0, 0.5])):
        loaded = load_edit(save_edit(kept, tmp_path / "edit.safetensors"))
        assert type(loaded) is type(kept) and set(loaded.sites()) == set(kept.sites()) and loaded.info == kept.info
        with tiny.attached(kept):
            expected = weights(tiny)
        with tiny.attached(loaded):
            assert all(torch.equal(value, expected[name]) for name, value in weights(tiny).items())


def test_a_checkpoint_holds_it(tiny: Model, tmp_path: Path) -> None:
    edit = Chain.of([adding(tiny)[0], Mask.from_masks(masks_of(tiny), EditInfo(base=tiny.fingerprint))])
    source = tiny.save(tmp_path / "model")
    with tiny.attached(edit):
        expected = weights(tiny)
    exported, streamed = tmp_path / "exported", tmp_path / "streamed"
    export(edit, "checkpoint", exported, tiny)
    write_checkpoint(source, edit, streamed, strict=True)
    for folder in (exported, streamed):
        written = weights(load_model(str(folder)))
        assert all(torch.equal(written[name], value) for name, value in expected.items())
    file = Path("unet", "diffusion_pytorch_model.safetensors")
    whole, patched = load_file(exported / file), load_file(streamed / file)
    assert whole.keys() == patched.keys() and all(torch.equal(whole[key], patched[key]) for key in whole)
    tiny.attach(edit)
    tiny.merge()
    assert all(torch.equal(value, expected[name]) for name, value in weights(tiny).items())


def test_no_other_format_holds_it(tiny: Model, tmp_path: Path) -> None:
    edit = Mask.from_masks(masks_of(tiny))
    for format in FORMATS.keys() - {"checkpoint"}:
        with pytest.raises(UserError, match=f"a mask edit cannot be written as {format}; export it as checkpoint"):
            export(edit, format, tmp_path / "out", tiny)


def test_one_that_does_not_fit_is_refused(tiny: Model, tmp_path: Path) -> None:
    name, before, source = next(iter(masks_of(tiny))), weights(tiny), tiny.save(tmp_path / "model")
    for masks, what in [
        ({name: torch.zeros(3, 5)}, rf"edit of {name} is \[3, 5\]"),
        ({"denoiser.nowhere": torch.zeros(3, 5)}, "edit changes denoiser.nowhere, which"),
    ]:
        edit = Mask.from_masks(masks)
        with pytest.raises(UserError, match=what):
            tiny.attach(edit)
        with pytest.raises(UserError, match=what):
            write_checkpoint(source, edit, tmp_path / "edited")
    assert tiny.edits == () and all(torch.equal(value, before[name]) for name, value in weights(tiny).items())
    good = Mask.from_masks({"x": torch.zeros(3, 5)}).tensors()
    assert good.keys() == {"x|bits", "x|size"}
    for bad, what in [
        ({**good, "x|size": torch.tensor([3, 6])}, r"mask of x \[3, 6\] is torch.uint8 \[2\], need uint8 \[3\]"),
        ({**good, "x|size": torch.tensor([-3, -5])}, r"mask of x \[-3, -5\] is"),
        ({**good, "x|bits": good["x|bits"].int()}, "need uint8"),
        ({"x|bits": good["x|bits"]}, "lacks the bits or the size of x"),
        ({**good, "x": torch.zeros(1)}, "belongs to no parameter"),
    ]:
        with pytest.raises(UserError, match=what):
            Mask.from_tensors(bad, EditInfo())
