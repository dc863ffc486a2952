"""Control of words: where an image may read a word of its prompt, and how strongly.

Prompt-to-Prompt Image Editing with Cross Attention Control, Hertz et al., arXiv 2208.01626, its attention re-weighting.

Equation
    P = softmax(s q k^T) at a place p of a layer, for a token j, becomes
        P'(p, j) = c_j m_j(p) P(p, j) / sum_i m_i(p) P(p, i),
    with m_j(p) how much of p is in the word's area (1 everywhere without one, 0 everywhere when it is suppressed) and c_j its weight, both
    1 for tokens of no word. The layer's out-projection reads P' V. Only the prompt's half of a batch is changed under guidance.
Shapes
    P: [n, heads, T, L] for T places and L tokens. Only layers of cross-attention are changed; each makes P once more than without.
Defaults
    None: a word is given an area, suppressed, or given a weight.
Deviations
    The paper's weights, from -2 to 2, are multiplied in after the softmax, and so they are here: P' does not add up to 1 then. Areas act
    before it, on the scores, so that the rest is renormalised and nothing of the word is left; the paper has no such control. The paper
    changes an image that was drawn before; here there is only the one image, at all steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.attention.regional import Region
from toolkit.attention import AttentionMaps, attention_maps, grid_of, token_places
from toolkit.errors import UserError
from toolkit.model import Model
from toolkit.sample import Hook, State


@dataclass(frozen=True, eq=False)
class Word:
    """A word of the prompt, or several in a row, and what is asked of it.

    box or mask: where alone it may be read, as in `Region`. suppress: it is read nowhere. weight: by how much the attention to it is
    multiplied.
    """

    word: str
    box: tuple[float, float, float, float] | None = None
    mask: Tensor | None = None
    suppress: bool = False
    weight: float | None = None

    def __post_init__(self) -> None:
        has_area = self.box is not None or self.mask is not None
        if has_area:
            self.area()
        if not has_area and not self.suppress and self.weight is None:
            raise UserError(f"word {self.word!r} has no box, mask, suppress or weight; give one of them")
        if self.suppress and (has_area or self.weight is not None):
            raise UserError(f"word {self.word!r} is suppressed, and a box, mask or weight has no effect then; leave them out")

    def area(self) -> Region:
        """Where it may be read, when it has a box or a mask."""
        return Region(self.word, box=self.box, mask=self.mask)

    def share(self, grid: tuple[int, int], latent: tuple[int, int]) -> Tensor:
        """How much of each place it may be read at [places], see `Region.share`."""
        if self.box is not None or self.mask is not None:
            return self.area().share(grid, latent).flatten()
        return torch.full((grid[0] * grid[1],), 0.0 if self.suppress else 1.0)

    def times(self) -> float:
        """Its weight."""
        return 1.0 if self.weight is None else self.weight


class Controlled(Hook):
    """Words at work in a denoiser's cross-attention; see `controlled`. As a hook it is told by the sampler what a batch reads."""

    def __init__(self, model: Model, words: Sequence[Word], maps: AttentionMaps) -> None:
        self._model, self._words, self._maps = model, words, maps
        self._sites: dict[str, Any] = model.arch.cross_attention_sites()
        self._values: dict[str, Tensor] = {}
        self._told: tuple[list[Tensor | None], Tensor, int] | None = None
        self._latent: tuple[int, int] = (0, 0)
        self._shares: dict[int, Tensor] = {}  # by the number of places

    def on_prompt(self, state: State) -> None:
        self.tell([state.prompts if name == "prompt" else None for name in state.texts], len(state.prompts))

    def tell(self, conditions: Sequence[Sequence[str] | None], count: int) -> None:
        """What the rows of the next calls read: `count` rows each of these conditions, in this order.

        One of them is given as its prompts; None is left alone, as rows are after those that are told. A call of `count` rows alone reads
        the prompts. A prompt that does not say one of the words is a UserError.
        """
        found = [None if prompts is None else self._tokens(prompts) for prompts in conditions]
        (own,) = [tokens for tokens in found if tokens is not None]
        self._told = found, own, count

    def hooks(self) -> list[Any]:
        """Handles of the hooks that make it act. What others do before the out-projection, they do with what it gives."""
        handles: list[Any] = [self._model.arch.components()["denoiser"].register_forward_pre_hook(self._begin)]
        for site, attention in self._sites.items():
            handles.append(attention.to_v.register_forward_hook(partial(self._note, site)))
            handles.append(attention.to_out[0].register_forward_pre_hook(partial(self._change, site), prepend=True))
        return handles

    def _tokens(self, prompts: Sequence[str]) -> Tensor:
        """Which of the prompts' tokens each word has [n, words, L]."""
        found = torch.stack([token_places(self._model.arch, prompts, [word.word] * len(prompts)) for word in self._words], 1)
        for prompt, says in zip(prompts, found.any(-1), strict=True):
            for word, said in zip(self._words, says.tolist(), strict=True):
                if not said:
                    raise UserError(f"prompt {prompt!r} does not say {word.word!r}; give words that every prompt says")
        return found

    def _begin(self, denoiser: nn.Module, given: tuple[Any, ...]) -> None:
        if self._told is None:
            raise UserError("words are controlled, and the sampler does not know; give it what `controlled` yields, as in hooks=[words]")
        rows, columns = given[0].shape[-2:]
        if (rows, columns) != self._latent:
            self._latent, self._shares = (rows, columns), {}

    def _note(self, site: str, layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        self._values[site] = output

    def _change(self, site: str, layer: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What the out-projection reads [n, places, heads * d]."""
        plain, value = given[0], self._values.pop(site)
        conditions, own, count = self._told or ([], torch.empty(0), 0)
        if len(plain) == count:
            conditions = [own]
        changed = plain.clone()
        for number, tokens in enumerate(conditions):
            rows = slice(number * count, (number + 1) * count)
            if tokens is not None and len(plain) >= rows.stop:
                changed[rows] = self._read(site, plain[rows], value[rows], self._maps.scores(site, rows), tokens)
        self._maps.forget(site)
        return changed, *given[1:]

    def _read(self, site: str, plain: Tensor, value: Tensor, scores: Tensor, tokens: Tensor) -> Tensor:
        """The equation for rows with these words. Where nothing is asked of a place it stays as it is, to the bit."""
        share = self._share(plain.shape[1], plain.device)  # [words, places]
        spoken = tokens.to(plain.device, torch.float32)
        within = (1 + spoken[:, :, None] * (share[:, :, None] - 1)).prod(1)  # m: [n, places, L]
        weights = torch.tensor([word.times() for word in self._words], device=plain.device)
        times = (1 + spoken * (weights[:, None] - 1)).prod(1)  # c: [n, L]
        seen = controlled_probabilities(scores, within, times).to(value)
        heads = value.unflatten(-1, (self._sites[site].heads, -1)).transpose(1, 2)
        changed = (seen @ heads).transpose(1, 2).flatten(2)
        asked = (within != 1).any(-1) | (times != 1).any(-1)[:, None]
        return torch.where(asked[..., None], changed, plain)

    def _share(self, places: int, device: torch.device) -> Tensor:
        if places not in self._shares:
            grid = grid_of(places, self._latent)
            self._shares[places] = torch.stack([word.share(grid, self._latent) for word in self._words]).to(device)
        return self._shares[places]


def controlled_probabilities(scores: Tensor, within: Tensor, times: Tensor) -> Tensor:
    """P' of the equation, [n, heads, places, L], float32, from scores s q k^T of this shape, m [n, places, L] and c [n, L]."""
    return (scores.float() + within.log()[:, None]).softmax(-1) * times[:, None, None]


@contextmanager
def controlled(model: Model, words: Sequence[Word]) -> Iterator[Controlled]:
    """Within the block, the image reads these words of its prompt where they are allowed, and as strongly as they are weighted.

        with controlled(model, [Word("cat", box=(0, 0, 0.5, 1)), Word("red", weight=2)]) as words:
            images = generate(model, ["a red cat and a dog"], [0], hooks=[words])

    Every prompt that is sampled says every word; all places where it says it are meant. Other conditions, such as the negative prompt, are
    left alone. With regions, it is the image's own prompt that is controlled. All is as before after the block, also when it raises.
    """
    if not words:
        raise UserError("no words were given, needs at least one; give some, or sample without")
    with ExitStack() as stack:
        acting = Controlled(model, words, stack.enter_context(attention_maps(model.arch)))
        for handle in acting.hooks():
            stack.callback(handle.remove)
        yield acting
