"""What cross-attention attends to: its probabilities, read while the denoiser predicts.

Nothing is replaced. Hooks on the projections note queries and keys, and probabilities are computed of them for who asks, so that
capture works beside any attention implementation, keeps the graph, and costs nothing when it is off.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.errors import UserError

if TYPE_CHECKING:
    from toolkit.arch.base import Architecture


class AttentionMaps:
    """Queries and keys of the last prediction by site."""

    def __init__(self, sites: dict[str, Any]) -> None:
        self._sites = sites
        self._queries: dict[str, Tensor] = {}
        self._keys: dict[str, Tensor] = {}

    @property
    def sites(self) -> list[str]:
        """Where attention is read, in the order of the denoiser."""
        return list(self._queries)

    def scores(self, site: str, rows: slice = slice(None)) -> Tensor:
        """scale q k^T, [n, heads, queries, tokens], with the graph where the prediction had one. rows: these alone."""
        attention, query, key = self._sites[site], self._queries[site][rows], self._keys[site][rows]
        query, key = (x.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for x in (query, key))
        if attention.upcast_attention:
            query, key = query.float(), key.float()
        return attention.scale * query @ key.transpose(-1, -2)

    def probabilities(self, site: str, rows: slice = slice(None)) -> Tensor:
        """softmax of the scores, [n, heads, queries, tokens]."""
        return self.scores(site, rows).softmax(-1)

    def forget(self, site: str) -> None:
        """Let go of a site's queries and keys, until the next prediction."""
        del self._queries[site], self._keys[site]

    def near(self, side: int, sites: Iterable[str] | None = None) -> list[str]:
        """Those of the sites, None is all, whose maps have sides nearest to this: the square root of their places."""
        places = {site: self._queries[site].shape[1] for site in sites or self.sites}
        nearest = min(places.values(), key=lambda count: (abs(math.log(math.sqrt(count) / side)), -count))
        return [site for site, count in places.items() if count == nearest]

    def mean(self, sites: Sequence[str], rows: slice = slice(None)) -> Tensor:
        """Probabilities [n, queries, tokens], mean over the heads of all of these sites, whose maps are of one size."""
        return torch.stack([self.probabilities(site, rows).mean(1) for site in sites]).mean(0)

    def of_tokens(self, tokens: Tensor, size: tuple[int, int], *, sites: Iterable[str] | None = None) -> Tensor:
        """Where these tokens are attended to [n, *size]: their probabilities, summed, mean over heads and sites.

        tokens: [n, L], True for those of each prompt. size: rows and columns of the map, in the latent's proportions; maps of
        coarser sites are enlarged, bilinearly.
        """
        each = []
        for site in sites or self.sites:
            seen = self.probabilities(site).mean(1)
            one = (seen * tokens[:, None].to(seen)).sum(-1)
            each.append(F.interpolate(one.unflatten(1, grid_of(one.shape[1], size))[:, None], size, mode="bilinear")[:, 0])
        return torch.stack(each).mean(0)

    def _hooks(self, site: str) -> tuple[Any, Any]:
        def of(place: dict[str, Tensor]) -> Any:
            def note(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
                place[site] = output

            return note

        return of(self._queries), of(self._keys)


@contextmanager
def attention_maps(arch: Architecture, sites: Sequence[str] | None = None) -> Iterator[AttentionMaps]:
    """Within the block, what cross-attention attends to in the last prediction.

    sites: None is all of `arch.cross_attention_sites()`; given ones may be self-attention too, whose maps have a token for each place
    (`self_attention_sites`). A family that has no cross-attention is a UserError.
    """
    known = arch.cross_attention_sites()
    if not known:
        raise UserError(f"{arch.name} has no cross-attention whose maps could be read; load a Stable Diffusion 1, 2 or XL model")
    known = arch.attention_sites() if sites is not None else known
    chosen = {site: known[site] for site in (known if sites is None else sites)}
    maps, handles = AttentionMaps(chosen), []
    try:
        for site, attention in chosen.items():
            layers: tuple[Any, Any] = (attention.to_q, attention.to_k)
            handles += [layer.register_forward_hook(hook) for layer, hook in zip(layers, maps._hooks(site), strict=True)]
        yield maps
    finally:
        for handle in handles:
            handle.remove()


def self_attention_sites(arch: Architecture) -> list[str]:
    """Where places of the image attend to one another."""
    cross = arch.cross_attention_sites()
    return [site for site in arch.attention_sites() if site not in cross]


def token_mask(arch: Architecture, prompts: Sequence[str], words: Sequence[str]) -> Tensor:
    """[n, L], True where a prompt's tokens are those of its words, at every place where they occur.

    words: one for each prompt. A prompt without its words is a ValueError.
    """
    mask = token_places(arch, prompts, words)
    for prompt, word, found in zip(prompts, words, mask.any(1).tolist(), strict=True):
        if not found:
            raise ValueError(f"prompt {prompt!r} does not contain {word!r}")
    return mask


def token_places(arch: Architecture, prompts: Sequence[str], words: Sequence[str]) -> Tensor:
    """The same; a prompt without its words has none."""
    (whole, *_), (alone, *_) = (arch.text_streams()["hidden"].segments(arch.encode(texts)) for texts in (prompts, words))
    if whole.ids is None or alone.ids is None:
        raise ValueError(f"{arch.name} reads no tokens")
    mask = torch.zeros_like(whole.ids, dtype=torch.bool)
    for row in range(len(mask)):
        sought, said = alone.ids[row, alone.leading : int(alone.length[row]) - 1], whole.ids[row, : int(whole.length[row]) - 1]
        if not 0 < len(sought) <= len(said):
            continue
        places = said.unfold(0, len(sought), 1).eq(sought).all(1).nonzero().flatten()
        mask[row, (places[:, None] + torch.arange(len(sought), device=places.device)).flatten()] = True
    return mask


def grid_of(queries: int, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of so many places in the proportions of `size`, which each level of a denoiser halves, rounding up."""
    rows, columns = size
    while rows * columns > queries:
        rows, columns = math.ceil(rows / 2), math.ceil(columns / 2)
    if rows * columns != queries:
        raise ValueError(f"{queries} places are no halving of {size[0]}x{size[1]}")
    return rows, columns
