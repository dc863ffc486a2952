"""Captured layers of tiny SD3 and Flux models, against a drawing by hand and UCE's equation written out for each layer."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.closed_form.uce import UCE
from toolkit.arch.flux import Flux
from toolkit.arch.sd3 import SD3
from toolkit.concepts import Concept, EraseTask
from toolkit.errors import UserError
from toolkit.model import Model
from toolkit.sample import noise

CAT_TO_DOG = EraseTask((Concept("cat", anchor="dog"),), ("cow",), ("a {}",))
QUICK: dict[str, Any] = {"capture_steps": 2, "capture_images": 1}
CLIP = 77
Read = dict[str, Tensor]


@pytest.fixture(scope="module", params=["sd3", "flux-schnell"])
def model(request: pytest.FixtureRequest) -> Model:
    return tiny_of(request.param)


def tiny_of(family: str) -> Model:
    """In float64, so that the order of a batch makes no difference."""
    arch = SD3.tiny() if family == "sd3" else Flux.tiny(distilled=family == "flux-dev")
    return Model(arch).to(dtype=torch.float64)


def deep(model: Model) -> dict[str, torch.nn.Linear]:
    return {site: linear for linears in model.arch.text_readers().values() for site, linear in linears.items()}


@contextmanager
def listening(model: Model) -> Iterator[Read]:
    """Site -> what each layer read last."""
    read: Read = {}
    handles = [
        linear.register_forward_hook(lambda _, given, out, site=site: read.update({site: given[0][0].double()}))
        for site, linear in deep(model).items()
    ]
    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def drawn(model: Model, prompt: str, beside: tuple[str, ...], seed: int, steps: int) -> list[dict[str, Read]]:
    """What each layer reads of a prompt and of others beside it, one by one, at every step of drawing it by hand."""
    arch, seen = model.arch, []
    shape = arch.latent_shape(arch.image_size, arch.image_size)
    latents, scheduler = noise([prompt], [seed], shape), arch.scheduler(steps, shape)
    for t in scheduler.timesteps:
        outputs, reads = {}, {}
        for each in dict.fromkeys((prompt, "", *beside)):
            text = arch.encode([each])
            if arch.distilled_guidance:
                text = type(text)(text.hidden, text.ids, text.length, text.pooled, torch.tensor([model.guidance]))
            with listening(model) as read:
                outputs[each] = arch.predict(latents, t[None], text)
            reads[each] = dict(read)
        seen.append(reads)
        output = outputs[prompt]
        if not arch.distilled_guidance and model.guidance != 1:
            output = outputs[""] + model.guidance * (output - outputs[""])
        latents = scheduler.step(output, t, latents).prev_sample
    return seen


def ends(model: Model, prompt: str) -> list[int]:
    """The row of the last word's last token, in each encoder's rows."""
    return [
        offset + int(segment.length[0]) - 2
        for segment, offset in zip(model.arch.text_streams()["hidden"].segments(model.arch.encode([prompt])), (0, CLIP), strict=False)
    ]


def expected(model: Model, method: UCE) -> dict[str, Tensor]:
    """Site -> the change of each layer, from rows that are summed one after another."""
    images = range(method.capture_seed, method.capture_seed + method.capture_images)
    total, length = method.capture_steps * len(images), model.arch.encode([""]).hidden.shape[1]
    changes = {}
    pairs = [step for seed in images for step in drawn(model, "a dog", ("a cat",), seed, method.capture_steps)]
    kept = [step for seed in images for step in drawn(model, "a cow", (), seed, method.capture_steps)]
    for site, linear in deep(model).items():
        weight = linear.weight.double()
        source, target = (torch.cat([picked(model, step[each][site], each, method) for step in pairs]) for each in ("a cat", "a dog"))
        blank = torch.cat([step[""][site] for step in (*pairs, *kept)])
        own = [step["a cow"][site] for step in kept]
        image = [step["a dog"][site][length:] for step in pairs]
        a, p = method.erase_scale / total, method.preserve_scale / total
        keep = torch.cat([*own, *image])
        right = a * source.T @ source + p * keep.T @ keep + p / 2 * blank.T @ blank + method.lamb * torch.eye(weight.shape[1])
        left = a * (weight @ target.T) @ source + weight @ (p * keep.T @ keep + p / 2 * blank.T @ blank) + method.lamb * weight
        changes[site] = left @ torch.linalg.inv(right) - weight
    return changes


def picked(model: Model, rows: Tensor, prompt: str, method: UCE) -> Tensor:
    """The rows of one prompt that are moved, or moved to. Both words have as many tokens, so that all rows stay in line."""
    return rows[ends(model, prompt)] if method.rows == "last_subject" else rows[: model.arch.encode([""]).hidden.shape[1]]


def relative(given: Tensor, wanted: Tensor) -> float:
    return float((given - wanted).norm() / wanted.norm())


FEW = UCE(layers="captured", rows="last_subject", capture_steps=3, capture_images=2, capture_seed=4, lamb=0.01)
MORE_THAN_WIDE = UCE(layers="captured", rows="all", preserve_scale=0.3, erase_scale=2.0, **QUICK)


@pytest.mark.parametrize(("family", "method"), [("sd3", FEW), ("sd3", MORE_THAN_WIDE), ("flux-schnell", FEW), ("flux-dev", MORE_THAN_WIDE)])
def test_each_layer_is_solved_on_what_it_reads(family: str, method: UCE) -> None:
    model = tiny_of(family)
    edit = method.fit(model, CAT_TO_DOG)
    wanted = expected(model, method)
    assert {f"{site}.weight" for site in wanted} == set(edit.sites())
    assert len({change.norm() for change in wanted.values()}) == len(wanted)
    for site, change in wanted.items():
        assert relative(edit.delta(site).double(), change) <= 1e-6


def test_each_layer_answers_the_concept_as_its_anchor_with_its_bias_as_before(model: Model) -> None:
    method = UCE(layers="captured", rows="last_subject", preserve_scale=1e-4, lamb=1e-6, **QUICK)
    edit, layers = method.fit(model, CAT_TO_DOG), deep(model)
    [first, second] = drawn(model, "a dog", ("a cat",), 0, 2)
    with torch.no_grad():
        for step in (first, second):
            for site, layer in layers.items():
                concept, anchor = (picked(model, step[each][site], each, method) for each in ("a cat", "a dog"))
                before, goal = layer(concept), layer(anchor)
                with model.attached(edit):
                    after = layer(concept)
                    torch.testing.assert_close(after - layer(torch.zeros_like(concept)), after - layer.bias)
                assert (after - goal).norm() < 0.05 * (before - goal).norm()


def test_what_the_image_reads_of_the_words_comes_nearer_to_the_anchor(model: Model) -> None:
    """With the anchor's pooled encoding, which other layers read; on latents that were not captured."""
    task = EraseTask((Concept("cat", anchor="dog"),), ("dog",), ("a {}",))
    edit = UCE(layers="captured", preserve_scale=1.0, lamb=1e-3, capture_steps=4, capture_images=2).fit(model, task)
    latents = noise(["a dog"] * 2, [100, 101], model.arch.latent_shape(16, 16))
    text = model.arch.encode(["a cat", "a dog"])
    text = replace(text, pooled=None if text.pooled is None else text.pooled[[1, 1]])

    def gap() -> Tensor:
        concept, anchor = (model.arch.predict(latents, torch.tensor([900.0, 300.0]), text[[row, row]]) for row in (0, 1))
        return (concept - anchor).norm()

    with torch.no_grad():
        before = gap()
        with model.attached(edit):
            assert gap() < 0.85 * before


@pytest.mark.parametrize("layers", ["captured", "both"])
def test_it_comes_off_bit_for_bit_and_no_bias_is_touched(model: Model, layers: Any) -> None:
    before = {name: value.clone() for name, value in model.arch.components()["denoiser"].state_dict().items()}
    edit = UCE(layers=layers, **QUICK).fit(model, CAT_TO_DOG)
    after_fit = model.arch.components()["denoiser"].state_dict()
    assert model.edits == () and all(torch.equal(value, before[name]) for name, value in after_fit.items())
    changed = {f"denoiser.{name}" for name in before if name.endswith("bias")} & set(edit.sites())
    assert not changed
    with model.attached(edit):
        attached = model.arch.components()["denoiser"].state_dict()
        assert {f"denoiser.{name}" for name, value in attached.items() if not torch.equal(value, before[name])} == set(edit.sites())
    assert all(torch.equal(value, before[name]) for name, value in model.arch.components()["denoiser"].state_dict().items())


def test_both_captures_what_is_read_behind_the_changed_first_layers(model: Model) -> None:
    both, text = (UCE(layers="both", **QUICK).fit(model, CAT_TO_DOG), UCE().fit(model, CAT_TO_DOG))
    with model.attached(text):
        captured = UCE(layers="captured", **QUICK).fit(model, CAT_TO_DOG)
    plain = UCE(layers="captured", **QUICK).fit(model, CAT_TO_DOG)
    assert set(both.sites()) == {*text.sites(), *captured.sites()} and captured.info.on == ("uce",)
    assert all(torch.equal(both.delta(site), text.delta(site)) for site in text.sites())
    assert all(torch.equal(both.delta(site), captured.delta(site)) for site in captured.sites())
    assert all(relative(plain.delta(site), captured.delta(site)) > 1e-3 for site in captured.sites())


def test_its_seed_alone_decides(model: Model) -> None:
    one, two, other = (UCE(layers="captured", capture_seed=seed, **QUICK).fit(model, CAT_TO_DOG) for seed in (1, 1, 2))
    assert all(torch.equal(one.delta(site), two.delta(site)) for site in one.sites())
    first = next(iter(model.arch.text_readers()))  # which reads the text before it has met the image
    assert all(torch.equal(one.delta(site), other.delta(site)) == site.startswith(f"{first}.") for site in one.sites())


def test_keys_and_values_of_one_attention_share_a_factor(model: Model) -> None:
    edit = UCE(layers="captured", rows="last_subject", **QUICK).fit(model, CAT_TO_DOG)
    readers = model.arch.text_readers()
    assert not edit.dense and len({id(down) for down in edit.down.values()}) == len(readers)
    segments = len(ends(model, ""))
    assert all(len(edit.down[site]) <= 2 * segments for linears in readers.values() for site in linears)


def hooked(model: Model) -> list[str]:
    parts = model.arch.components()["denoiser"].named_modules()
    return [name for name, part in parts if part._forward_pre_hooks or part._forward_hooks]


def test_nothing_stays_hooked_also_when_drawing_fails(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    method, predict, seen = UCE(layers="both", **QUICK), model.arch.predict, []
    method.fit(model, CAT_TO_DOG)
    assert hooked(model) == []

    def failing(*given: Any) -> Tensor:
        seen.append(hooked(model))
        predict(*given)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.arch, "predict", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        method.fit(model, CAT_TO_DOG)
    assert len(seen[0]) == len(model.arch.text_readers()) and hooked(model) == [] and model.edits == ()


def test_a_model_whose_layers_all_read_the_text_as_it_is_has_none_to_capture(tiny: Model) -> None:
    with pytest.raises(UserError, match=r"layers is captured, but in sd all layers read the text as it is; leave it at text"):
        UCE(layers="captured").fit(tiny, CAT_TO_DOG)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (UCE(capture_steps=3), r"capture_steps.*no effect on layers text; set layers"),
        (UCE(capture_seed=3), r"capture_steps.*no effect on layers text; set layers"),
        (UCE(layers="captured", capture_images=0), r"capture_images 0, needs at least 1 of each; set both"),
        (UCE(layers="captured", prior="built-in"), r"no effect on layers captured; preserve prompts"),
        (UCE(layers="captured", erase_scale=0.0), r"erase_scale is 0.0"),
        (UCE(layers="captured", rows="last_subject", lamb=0.0, preserve_scale=0.0, **QUICK), r"raise lamb \(now 0\)"),
    ],
)
def test_options_without_effect_or_solution_say_what_to_change(method: UCE, message: str) -> None:
    with pytest.raises(UserError, match=message):
        method.fit(Model(SD3.tiny()), CAT_TO_DOG)


def test_an_anchor_that_encodes_the_same_is_refused() -> None:
    with pytest.raises(UserError, match="changes nothing"):
        UCE(layers="captured", **QUICK).fit(Model(SD3.tiny()), EraseTask((Concept("cat", anchor=" cat "),), (), ("{}",)))
