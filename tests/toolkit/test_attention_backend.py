"""What computes attention. xformers has no operators for the CPU, so that its place is taken by one that calls PyTorch."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention, attention_dispatch, attention_processor
from torch import Tensor

from pipelines.attention.regional import Region, regional
from toolkit.arch.base import Architecture
from toolkit.arch.flux import Flux
from toolkit.arch.sd import SD
from toolkit.arch.sd3 import SD3
from toolkit.arch.sdxl import SDXL
from toolkit.attention import attention_maps
from toolkit.attention_backend import attend, head_widths, probe, use_attention
from toolkit.cli import main
from toolkit.errors import UserError
from toolkit.model import Model, load_model

FAMILIES = (SD, SDXL, SD3, Flux)


class CudaOnCpu:
    """torch as diffusers sees it, on a machine that pretends to have a CUDA device."""

    cuda = SimpleNamespace(is_available=lambda: True)

    def randn(self, shape: tuple[int, ...], device: str, dtype: torch.dtype | None) -> Tensor:
        return torch.ones(shape, dtype=dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the queries that xformers is given, which is there and works, until the test ends."""
    seen: list[tuple[int, ...]] = []

    def attend_by_torch(
        query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, p: float = 0.0, scale: Any = None, op: Any = None
    ):
        seen.append(tuple(query.shape))
        if query.ndim == 3:  # [n * heads, tokens, d]
            return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_bias, scale=scale)
        turned = (part.transpose(1, 2) for part in (query, key, value))  # [n, tokens, heads, d]
        return F.scaled_dot_product_attention(*turned, attn_mask=attn_bias, scale=scale).transpose(1, 2)

    install(monkeypatch, attend_by_torch)
    for module in (attention, attention_processor):
        monkeypatch.setattr(module, "is_xformers_available", lambda: True)
        monkeypatch.setattr(module, "torch", CudaOnCpu())
    monkeypatch.setattr(attention_processor, "xformers", sys.modules["xformers"])
    monkeypatch.setattr(attention, "xops", sys.modules["xformers"], raising=False)
    monkeypatch.setattr(attention_dispatch, "xops", sys.modules["xformers.ops"])
    monkeypatch.setattr("toolkit.attention_backend.probe", lambda module, device: None)
    return seen


def install(monkeypatch: pytest.MonkeyPatch, memory_efficient_attention: Callable[..., Tensor]) -> None:
    package, ops = ModuleType("xformers"), ModuleType("xformers.ops")
    vars(package)["ops"], vars(ops)["memory_efficient_attention"] = ops, memory_efficient_attention
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)


@torch.no_grad()
def predicted(arch: Architecture) -> Tensor:
    shape = arch.latent_shape(arch.image_size, arch.image_size)
    latents = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    return arch.predict(latents, torch.tensor([10, 20]), arch.encode(["a cat", "two red dogs"]))


def processors(arch: Architecture, part: str = "denoiser") -> list[Any]:
    modules: list[Any] = [module for module in arch.components()[part].modules() if hasattr(module, "processor")]
    return [module.processor for module in modules]


def test_without_a_gpu_it_is_pytorchs_with_one_warning(tiny: Model, tmp_path: Any) -> None:
    folder = str(tiny.save(tmp_path / "tiny"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = load_model(folder)
    with pytest.warns(UserWarning, match=r"the denoiser and the vae \(it needs a CUDA device, this one is cpu\)") as told:
        model = load_model(folder, attention="xformers")
    assert len(told) == 1 and "\n" not in str(told[0].message)
    assert torch.equal(predicted(model.arch), predicted(plain.arch))
    assert list(map(type, processors(model.arch))) == list(map(type, processors(plain.arch)))
    with pytest.raises(UserError, match="did you mean xformers"):
        load_model(folder, attention="xformer")


def test_the_command_line_says_so_too(tiny: Model, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tiny.save(tmp_path / "tiny"), tmp_path / "out"
    words = ["generate", "--model", str(folder), "--device", "cpu", "--prompt", "a cat", "--steps", "1", "--out", str(out)]
    assert main([*words, "--attention", "xformers"]) == 0
    assert capsys.readouterr().err.count("xformers cannot be used") == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_what_pytorch_does(family: Any, calls: list[tuple[int, ...]]) -> None:
    arch = family.tiny()
    pixels = torch.linspace(-1, 1, 3 * arch.image_size**2).reshape(1, 3, arch.image_size, arch.image_size)
    plain, latents = predicted(arch), arch.encode_images(pixels)
    assert not calls
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use_attention(arch, "xformers", "cpu")
    calls.clear()  # of what diffusers tries
    assert torch.allclose(predicted(arch), plain, atol=1e-5)
    assert {shape[-1] for shape in calls} == set(head_widths(arch.components()["denoiser"]))
    assert len(calls) == len(processors(arch))
    calls.clear()
    assert torch.allclose(arch.encode_images(pixels), latents, atol=1e-5)
    assert {shape[-1] for shape in calls} == set(head_widths(arch.components()["vae"]))


def test_copies_of_a_model_keep_it_and_others_do_not_get_it(calls: list[tuple[int, ...]]) -> None:
    model = Model(Flux.tiny())
    use_attention(model.arch, "xformers", "cpu")
    twin = model.reference()
    expected = predicted(model.arch)
    calls.clear()
    assert torch.equal(predicted(twin.arch), expected)
    assert len(calls) == len(processors(twin.arch))
    calls.clear()
    predicted(Flux.tiny())
    assert not calls


@pytest.mark.parametrize("family", [SD, SDXL])
def test_maps_and_regions_work_with_it(family: Any, calls: list[tuple[int, ...]]) -> None:
    plain, arch = family.tiny(), family.tiny()
    use_attention(arch, "xformers", "cpu")
    before = processors(arch)
    assert {type(one).__name__ for one in before} == {"XFormersAttnProcessor"}
    with attention_maps(plain) as expected, attention_maps(arch) as maps:
        predicted(plain)
        predicted(arch)
    assert maps.sites == expected.sites
    for site in maps.sites:
        assert torch.allclose(maps.probabilities(site), expected.probabilities(site), atol=1e-5)
    drawn = []
    for one in (plain, arch):
        with regional(Model(one), [Region("a red dog", box=(0, 0, 0.5, 1))]) as regions:
            regions.tell([None], 2)
            drawn.append(predicted(one))
    assert torch.allclose(*drawn, atol=1e-5)
    assert not torch.allclose(drawn[0], predicted(plain), atol=1e-5)
    assert all(one is other for one, other in zip(processors(arch), before, strict=True))


@pytest.mark.parametrize("bf16", [True, False])
def test_the_probe_tries_what_the_model_will_ask_for(bf16: bool, tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, torch.dtype]] = []
    monkeypatch.setattr("toolkit.attention_backend.attend", lambda width, device, dtype: asked.append((width, dtype)))
    monkeypatch.setattr("toolkit.attention_backend.computes_in_bf16", lambda device: bf16)
    denoiser = tiny.arch.components()["denoiser"]
    probe(denoiser, torch.device("cuda:1"))
    dtypes = [torch.float32, torch.bfloat16] if bf16 else [torch.float32]
    assert asked == [(width, dtype) for dtype in dtypes for width in head_widths(denoiser)]


def test_the_probe_computes_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []

    def forward_only(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        asked.append(tuple(query.shape))
        return (query + key + value).detach()

    cpu = torch.device("cpu")
    install(monkeypatch, forward_only)
    with pytest.raises(RuntimeError, match="does not require grad"), torch.no_grad():
        attend(40, cpu, torch.float32)
    install(monkeypatch, lambda query, key, value: F.scaled_dot_product_attention(query, key, value))
    attend(40, cpu, torch.bfloat16)
    assert asked == [(2, 8, 40)]
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(ImportError):
        attend(40, cpu, torch.float32)
