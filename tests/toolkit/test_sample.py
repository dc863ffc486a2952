from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from toolkit.arch.sd import SD
from toolkit.arch.text import Text
from toolkit.errors import UserError
from toolkit.model import Model
from toolkit.sample import Hook, State, generate, noise, sample

PROMPTS = ["a cat", "a dog", "a cat", "a photo of a red car"]
SEEDS = [0, 0, 1, 7]


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def model(request: pytest.FixtureRequest) -> Model:
    return Model(SD.tiny(prediction_type=request.param))


@pytest.fixture
def calls(model: Model, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[int]]]:
    """How many rows each call of encode and predict had."""
    seen: dict[str, list[int]] = {"encode": [], "predict": []}

    def counting(name: str) -> Callable[..., Any]:
        real = getattr(model.arch, name)

        def count(first: Any, *rest: Any) -> Any:
            seen[name].append(len(first))
            return real(first, *rest)

        return count

    for name in seen:
        monkeypatch.setattr(model.arch, name, counting(name))
    yield seen


def test_agrees_with_the_pipeline_of_diffusers(model: Model) -> None:
    pipe, arch, steps = model.arch.pipe, model.arch, 4
    kept, pipe.scheduler = pipe.scheduler, arch.scheduler(steps)
    latents = noise(PROMPTS, SEEDS, arch.latent_shape(arch.image_size, arch.image_size))
    try:
        pipe.set_progress_bar_config(disable=True)
        options = {"negative_prompt": ["a dog"] * 4, "num_inference_steps": steps, "guidance_scale": 3.0, "output_type": "pt"}
        theirs = pipe(PROMPTS, latents=latents, **options)
    finally:
        pipe.scheduler = kept
    ours = sample(model, PROMPTS, SEEDS, steps=steps, guidance=3.0, negative="a dog")
    assert ours.shape == (4, 3, arch.image_size, arch.image_size) and ours.dtype == torch.float32
    assert ours.std() > 1e-3, "a constant image would prove nothing"
    torch.testing.assert_close(ours, theirs.images, atol=1e-4, rtol=0)


def test_same_image_at_any_batch_size_and_order(model: Model) -> None:
    together = sample(model, PROMPTS, SEEDS, steps=3)
    torch.testing.assert_close(sample(model, PROMPTS, SEEDS, steps=3, batch_size=1), together, atol=1e-4, rtol=0)
    torch.testing.assert_close(sample(model, PROMPTS[::-1], SEEDS[::-1], steps=3, batch_size=3).flip(0), together, atol=1e-4, rtol=0)
    assert (together[0] - together[2]).abs().max() > 1e-2, "another seed must give another image"


def test_noise_is_keyed_by_prompt_and_seed() -> None:
    rows = noise(["a", "b", "a", "a"], [0, 0, 1, 0], (4, 8, 8))
    assert torch.equal(rows[0], rows[3])
    assert not torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])
    assert torch.equal(noise(["b"], [0], (4, 8, 8))[0], rows[1])
    many = noise(["p"] * 50, range(50), (4, 8, 8))
    assert abs(many.mean()) < 0.05 and abs(many.std() - 1) < 0.05


def test_each_prompt_is_encoded_once_and_conditions_are_predicted_together(model: Model, calls: dict[str, list[int]]) -> None:
    sample(model, PROMPTS, SEEDS, steps=2, batch_size=3)
    assert sum(calls["encode"]) == 4, "three distinct prompts and the empty one"
    assert calls["predict"] == [6, 6, 2, 2]


def test_no_guidance_needs_no_second_prediction(model: Model, calls: dict[str, list[int]]) -> None:
    image = sample(model, PROMPTS, SEEDS, steps=2, guidance=1.0)
    assert calls == {"encode": [3], "predict": [4, 4]}
    torch.testing.assert_close(sample(model, PROMPTS, SEEDS, steps=2, guidance=1.0, negative="a dog"), image)
    torch.testing.assert_close(sample(model, PROMPTS, SEEDS, steps=2, guidance=1.0 + 1e-6), image, atol=1e-3, rtol=0)


class Recorder(Hook):
    """Remembers what it was called with; adds a third condition."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.first = torch.zeros(0)

    def on_prompt(self, state: State) -> None:
        self.seen.append("prompt")
        self.first = state.latents.clone()
        state.texts["third"] = Text.cat([state.model.arch.encode(["a car"])] * len(state.prompts))

    def on_prediction(self, state: State) -> None:
        self.seen.append(f"prediction {state.step}")
        assert list(state.outputs) == ["prompt", "negative", "third"]
        given = state.outputs
        torch.testing.assert_close(state.output, given["negative"] + 5.0 * (given["prompt"] - given["negative"]))
        x0, eps, t = state.to_x0(state.output), state.to_eps(state.output), state.timesteps
        torch.testing.assert_close(state.model.arch.add_noise(x0, eps, t), state.latents, atol=1e-3, rtol=1e-3)

    def on_step(self, state: State) -> None:
        self.seen.append(f"step {state.step}")


def test_hooks_are_called_in_order_and_may_add_conditions(model: Model, calls: dict[str, list[int]]) -> None:
    hook = Recorder()
    with_hook = sample(model, PROMPTS, SEEDS, steps=2, hooks=[hook])
    assert hook.seen == ["prompt", "prediction 0", "step 0", "prediction 1", "step 1"]
    assert calls["predict"] == [12, 12]
    assert torch.equal(hook.first, noise(PROMPTS, SEEDS, hook.first.shape[1:]))
    torch.testing.assert_close(with_hook, sample(model, PROMPTS, SEEDS, steps=2), atol=1e-4, rtol=0)


def test_a_hook_may_replace_prediction_and_latents(model: Model) -> None:
    class AsNegative(Hook):
        def on_prediction(self, state: State) -> None:
            state.output = state.outputs["negative"]

    class Zero(Hook):
        def on_step(self, state: State) -> None:
            state.latents = torch.zeros_like(state.latents)

    ours = sample(model, ["a cat"], [3], steps=3, negative="a dog", hooks=[AsNegative()])
    start = noise(["a cat"], [3], model.arch.latent_shape(model.arch.image_size, model.arch.image_size))

    class SameStart(Hook):
        def on_prompt(self, state: State) -> None:
            state.latents = start

    torch.testing.assert_close(ours, sample(model, ["a dog"], [3], steps=3, guidance=1.0, hooks=[SameStart()]), atol=1e-4, rtol=0)
    zero = sample(model, PROMPTS, SEEDS, steps=2, hooks=[Zero()])
    torch.testing.assert_close(zero, zero[:1].expand_as(zero))


class Attention(Hook):
    def __init__(self, failing: bool = False) -> None:
        self.sites: set[str] = set()
        self.failing = failing

    def on_attention(self, state: State, site: str, attention: nn.Module, output: Tensor) -> Tensor:
        assert len(output) == 2 * len(state.prompts)
        if self.failing:
            raise RuntimeError
        self.sites.add(site)
        return torch.zeros_like(output)


@pytest.mark.parametrize("failing", [False, True])
def test_attention_hooks_change_the_image_and_leave_no_trace(model: Model, failing: bool) -> None:
    before, hook = sample(model, ["a cat"], [0], steps=1), Attention(failing)
    if failing:
        with pytest.raises(RuntimeError):
            sample(model, ["a cat"], [0], steps=1, hooks=[hook])
    else:
        assert not torch.allclose(sample(model, ["a cat"], [0], steps=1, hooks=[hook]), before, atol=1e-4)
        assert hook.sites == set(model.arch.attention_sites())
    assert torch.equal(sample(model, ["a cat"], [0], steps=1), before)


def test_amp_is_close_to_float32(model: Model) -> None:
    exact, fast = (sample(model, PROMPTS, SEEDS, steps=2, amp=amp) for amp in (False, True))
    assert fast.dtype == torch.float32 and not torch.equal(exact, fast)
    assert (exact - fast).abs().mean() < 0.05


def test_size_progress_and_pil(model: Model) -> None:
    side, told = model.arch.image_size, []
    images = generate(model, PROMPTS, SEEDS, steps=2, batch_size=3, size=(side, 2 * side), progress=lambda *now: told.append(now))
    assert [image.size for image in images] == [(2 * side, side)] * 4
    assert told == [(3, 8), (6, 8), (7, 8), (8, 8)]
    assert sample(model, [], []).shape == (0, 3, side, side)


def test_one_seed_per_prompt(model: Model) -> None:
    with pytest.raises(UserError, match="4 prompts and 2 seeds; give one seed for each prompt"):
        sample(model, PROMPTS, [0, 1])
