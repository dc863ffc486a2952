"""What the rectified-flow adapters share: their verbs agree with diffusers and with each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from safetensors.torch import load_file
from torch import Tensor, nn

from toolkit.arch.flow import Flow
from toolkit.arch.flux import Flux
from toolkit.arch.sd3 import SD3
from toolkit.edits.base import EditInfo
from toolkit.edits.low_rank import LowRank
from toolkit.edits.token import TokenEdit
from toolkit.errors import UserError
from toolkit.io.export import export
from toolkit.model import Model, load_model
from toolkit.prompt_search import TokenRows
from toolkit.sample import Hook, State, sample

FAMILIES: dict[str, Callable[[], Flow]] = {"sd3": SD3.tiny, "dev": Flux.tiny, "schnell": lambda: Flux.tiny(distilled=False)}
T5 = {"sd3": "text_encoder_3", "flux": "text_encoder_2"}
PROMPT = "a photo of a cat"


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Callable[[], Flow]:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def arch(family: Callable[[], Flow]) -> Flow:
    return family()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def word(arch: Flow, count: int = 2, name: str = "<toy>") -> TokenEdit:
    widths = {part: embedding.embedding_dim for part, embedding in arch.token_embeddings().items()}
    return TokenEdit.from_rows({name: {part: random(count, width) for part, width in widths.items()}})


def picture(pipe: Any) -> Tensor:
    start = torch.Generator().manual_seed(0)
    return pipe(PROMPT, height=16, width=16, num_inference_steps=2, generator=start, output_type="pt").images


# --- noise ----------------------------------------------------------------------------------------------------------
def test_noise_agrees_with_diffusers(arch: Flow) -> None:
    scheduler: Any = arch.scheduler(5)
    x0, noise = random(2, 3, 4, 8, 8)
    t = scheduler.timesteps[[0, 2, 4]]
    torch.testing.assert_close(arch.add_noise(x0, noise, t), scheduler.scale_noise(x0, t, noise))
    assert t[0] == arch.train_timesteps == 1000 and len(scheduler.timesteps) == 5


def test_conversions_invert_the_target(arch: Flow) -> None:
    x0, noise = random(2, 3, 4, 8, 8).double()
    t = torch.tensor([0, 500.25, 999], dtype=torch.float64)
    x_t, output = arch.add_noise(x0, noise, t), arch.target(x0, noise, t)
    torch.testing.assert_close(arch.to_x0(output, x_t, t), x0)
    torch.testing.assert_close(arch.to_eps(output, x_t, t), noise)
    assert torch.equal(x_t[0], x0[0])


def test_scheduler_solves_to_the_known_image(arch: Flow) -> None:
    x0, latents = random(2, 1, 4, 8, 8)
    scheduler: Any = arch.scheduler(7)
    for step in scheduler.timesteps:
        alpha, sigma = arch.signal_and_noise(step.view(1))
        noise = (latents - alpha * x0) / sigma
        latents = scheduler.step(arch.target(x0, noise, step.view(1)), step, latents).prev_sample
    torch.testing.assert_close(latents, x0, atol=1e-5, rtol=1e-4)


def test_whole_timesteps_mean_the_same_as_the_schedulers(arch: Flow) -> None:
    latents, text = random(1, 4, 8, 8), arch.encode([PROMPT])
    whole, real, other = (arch.predict(latents, torch.tensor([t]), text) for t in (250, 250.0, 251.0))
    assert torch.equal(whole, real) and not torch.equal(real, other)
    assert torch.equal(arch.signal_and_noise(torch.tensor([250]))[1], torch.full((1, 1, 1, 1), 0.25))


def test_predict_keeps_the_latents_type(family: Callable[[], Flow]) -> None:
    arch = family()
    latents, t, text = random(2, 4, 8, 4), torch.tensor([10, 900]), arch.encode(["a cat", "a dog"])
    output = arch.predict(latents, t, text)
    assert output.shape == latents.shape and output.std() > 1e-3
    torch.testing.assert_close(arch.predict(latents[1:], t[1:], text[1:]), output[1:])
    Model(arch).to(dtype=torch.bfloat16)
    rounded = arch.predict(latents, t, arch.encode(["a cat", "a dog"]))
    assert rounded.dtype == torch.float32 and arch.encode(["a cat"]).hidden.dtype == torch.bfloat16
    torch.testing.assert_close(rounded, output, atol=0.1, rtol=0.1)


def test_latents(arch: Flow) -> None:
    pixels = random(2, 3, 16, 24).clamp(-1, 1)
    latents = arch.encode_images(pixels)
    assert latents.shape[1:] == arch.latent_shape(16, 24) == (4, 8, 12) and arch.image_size == 16
    vae = arch.pipe.vae
    torch.testing.assert_close(latents / vae.config.scaling_factor + vae.config.shift_factor, vae.encode(pixels).latent_dist.mean)
    torch.testing.assert_close(arch.decode_latents(latents), vae.decode(vae.encode(pixels).latent_dist.mean).sample)
    with pytest.raises(UserError, match="18x16 is not a multiple of 4; give one"):
        arch.latent_shape(18, 16)


def test_another_scheduler_is_refused(family: Callable[[], Flow]) -> None:
    pipe = family().pipe
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(UserError, match="scheduler is DDIMScheduler, need FlowMatchEulerDiscreteScheduler"):
        type(family())(pipe)


# --- text -----------------------------------------------------------------------------------------------------------
def test_segments_are_what_the_layers_read(arch: Flow) -> None:
    streams = arch.text_streams()
    assert list(streams) == ["hidden", "pooled"]
    assert arch.text_linears() == {site: layer for stream in streams.values() for site, layer in stream.linears.items()}
    text = arch.encode(["a cat", "a photo of a dog", ""])[torch.tensor([1, 2])]
    read: dict[str, Tensor] = {}

    def remember(site: str) -> Callable[[nn.Module, Any], None]:
        return lambda layer, given: read.update({site: given[0]})

    handles = [layer.register_forward_pre_hook(remember(site)) for site, layer in arch.text_linears().items()]
    try:
        arch.predict(random(2, 4, 8, 8), torch.tensor([500, 500]), text)
    finally:
        for handle in handles:
            handle.remove()
    for stream in streams.values():
        rows = torch.cat([segment.rows for segment in stream.segments(text)], 1)
        assert stream.linears and all(torch.equal(read[site].reshape(rows.shape), rows) for site in stream.linears)
        assert all(site.startswith("denoiser.") and layer.in_features == rows.shape[-1] for site, layer in stream.linears.items())
    [pooled] = streams["pooled"].segments(text)
    assert pooled.ids is None and pooled.length.tolist() == [1, 1] and pooled.leading == 0


def test_readers_read_the_texts_rows_first(arch: Flow) -> None:
    """Against what each block is given, behind its own norm."""
    read: dict[str, Tensor] = {}
    blocks: dict[str, tuple[Any, dict[str, Any]]] = {}
    denoiser, readers, handles = arch.components()["denoiser"], arch.text_readers(), []

    def remember(site: str) -> Callable[[nn.Module, Any], None]:
        return lambda layer, given: read.update({site: given[0]})

    def remember_block(name: str) -> Callable[[nn.Module, Any, dict[str, Any]], None]:
        return lambda block, _, given: blocks.update({name: (block, given)})

    for name, linears in readers.items():
        block = denoiser.get_submodule(name.removeprefix("denoiser.").removesuffix(".attn"))
        handles.append(block.register_forward_pre_hook(remember_block(name), with_kwargs=True))
        handles += [layer.register_forward_pre_hook(remember(site)) for site, layer in linears.items()]
    try:
        arch.predict(random(2, 4, 8, 8), torch.tensor([500, 500]), arch.encode([PROMPT, ""]))
    finally:
        for handle in handles:
            handle.remove()
    assert [len(linears) for linears in readers.values()] == [2, 2]  # two joint blocks of SD3; one of Flux, and a single one
    assert read.keys().isdisjoint(arch.text_linears()) and read.keys() <= arch.lora_targets().keys()
    for name, linears in readers.items():
        block, given = blocks[name]
        text, image, timestep = (given[key] for key in ("encoder_hidden_states", "hidden_states", "temb"))
        if "single" in name:
            expected = block.norm(torch.cat([text, image], 1), emb=timestep)[0]
        elif getattr(block, "context_pre_only", False):
            expected = block.norm1_context(text, timestep)
        else:
            expected = block.norm1_context(text, emb=timestep)[0]
        assert all(torch.equal(read[site], expected) for site in linears)


def test_segments_say_what_their_rows_depend_on(arch: Flow) -> None:
    text = arch.encode(["a photo of a cat", "a photo of a dog", "picture"])
    for segment in arch.text_streams()["hidden"].segments(text):
        assert segment.ids is not None and segment.rows.shape[:2] == segment.ids.shape
        rows, ids = segment.rows, segment.ids
        differs = int((ids[0] != ids[1]).nonzero()[0])
        assert differs > 4 and segment.causal == torch.allclose(rows[0, :differs], rows[1, :differs], atol=1e-5)
        shared = [bool((rows[:, row] - rows[:1, row]).abs().max() < 1e-5) for row in range(2)]
        assert shared == [segment.leading == 1, False]


def test_t5_rows_end_with_its_eos(arch: Flow) -> None:
    prompts = ["a cat", "", "a photo of </s> a dog"]
    segment = arch.text_streams()["hidden"].segments(arch.encode(prompts))[-1]
    tokenizer = arch.tokenizers()[T5[arch.name]]
    assert segment.length.tolist() == [len(tokenizer(prompt).input_ids) for prompt in prompts]
    assert segment.ids is not None and segment.ids.shape[1] == (512 if arch.distilled_guidance else 256)


def test_t5_tells_upper_from_lower_case_but_new_words_are_found_in_either(arch: Flow) -> None:
    plain = arch.encode(["a Cat", "a cat"])
    assert not torch.allclose(plain.hidden[0], plain.hidden[1])
    with Model(arch).attached(word(arch)):
        spelled = arch.encode(["A <Toy>", "A <toy>", "A"])
    for part in (spelled.hidden, spelled.pooled):
        assert part is not None and torch.equal(part[0], part[1]) and not torch.allclose(part[1], part[2])


def test_new_words_take_the_rows_that_no_word_has(family: Callable[[], Flow]) -> None:
    arch = family()
    part, model = T5[arch.name], Model(arch)
    embedding, tokenizer = arch.token_embeddings()[part], arch.tokenizers()[part]
    words, rows = len(tokenizer), len(embedding.weight)
    assert rows > words, "as in T5 v1.1, whose embedding has 28 rows more than words"
    few, many = word(arch), word(arch, rows, "<many>")
    with model.attached(few):
        table = arch.token_embeddings()[part].weight
        assert table.shape == embedding.weight.shape
        assert torch.equal(table[words : words + 2], few.delta(f"{part}:<toy>"))
        assert torch.equal(table[:words], embedding.weight[:words])
        with model.attached(many):
            assert len(arch.token_embeddings()[part].weight) == len(arch.tokenizers()[part]) == words + 2 + rows
    assert arch.token_embeddings()[part] is embedding and arch.tokenizers()[part] is tokenizer


def test_gradients_reach_the_rows_of_every_encoder(family: Callable[[], Flow]) -> None:
    arch = family()
    with TokenRows(Model(arch), {"<toy>": "photo"}, vectors=2) as rows:
        text = rows(["a <toy>"])
        arch.predict(random(1, 4, 8, 8), torch.tensor([500]), text).square().sum().backward()
        trained = dict(rows.named_parameters())
    assert len(trained) == len(arch.token_embeddings()) >= 2
    assert all(row.grad is not None and row.grad.abs().amax(1).min() > 0 for row in trained.values())
    with Model(arch).attached(rows.edit()):
        torch.testing.assert_close(arch.encode(["a <toy>"]).hidden, text.hidden.detach())


# --- files and other people's formats -------------------------------------------------------------------------------
def test_load_reads_what_save_wrote(family: Callable[[], Flow], tmp_path: Path) -> None:
    arch = family()
    model = Model(arch)
    with model.attached(word(arch)):
        expected, image = model.arch.encode(["a <toy>"]), sample(model, ["a <toy>"], [0], steps=2)
        saved = model.save(tmp_path / "model")
    loaded = load_model(str(saved))
    text = loaded.arch.encode(["a <toy>"])
    assert isinstance(text.pooled, Tensor) and isinstance(expected.pooled, Tensor)
    assert torch.equal(text.hidden, expected.hidden) and torch.equal(text.pooled, expected.pooled)
    assert loaded.guidance == model.guidance and loaded.arch.image_size == model.arch.image_size
    torch.testing.assert_close(sample(loaded, ["a <toy>"], [0], steps=2), image, atol=1e-5, rtol=0)
    assert load_model(str(saved), dtype="bfloat16").arch.dtype == torch.bfloat16


def test_a_copy_is_independent(family: Callable[[], Flow]) -> None:
    model = Model(family())
    before, twin = sample(model, [PROMPT], [0], steps=1), model.reference()
    with torch.no_grad():
        for name, module in model.arch.components().items():
            for parameter in module.parameters() if name != "vae" else ():
                parameter.add_(0.1)
    assert torch.equal(sample(twin, [PROMPT], [0], steps=1), before) and not torch.equal(sample(model, [PROMPT], [0], steps=1), before)
    assert twin.arch.components()["vae"] is model.arch.components()["vae"] and twin.fingerprint != Model(model.arch).fingerprint


def test_lora_gives_the_same_image_in_diffusers(family: Callable[[], Flow], tmp_path: Path) -> None:
    model = Model(family())
    arch = model.arch
    clips = [part for part in arch.token_embeddings() if part != T5[arch.name]]
    layers: dict[str, Any] = {**arch.lora_targets(), **arch.text_linears()}
    for part in clips:
        named = arch.components()[part].named_modules()
        layers |= {f"{part}.{name}": layer for name, layer in named if name.endswith("0.self_attn.q_proj")}
    ranks = {site: 1 + number % 3 for number, site in enumerate(layers)}
    factors = {site: (random(len(layer.weight), ranks[site]), random(ranks[site], layer.in_features)) for site, layer in layers.items()}
    edit = LowRank.from_factors(factors)
    plain = picture(arch.pipe)
    with model.attached(edit):
        expected = picture(arch.pipe)
    assert (plain - expected).abs().max() > 1e-2
    export(edit, "diffusers-lora", tmp_path, model)
    pipe = family().pipe
    pipe.load_lora_weights(tmp_path)
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    modules = [module for part in parts for module in part.modules()]
    assert len([module for module in modules if hasattr(module, "lora_A")]) == len(layers), "every layer was found"
    torch.testing.assert_close(picture(pipe), expected, atol=1e-4, rtol=0)


def test_embeddings_are_named_by_encoder(arch: Flow, tmp_path: Path) -> None:
    model = Model(arch)
    named = {"sd3": ["clip_g", "clip_l", "t5xxl"], "flux": ["clip_l", "t5xxl"]}
    edit = word(arch)
    fitted = TokenEdit(EditInfo(base=model.fingerprint), edit.tokens)
    for number, (token, given) in enumerate([(edit, model), (fitted, None)]):
        [path] = export(token, "embedding", tmp_path / str(number), given)
        tensors = load_file(path)
        assert sorted(tensors) == named[arch.name] and torch.equal(tensors["t5xxl"], edit.delta(f"{T5[arch.name]}:<toy>"))


# --- sampling -------------------------------------------------------------------------------------------------------
class NoImage(Hook):
    def __init__(self) -> None:
        self.sites: dict[str, tuple[int, ...]] = {}

    def on_attention(self, state: State, site: str, attention: nn.Module, output: Tensor) -> Tensor:
        self.sites[site] = tuple(output.shape)
        return torch.zeros_like(output)


def test_attention_hooks_get_the_images_part_of_joint_attention(arch: Flow) -> None:
    model, hook = Model(arch), NoImage()
    before = sample(model, [PROMPT], [0], steps=1)
    changed = sample(model, [PROMPT], [0], steps=1, hooks=[hook])
    assert not torch.allclose(changed, before, atol=1e-4) and torch.equal(sample(model, [PROMPT], [0], steps=1), before)
    assert hook.sites.keys() == arch.attention_sites().keys()
    conditions, length = 2 if arch.name == "sd3" else 1, arch.encode([PROMPT]).hidden.shape[1]
    for site, (rows, tokens, _) in hook.sites.items():
        assert rows == conditions and tokens == (length + 16 if "single" in site else 16)


def test_the_edit_of_a_layer_with_a_bias_leaves_the_bias(arch: Flow) -> None:
    model = Model(arch)
    text = arch.encode([PROMPT])
    for stream in arch.text_streams().values():
        for site, layer in stream.linears.items():
            assert layer.bias is not None
            rows = stream.segments(text)[0].rows
            expected = 3 * layer(rows) - 2 * layer.bias
            with model.attached(LowRank.from_deltas({site: 2 * layer.weight.detach()})):
                torch.testing.assert_close(layer(rows), expected, atol=1e-4, rtol=1e-4)
