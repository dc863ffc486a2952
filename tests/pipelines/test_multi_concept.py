"""The pipelines that take regions, against the pipelines of diffusers that they are made of."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from PIL import Image
from torch import Tensor

import pipelines.multi_concept
from pipelines.attention.regional import Region, regional
from pipelines.multi_concept import MultiConceptPipeline
from pipelines.multi_concept_variants import (
    MultiConceptImg2ImgPipeline,
    MultiConceptInpaintPipeline,
    MultiConceptXLImg2ImgPipeline,
    MultiConceptXLInpaintPipeline,
)
from pipelines.multi_concept_xl import MultiConceptXLPipeline
from toolkit.arch.base import Architecture
from toolkit.arch.sd import SD
from toolkit.arch.sdxl import SDXL
from toolkit.edits.chain import Chain
from toolkit.edits.low_rank import LowRank
from toolkit.edits.token import TokenEdit
from toolkit.errors import UserError
from toolkit.model import Model
from toolkit.sample import noise, sample

ROOM = Path(pipelines.multi_concept.__file__).parent
LEFT, ALL = (0.0, 0.0, 0.5, 1.0), (0.0, 0.0, 1.0, 1.0)
BOTH = pytest.mark.parametrize(("family", "kind"), [(SD, MultiConceptPipeline), (SDXL, MultiConceptXLPipeline)], ids=["sd", "sdxl"])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def concept(arch: Architecture, token: str) -> Chain:
    rows = {part: random(2, table.embedding_dim, seed=3) for part, table in arch.token_embeddings().items()}
    layers = arch.text_linears().items()
    factors = {site: (random(layer.out_features, 2, seed=1), random(2, layer.in_features, seed=2)) for site, layer in layers}
    return Chain.of([TokenEdit.from_rows({token: rows}), LowRank.from_factors(factors)])


def made(kind: Any, arch: Architecture) -> Any:
    pipe = kind.from_pipe(arch.pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe: Any, *given: Any, **options: Any) -> Tensor:
    usual = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "pt", "generator": torch.Generator().manual_seed(0)}
    return pipe(*given, **{**usual, **options}).images


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """diffusers copies pipelines that it loads to a folder for modules; another one than the user's."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    yield
    for name in [name for name in sys.modules if name.startswith("diffusers_modules")]:
        del sys.modules[name]


@BOTH
def test_diffusers_loads_it_from_its_file(family: type[SD], kind: Any, tmp_path: Path, modules: None) -> None:
    arch = family.tiny()
    folder = str(arch.save(tmp_path / "model"))
    file = str(ROOM / f"{kind.__module__.rpartition('.')[2]}.py")
    pipe: Any = DiffusionPipeline.from_pretrained(folder, custom_pipeline=file, trust_remote_code=True)
    assert type(pipe).__name__ == kind.__name__
    pipe.set_progress_bar_config(disable=True)
    region = Region("a <toy>", box=LEFT, edit=concept(arch, "<toy>"))
    torch.testing.assert_close(images(pipe, "a room", regions=[region]), images(made(kind, arch), "a room", regions=[region]))
    assert torch.equal(images(pipe, "a room"), images(arch.pipe, "a room"))


@BOTH
def test_without_regions_it_is_the_pipeline(family: type[SD], kind: Any) -> None:
    arch = family.tiny()
    options: dict[str, Any] = {"negative_prompt": "a dog", "num_images_per_prompt": 2}
    assert torch.equal(images(made(kind, arch), "a cat", **options), images(arch.pipe, "a cat", **options))


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 1.0}, {"num_images_per_prompt": 2}, {"negative_prompt": "a room"}], ids=str)
def test_one_region_everywhere_is_its_prompt(options: dict[str, Any]) -> None:
    arch = SD.tiny()
    pipe, edit = made(MultiConceptPipeline, arch), concept(arch, "<toy>")
    for prompt, given in (("a dog", None), ("a photo of a <toy>", edit)):
        inside = images(pipe, "a cat", regions=[Region(prompt, box=ALL, edit=given)], **options)
        with Model(arch).attached(*([given] if given else [])):
            plain = images(arch.pipe, prompt, **options)
        torch.testing.assert_close(inside, plain, atol=1e-5, rtol=1e-5)
        assert (inside - images(pipe, "a cat", **options)).abs().max() > 1e-3


def test_the_pooled_encoding_is_that_of_the_prompt() -> None:
    arch = SDXL.tiny()
    pipe = made(MultiConceptXLPipeline, arch)
    texts = arch.encode(["a dog", "a cat"])
    negative = arch.encode_negative([""])
    plain = images(
        arch.pipe,
        prompt_embeds=texts.hidden[:1],
        pooled_prompt_embeds=texts[[1]].pooled,
        negative_prompt_embeds=negative.hidden,
        negative_pooled_prompt_embeds=negative.pooled,
    )
    torch.testing.assert_close(images(pipe, "a cat", regions=[Region("a dog", box=ALL)]), plain, atol=1e-5, rtol=1e-5)


def test_it_agrees_with_the_sampler() -> None:
    """Two prompts, a negative one, two regions with one edit, the sampler's own scheduler."""
    arch, steps, prompts, seeds = SD.tiny(), 3, ["a room", "a <toy> in a room"], [0, 1]
    edit = concept(arch, "<toy>")
    mask = torch.zeros(16, 16)
    mask[10:, 9:] = 1
    regions = [Region("a <toy>", box=(0.0, 0.2, 0.6, 1.0), edit=edit), Region("a red <toy>", mask=mask, edit=edit, weight=2.0)]
    model = Model(arch)
    with regional(model, regions) as acting:
        ours = sample(model, prompts, seeds, steps=steps, guidance=3.0, negative="a dog", hooks=[acting])
    pipe = made(MultiConceptPipeline, arch)
    pipe.scheduler = arch.scheduler(steps)
    latents = noise(prompts, seeds, arch.latent_shape(arch.image_size, arch.image_size))
    theirs = images(pipe, prompts, regions=regions, negative_prompt=["a dog"] * 2, num_inference_steps=steps, latents=latents)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("family", "kind", "painted"),
    [
        (SD, MultiConceptImg2ImgPipeline, False),
        (SD, MultiConceptInpaintPipeline, True),
        (SDXL, MultiConceptXLImg2ImgPipeline, False),
        (SDXL, MultiConceptXLInpaintPipeline, True),
    ],
)
def test_from_an_image(family: type[SD], kind: Any, painted: bool) -> None:
    arch = family.tiny()
    pipe = made(kind, arch)
    given: dict[str, Any] = {"image": Image.new("RGB", (16, 16), "red"), "strength": 0.9, "height": 16, "width": 16}
    given |= {"mask_image": Image.new("L", (16, 16), 255)} if painted else {}
    if not painted:
        del given["height"], given["width"]
    edit = concept(arch, "<toy>")
    inside = images(pipe, "a cat", regions=[Region("a <toy>", box=LEFT, edit=edit)], **given)
    assert (inside - images(pipe, "a cat", **given)).abs().max() > 1e-3
    if family is SD:  # the other reads the pooled encoding too
        everywhere = images(pipe, "a cat", regions=[Region("a <toy>", box=ALL, edit=edit)], **given)
        with Model(family.around(pipe)).attached(edit):
            torch.testing.assert_close(everywhere, images(pipe, "a <toy>", **given), atol=1e-5, rtol=1e-5)


@BOTH
def test_nothing_of_the_pipeline_changes(family: type[SD], kind: Any) -> None:
    arch = family.tiny()
    pipe, edit = made(kind, arch), concept(arch, "<toy>")
    pipe.set_progress_bar_config(disable=True, desc="mine")
    plain = images(pipe, "a cat")
    parts, config = dict(pipe.components), dict(pipe.config)
    for module in arch.components().values():
        module.train().requires_grad_(True)

    def stop(*_: Any) -> Any:
        raise RuntimeError("in the middle")

    for options in ({}, {"callback_on_step_end": stop}):
        try:
            images(pipe, "a <toy>", regions=[Region("a <toy>", box=LEFT, edit=edit)], **options)
        except RuntimeError as error:
            assert options and "in the middle" in str(error)
    assert all(pipe.components[name] is part for name, part in parts.items()) and dict(pipe.config) == config
    assert pipe._progress_bar_config == {"disable": True, "desc": "mine"}
    assert all(part.training and all(p.requires_grad for p in part.parameters()) for part in arch.components().values())
    for module in arch.components().values():
        module.eval()
    assert torch.equal(images(pipe, "a cat"), plain)


def test_layers_that_are_elsewhere() -> None:
    pipe = made(MultiConceptPipeline, SD.tiny())
    SD.around(pipe).components()["denoiser"].to("meta")
    with pytest.raises(UserError, match="enable_model_cpu_offload"):
        images(pipe, "a cat", regions=[Region("a dog", box=LEFT)])
