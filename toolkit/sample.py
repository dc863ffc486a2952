"""The sampler: one deterministic loop that drives every architecture, with hooks.

The initial noise of an image depends on its prompt and its seed only, so the same pair gives the same image (up to
floating-point rounding) at any batch size, position or process, and the same noise for a model and its edited version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from toolkit.arch.text import Text
from toolkit.errors import UserError
from toolkit.images import to_pil
from toolkit.runs import report, seeded

if TYPE_CHECKING:
    from PIL import Image

    from toolkit.model import Model


@dataclass
class State:
    """One batch of n images while it is sampled. Hooks read it and may replace any of its fields.

    texts: condition -> encoded prompts (n rows each): "prompt", "negative" under guidance, and what hooks add; all are
    predicted in one call, in this order. guidance [n, 1, 1, 1]: classifier-free guidance scale, or the one that a distilled
    denoiser reads. latents [n, c, h', w'] float32; t: the timestep; step: its index, out of steps. outputs: condition ->
    denoiser output; output: the guided one.
    """

    model: Model
    prompts: Sequence[str]
    seeds: Sequence[int]
    texts: dict[str, Text]
    guidance: Tensor
    latents: Tensor
    steps: int
    step: int = 0
    t: Tensor = field(default_factory=lambda: torch.zeros(()))
    outputs: dict[str, Tensor] = field(default_factory=dict)
    output: Tensor = field(default_factory=lambda: torch.zeros(()))

    @property
    def timesteps(self) -> Tensor:
        """The timestep for every image [n]."""
        return self.t.expand(len(self.latents)).to(self.latents.device)

    def to_eps(self, output: Tensor) -> Tensor:
        """The noise that a denoiser output implies here, for hooks that are stated in noise."""
        return self.model.arch.to_eps(output, self.latents, self.timesteps)

    def to_x0(self, output: Tensor) -> Tensor:
        """The clean latents that a denoiser output implies here."""
        return self.model.arch.to_x0(output, self.latents, self.timesteps)


class Hook:
    """Changes what sampling does. Override what you need."""

    def on_prompt(self, state: State) -> None:
        """Before the first step: `state.texts`, `guidance` and the initial `latents` are set."""

    def on_attention(self, state: State, site: str, attention: nn.Module, output: Tensor) -> Tensor | None:
        """After an attention module of `arch.attention_sites()`, with its output [conditions * n, tokens, d].

        Where a module has an output for the image and one for the text, it is the image's, and the text's stays; where one
        holds both, the text's tokens come first. Returns what replaces the output, or None. Called only for hooks that
        override it.
        """

    def on_prediction(self, state: State) -> None:
        """After the denoiser: `state.outputs` and the guided `state.output` are set."""

    def on_step(self, state: State) -> None:
        """After the scheduler's step: `state.latents` are the next ones."""


@torch.no_grad()
def sample(
    model: Model,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = 20,
    guidance: float | None = None,
    negative: str = "",
    hooks: Sequence[Hook] = (),
    batch_size: int | None = None,
    size: int | tuple[int, int] | None = None,
    progress: Callable[[int, int], object] | None = None,
    amp: bool = False,
) -> Tensor:
    """Images [n, 3, h, w] in [0, 1], float32 on the CPU: one for each prompt with its seed.

    guidance: classifier-free guidance scale, None is the model's own; 1 skips the second prediction and ignores `negative`.
    A denoiser that is distilled reads the scale itself: no second prediction, and a negative prompt is a UserError.
    batch_size: images at once; None is 64, and fewer above 128 pixels. size: pixels, a side or (height, width); None is the
    model's own. progress: called with (image steps done, in total) after every step. amp: bfloat16 autocast around the
    denoiser and the decoder.
    """
    height, width = _height_and_width(model, size)
    parts = []
    for state in _denoised(model, prompts, seeds, steps, steps, guidance, negative, hooks, batch_size, (height, width), progress, amp):
        with _autocast(state, amp):
            pixels = model.arch.decode_latents(state.latents)
        parts.append((pixels.float() / 2 + 0.5).clamp(0, 1).cpu())
    return torch.cat(parts) if parts else torch.zeros(0, 3, height, width)


@torch.no_grad()
def trajectory(
    model: Model,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float | None = None,
    hooks: Sequence[Hook] = (),
    progress: Callable[[int, int], object] | None = None,
    amp: bool = False,
) -> Tensor:
    """Latents [n, c, h', w'] of the images that `sample` gives with these options, not decoded: for what hooks see on the way."""
    shape = _height_and_width(model, None)
    states = _denoised(model, prompts, seeds, steps, steps, guidance, "", hooks, None, shape, progress, amp)
    return torch.cat([state.latents for state in states])


@torch.no_grad()
def partly_denoised(
    model: Model,
    prompts: Sequence[str],
    seeds: Sequence[int],
    done: Sequence[int],
    *,
    steps: int = 50,
    guidance: float | None = None,
    batch_size: int | None = None,
    amp: bool = False,
) -> tuple[Tensor, Tensor]:
    """Latents [n, c, h', w'] float32 that have made so many of `steps` steps, and the timesteps [n] at which they are to be read.

    done: of each prompt with its seed, from 0 (noise) to steps - 1. All are sampled together, as far as the furthest of a batch
    goes. Other options as in `sample`.
    """
    if not prompts or min(done) < 0 or max(done) >= steps:
        raise ValueError(f"steps done are {list(done)}, need one from 0 to {steps - 1} for each prompt")
    shape = _height_and_width(model, None)
    reached = _Reached(done)
    for _ in _denoised(model, prompts, seeds, steps, max(done), guidance, "", [reached], batch_size, shape, None, amp):
        pass
    times = model.arch.scheduler(steps, model.arch.latent_shape(*shape)).timesteps
    return torch.stack([reached.latents[row] for row in range(len(prompts))]), times[torch.tensor(done, device=times.device)]


class _Reached(Hook):
    """Keeps the latents of each image when it has made so many steps."""

    def __init__(self, done: Sequence[int]) -> None:
        self.done, self.latents, self.first, self.count = done, dict[int, Tensor](), 0, 0

    def on_prompt(self, state: State) -> None:
        self.first, self.count = self.first + self.count, len(state.prompts)
        self._keep(state, 0)

    def on_step(self, state: State) -> None:
        self._keep(state, state.step + 1)

    def _keep(self, state: State, done: int) -> None:
        for row in range(self.count):
            if self.done[self.first + row] == done:
                self.latents[self.first + row] = state.latents[row].clone()


def _height_and_width(model: Model, size: int | tuple[int, int] | None) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size or (model.arch.image_size, model.arch.image_size)


def _denoised(
    model: Model,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    until: int,
    guidance: float | None,
    negative: str,
    hooks: Sequence[Hook],
    batch_size: int | None,
    size: tuple[int, int],
    progress: Callable[[int, int], object] | None,
    amp: bool,
) -> Iterator[State]:
    """Batch by batch, after `until` of the steps."""
    if len(prompts) != len(seeds):
        raise UserError(f"{len(prompts)} prompts and {len(seeds)} seeds; give one seed for each prompt")
    if not prompts:
        return
    arch = model.arch
    batch_size = batch_size or max(1, min(64, 2**20 // (size[0] * size[1])))
    guidance = model.guidance if guidance is None else guidance
    if arch.distilled_guidance and negative:
        raise UserError(f"negative prompt {negative!r} for {arch.name}, which is guided without a second prediction; leave it out")
    guided = guidance != 1.0 and not arch.distilled_guidance
    shape = arch.latent_shape(*size)
    rows, text = _encode_once(model, prompts, batch_size)
    opposite = arch.encode_negative([negative]) if guided else None
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        count = len(prompts[part])
        texts = {"prompt": text[rows[part]]}
        if opposite is not None:
            texts["negative"] = opposite[torch.zeros(count, dtype=torch.long)]
        scheduler = arch.scheduler(steps, shape)  # multistep schedulers keep a history, so each batch has its own
        state = State(
            model=model,
            prompts=prompts[part],
            seeds=seeds[part],
            texts=texts,
            guidance=torch.full((count, 1, 1, 1), float(guidance), device=arch.device),
            latents=noise(prompts[part], seeds[part], shape).to(arch.device),
            steps=steps,
        )
        for hook in hooks:
            hook.on_prompt(state)
        with _attention_hooks(state, hooks):
            for step, t in enumerate(scheduler.timesteps[:until]):
                state.step, state.t = step, t
                _advance(state, scheduler, hooks, amp)
                done, total = start * until + (step + 1) * count, len(prompts) * until
                if progress:
                    progress(done, total)
                else:
                    report("draw", done, total)
        yield state


def generate(model: Model, prompts: Sequence[str], seeds: Sequence[int], **options: Any) -> list[Image.Image]:
    """`sample` as PIL images; takes the same options."""
    return to_pil(sample(model, prompts, seeds, **options))


def noise(prompts: Sequence[str], seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal noise [n, *shape] float32 on the CPU, each row keyed by its prompt and seed only."""
    return torch.stack([torch.randn(*shape, generator=seeded(p, s)) for p, s in zip(prompts, seeds, strict=True)])


def _encode_once(model: Model, prompts: Sequence[str], batch_size: int) -> tuple[Tensor, Text]:
    """Encodes each distinct prompt once. Returns the row of each given prompt, and the encoded distinct prompts."""
    distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
    unique = list(distinct)
    text = Text.cat([model.arch.encode(unique[i : i + batch_size]) for i in range(0, len(unique), batch_size)])
    return torch.tensor([distinct[prompt] for prompt in prompts]), text


def _advance(state: State, scheduler: Any, hooks: Sequence[Hook], amp: bool) -> None:
    """One step: predict every condition, guide, let the scheduler step."""
    state.outputs = _predict(state, amp)
    state.output = state.outputs["prompt"]
    if "negative" in state.outputs:
        negative = state.outputs["negative"]
        state.output = negative + state.guidance * (state.output - negative)
    for hook in hooks:
        hook.on_prediction(state)
    state.latents = scheduler.step(state.output, state.t, state.latents).prev_sample
    for hook in hooks:
        hook.on_step(state)


def _predict(state: State, amp: bool) -> dict[str, Tensor]:
    """The denoiser's output for every condition, in one batched call."""
    arch, count = state.model.arch, len(state.texts)
    text = Text.cat(list(state.texts.values()))
    if arch.distilled_guidance:
        text = replace(text, guidance=state.guidance.flatten().repeat(count))
    with _autocast(state, amp):
        output = arch.predict(state.latents.repeat(count, 1, 1, 1), state.timesteps.repeat(count), text)
    return dict(zip(state.texts, output.to(state.latents).chunk(count), strict=True))


def _autocast(state: State, amp: bool) -> torch.autocast:
    return torch.autocast(state.latents.device.type, torch.bfloat16, enabled=amp)


@contextmanager
def _attention_hooks(state: State, hooks: Sequence[Hook]) -> Iterator[None]:
    """Forward hooks on the attention modules while the batch runs, for those hooks that override `on_attention`."""
    with ExitStack() as registered:
        for hook in hooks:
            if type(hook).on_attention is Hook.on_attention:
                continue
            for site, module in state.model.arch.attention_sites().items():

                def after(module: nn.Module, _: Any, output: Any, hook: Hook = hook, site: str = site) -> Any:
                    if isinstance(output, Tensor):
                        return hook.on_attention(state, site, module, output)
                    image, *text = output
                    replaced = hook.on_attention(state, site, module, image)
                    return None if replaced is None else (replaced, *text)

                handle = module.register_forward_hook(after)
                registered.callback(handle.remove)
        yield
