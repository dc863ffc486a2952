"""Gated edits: which prompts they act on, row by row, and that they leave nothing behind."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from toolkit.arch.text import Text
from toolkit.edits.base import EditInfo
from toolkit.edits.chain import Chain
from toolkit.edits.gated import Gate, Gated
from toolkit.edits.low_rank import LowRank
from toolkit.errors import UserError
from toolkit.io.export import export
from toolkit.io.files import load_edit, save_edit
from toolkit.model import Model, load_model
from toolkit.sample import sample

UNRELATED = "dog"  # shares no token with "cat", and is encoded elsewhere


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gated(model: Model, *names: str, floor: float = 0.8) -> Gated:
    """An edit of all attention projections, with a gate for these names."""
    targets = model.arch.lora_targets()
    factors = {
        site: (random(layer.out_features, 1, seed=i), random(1, layer.in_features, seed=-i))
        for i, (site, layer) in enumerate(targets.items())
    }
    info = EditInfo(method="test", base=model.fingerprint)
    return Gated(info, LowRank.from_factors(factors, info), Gate.of(model.arch, names or ("cat",), floor))


def predicted(model: Model, *prompts: str) -> Tensor:
    shape = (1, *model.arch.latent_shape(model.arch.image_size, model.arch.image_size))
    with torch.no_grad():
        x, t = random(*shape).repeat(len(prompts), 1, 1, 1), torch.full((len(prompts),), 500)
        return model.arch.predict(x, t, model.arch.encode(list(prompts)))


def test_the_gate_of_real_words() -> None:
    """1 where the concept is named, more than half for another word for it, 0 for other things and for no prompt."""
    arch = load_model("emoji-sd").arch
    gate = Gate.of(arch, ["pistol", "gun"], 0.8)
    named = gate(arch.encode(["pistol", "gun", "a photo of a pistol and a cat", "a green gun on a plain background"]))
    assert torch.allclose(named, torch.ones(4), atol=1e-5)
    assert gate(arch.encode(["a handgun"])).item() > 0.5
    assert gate(arch.encode(["a dog", "a pizza and a whale", "a plain background", ""])).abs().max() < 1e-6
    wide = Gate.of(arch, ["ice cream"], 0.0)
    assert wide(arch.encode(["a cream"])).item() >= 0.5 - 1e-6, "half of the name's tokens"


def test_each_row_of_a_batch_has_its_own_gate(tiny: Model) -> None:
    edit = gated(tiny)
    plain = predicted(tiny, "a cat", UNRELATED, "")
    with tiny.attached(edit.low_rank):
        everywhere = predicted(tiny, "a cat", UNRELATED, "")
    with tiny.attached(edit):
        mixed = predicted(tiny, "a cat", UNRELATED, "")
        assert torch.allclose(predicted(tiny, UNRELATED), plain[1:2], atol=1e-5)
    assert torch.allclose(mixed[0], everywhere[0], atol=1e-4) and not torch.allclose(mixed[0], plain[0], atol=1e-2)
    assert torch.allclose(mixed[1:], plain[1:], atol=1e-5) and not torch.allclose(everywhere[1], plain[1], atol=1e-2)


def test_a_half_open_gate_and_half_the_scale_are_half_the_change(tiny: Model) -> None:
    edit = gated(tiny)
    text = tiny.arch.encode(["a cat"])
    ajar = Gated(edit.info, edit.low_rank, gate := Gate.of(tiny.arch, ["cats"], 0.0))
    share = gate(text).item()
    assert 0 < share < 1
    with tiny.attached(edit.low_rank, scale=share):
        expected = predicted(tiny, "a cat")
    for one, scale in ((ajar, 1.0), (edit, share)):
        with tiny.attached(one, scale=scale):
            assert torch.allclose(predicted(tiny, "a cat"), expected, atol=1e-4)


def test_without_being_told_the_prompt_the_gate_is_open(tiny: Model) -> None:
    """Also right after a prediction whose gate was shut: nothing of it is left."""
    edit, given = gated(tiny), {"output_type": "pt", "num_inference_steps": 1, "guidance_scale": 1.0, "height": 16, "width": 16}

    def piped() -> Tensor:
        return tiny.arch.pipe(UNRELATED, generator=torch.Generator().manual_seed(0), **given).images

    with tiny.attached(edit.low_rank):
        open_gate = piped()
    with tiny.attached(edit):
        predicted(tiny, UNRELATED, UNRELATED)
        assert torch.allclose(piped(), open_gate, atol=1e-3)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_detached_it_leaves_nothing(tiny: Model, order: tuple[int, ...]) -> None:
    other: list[Text] = []
    tiny.arch.readers.append(other.append)
    plain, denoiser = predicted(tiny, "a cat", UNRELATED), tiny.arch.components()["denoiser"]
    before = {name: value.clone() for name, value in denoiser.state_dict().items()}
    edits = (gated(tiny), gated(tiny, "bird"), gated(tiny).low_rank)
    for edit in edits:
        tiny.attach(edit)
    for index in order:
        tiny.detach(edits[index])
    assert torch.equal(predicted(tiny, "a cat", UNRELATED), plain)
    assert tiny.arch.readers == [other.append] and not any(m._forward_hooks or m._forward_pre_hooks for m in denoiser.modules())
    assert all(torch.equal(value, before[name]) for name, value in denoiser.state_dict().items())


def test_saved_and_loaded_it_is_the_same(tiny: Model, tmp_path: Path) -> None:
    edit = gated(tiny, "cat", "a bird", floor=0.5)
    loaded = load_edit(save_edit(edit, tmp_path / "edit.safetensors"))
    assert isinstance(loaded, Gated) and loaded.info == edit.info and set(loaded.sites()) == set(edit.sites())
    assert all(torch.equal(loaded.delta(site), edit.low_rank.delta(site)) for site in edit.sites())
    with tiny.attached(edit):
        expected = sample(tiny, ["a cat", UNRELATED], [0, 1], steps=2)
    with tiny.attached(Chain.of([loaded])):
        assert torch.equal(sample(tiny, ["a cat", UNRELATED], [0, 1], steps=2), expected)


def test_what_cannot_be_is_refused(tiny: Model, tmp_path: Path) -> None:
    edit = gated(tiny)
    for format in ("diffusers-lora", "kohya-lora", "delta", "checkpoint"):
        with pytest.raises(UserError, match=f"a gated edit cannot be written as {format}; no other tool reads it; attach it when sampling"):
            export(edit, format, tmp_path / "out", tiny)
    tiny.attach(edit)
    for merged in (tiny.merge, lambda: tiny.save(tmp_path / "model")):
        with pytest.raises(UserError, match="a gated edit cannot be written into a checkpoint; detach it first"):
            merged()
    tiny.detach_all()
    (site, layer), *_ = tiny.arch.lora_targets().items()
    for name, width, has in ((site, layer.in_features + 1, r"tiny|sd.*has \["), ("denoiser.nowhere", 8, "has no such layer")):
        wrong = LowRank.from_factors({name: (random(layer.out_features, 1), random(1, width))})
        with pytest.raises(UserError, match=has):
            tiny.attach(Gated(EditInfo(), wrong, edit.gate))
    assert tiny.edits == () and tiny.arch.readers == []
    convolution = LowRank.from_factors({"denoiser.conv_in": (random(8, 1), random(1, 4, 3, 3))})
    with pytest.raises(UserError, match="gate linear layers only"):
        Gated(EditInfo(), convolution, edit.gate)


def test_damaged_tensors(tiny: Model) -> None:
    edit = gated(tiny)
    good = edit.tensors()
    for bad, what in [
        ({key: value for key, value in good.items() if key != "gate.ids"}, "needs .*'ids'"),
        ({**good, "other": random(1)}, "'other'.* beside its factors"),
        ({**good, "gate.nothing": random(3)}, r"needs \[k, d\]"),
        ({**good, "gate.floor": torch.tensor(1.0)}, "below 1"),
    ]:
        with pytest.raises(UserError, match=what):
            Gated.from_tensors(bad, EditInfo())
