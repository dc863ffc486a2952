"""Module edits: what they add is what they say, at any scale, and detached they leave nothing."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.arch.flux import Flux
from toolkit.arch.sd import SD
from toolkit.arch.sd3 import SD3
from toolkit.arch.sdxl import SDXL
from toolkit.edits.base import EditInfo
from toolkit.edits.chain import Chain
from toolkit.edits.low_rank import LowRank
from toolkit.edits.module import FORMS, ModuleEdit, SmallModule
from toolkit.edits.token import TokenEdit
from toolkit.errors import UserError
from toolkit.io.export import FORMATS, export
from toolkit.io.files import load_edit, save_edit
from toolkit.io.stream import write_checkpoint
from toolkit.model import Model
from toolkit.runs import seeded

WEIGHTS = ("down.weight", "down.bias", "up.weight", "up.bias")


def some_module(width: int, key: str, rank: int = 3) -> SmallModule:
    shapes = ((rank, width), (rank,), (width, rank), (width,))
    return SmallModule(
        "bottleneck", {name: torch.randn(shape, generator=seeded(key, name)) for name, shape in zip(WEIGHTS, shapes, strict=True)}
    )


def some_edit(model: Model, seed: int = 0, count: int | None = None) -> ModuleEdit:
    """After the first `count` attention modules, or all."""
    sites = list(model.arch.attention_sites())[:count]
    return ModuleEdit.from_modules({site: some_module(model.arch.attention_width(site), f"{seed} {site}") for site in sites})


def predicted(model: Model) -> Tensor:
    arch = model.arch
    latents = torch.randn(2, *arch.latent_shape(arch.image_size, arch.image_size), generator=seeded("latents"))
    with torch.no_grad():
        return arch.predict(latents, torch.tensor([10, 20]), arch.encode(["a cat", "two red dogs"]))


def hooks(model: Model) -> list[int]:
    return [len(module._forward_hooks) for part in model.arch.components().values() for module in part.modules()]


def by_hand(module: SmallModule, output: Tensor) -> Tensor:
    down, down_bias, up, up_bias = (module.weights[name] for name in WEIGHTS)
    return F.gelu(output @ down.T + down_bias) @ up.T + up_bias


def test_it_adds_what_its_module_gives_times_the_scale(tiny: Model) -> None:
    edit = some_edit(tiny, count=1)
    (site, module), *_ = edit.modules.items()
    attention: nn.Module = tiny.arch.attention_sites()[site]
    given = torch.randn(2, 16, tiny.arch.attention_width(site), generator=seeded("given"))
    plain = attention(given)
    for scale in (1.0, 0.5, -2.0):
        with tiny.attached(edit, scale=scale):
            assert torch.allclose(attention(given), plain + scale * by_hand(module, plain), atol=1e-6)
    with tiny.attached(edit, scale=0.0):
        assert torch.equal(attention(given), plain)
    later = some_edit(tiny, seed=1, count=1)
    with tiny.attached(edit, later):
        first = plain + by_hand(module, plain)
        assert torch.allclose(attention(given), first + by_hand(later.modules[site], first), atol=1e-5)


@pytest.mark.parametrize("family", [SD, SDXL, SD3, Flux])
def test_every_architecture_takes_it(family: type[SD]) -> None:
    model = Model(family.tiny())
    plain = predicted(model)
    with model.attached(some_edit(model), scale=0.1):
        assert not torch.allclose(predicted(model), plain)
    assert torch.equal(predicted(model), plain)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 0, 3, 2), (2, 3, 0, 1)])
def test_any_order_of_detaching_leaves_nothing(tiny: Model, order: tuple[int, ...]) -> None:
    changes = {site: torch.full_like(linear.weight, 0.01) for site, linear in tiny.arch.text_linears().items()}
    token = TokenEdit.from_rows({"<toy>": {"text_encoder": torch.ones(2, 32)}})
    edits = (some_edit(tiny), LowRank.from_deltas(changes), some_edit(tiny, seed=1), token)
    plain, before = predicted(tiny), hooks(tiny)
    for edit in edits:
        tiny.attach(edit)
    for number in order:
        tiny.detach(edits[number])
        fresh = tiny.reference(tiny.edits)
        assert torch.equal(predicted(tiny), predicted(fresh))
    assert torch.equal(predicted(tiny), plain) and hooks(tiny) == before


def test_saved_and_loaded_it_is_the_same(tiny: Model, tmp_path: Path) -> None:
    edit = some_edit(tiny)
    for kept in (edit, Chain.of([edit, some_edit(tiny, seed=1)], [0.5, 1.0])):
        loaded = load_edit(save_edit(kept, tmp_path / "edit.safetensors"))
        assert type(loaded) is type(kept) and loaded.sites() == sorted(kept.sites(), key=loaded.sites().index)
        with tiny.attached(kept):
            expected = predicted(tiny)
        with tiny.attached(loaded):
            assert torch.equal(predicted(tiny), expected)
    assert edit.writes == {"denoiser"} and "text_encoder" in edit.reads and edit.parameter_names() == []
    site = edit.sites()[0]
    assert torch.equal(edit.delta(site), torch.cat([tensor.flatten() for tensor in edit.modules[site].weights.values()]))
    with pytest.raises(UserError, match="unknown site"):
        edit.delta("nowhere")


def test_half_a_model_takes_it(tiny: Model) -> None:
    edit = some_edit(tiny, count=2)
    with tiny.attached(edit):
        exact = predicted(tiny)
        tiny.to(dtype=torch.bfloat16)
        arch = tiny.arch
        latents = torch.randn(2, *arch.latent_shape(arch.image_size, arch.image_size), generator=seeded("latents"))
        rounded = arch.predict(latents.bfloat16(), torch.tensor([10, 20]), arch.encode(["a cat", "two red dogs"]))
    assert rounded.dtype == torch.bfloat16 and (rounded.float() - exact).abs().mean() < 0.1 * exact.abs().mean()


def test_no_weights_hold_it(tiny: Model, tmp_path: Path) -> None:
    edit = some_edit(tiny, count=1)
    for format in FORMATS:
        with pytest.raises(UserError, match=f"a module edit cannot be written as {format}; no other tool reads it; attach it when"):
            export(edit, format, tmp_path / "out", tiny)
    saved = tiny.save(tmp_path / "model")
    with pytest.raises(UserError, match="a module edit cannot be written into a checkpoint"):
        write_checkpoint(saved, edit, tmp_path / "edited")
    tiny.attach(edit)
    with pytest.raises(UserError, match="a module edit cannot be written into a checkpoint"):
        tiny.merge()


def test_one_that_does_not_fit_is_refused(tiny: Model) -> None:
    site = next(iter(tiny.arch.attention_sites()))
    before = hooks(tiny)
    good = some_module(tiny.arch.attention_width(site), "good")
    for modules, what in [
        ({site: some_module(7, "narrow")}, "is for width 7, the attention of sd has"),
        ({site: good, "denoiser.nowhere": some_module(8, "lost")}, "adds to denoiser.nowhere, which sd"),
    ]:
        with pytest.raises(UserError, match=what):
            tiny.attach(ModuleEdit.from_modules(modules))
    assert tiny.edits == () and hooks(tiny) == before
    with pytest.raises(UserError, match="unknown form of a module 'bottlenek'"):
        ModuleEdit.from_modules({site: SmallModule("bottlenek", good.weights)})
    for damaged in (
        {name: tensor for name, tensor in good.weights.items() if name != "up.bias"},
        {**good.weights, "up.weight": torch.zeros(2, 2)},
        {**good.weights, "more": torch.zeros(2)},
    ):
        with pytest.raises(UserError, match=r"needs down.weight \[r, d\], down.bias \[r\]"):
            ModuleEdit.from_modules({site: SmallModule("bottleneck", damaged)})
    with pytest.raises(UserError, match="belongs to no module"):
        ModuleEdit.from_tensors({"bottleneck.site": torch.zeros(1)}, EditInfo())


@pytest.mark.parametrize("form", FORMS)
def test_a_form_adds_nothing_at_first(form: str) -> None:
    start = SmallModule(form, FORMS[form].start(8, 4, seeded("start")))
    assert start.sizes("site")["d"] == 8
    assert not FORMS[form].apply(start.weights, torch.randn(2, 5, 8)).any()
