"""Heat maps: where the words of a prompt are attended to while its image is drawn.

What the DAAM: Interpreting Stable Diffusion Using Cross Attention, Tang et al., arXiv 2210.04885.

Equation
    h_w(p) = 1/|S| sum_s max(0, up( 1/(T H) sum_t sum_h sum_j softmax(q k^T / sqrt(d))_{p, j} ))(p),
    over the layers s, the steps t, the heads h and the tokens j of the word w; up enlarges a layer's map to one size, bicubically.
Shapes
    A layer's map has a value for each of its places, h_w is at the latent's, or at any size that is asked for. Kept are float32 values
    on the CPU, 4 * groups * columns * places bytes for each image, with the places of all layers and a column for each of the given
    words, or without words for each of the tokens (77): the steps do not count. For Stable Diffusion 1 at 512 pixels, 26 944 places,
    that is 108 kB for a word and 8.3 MB for all tokens, for SDXL at 1024, 102 400 places, 410 kB and 32 MB. On the device nothing stays:
    a layer's probabilities [n, heads, places, tokens] are let go of before the next layer is computed.
Defaults
    All layers, and one group of all steps, as in the paper. Only the prompt's half of a batch counts under guidance.
Deviations
    Heads are averaged before they are enlarged, and what the cubic undershoots is cut off then: enlarging is linear, so this differs
    where a single head's map undershoots, and takes a heads-th of the memory. The official code leaves out layers whose side is an
    eighth of the latent's; give the others as `sites` for that. A word's tokens are summed, where it takes their mean: the same map up
    to a factor, which shares of attention should have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.attention import AttentionMaps, attention_maps, grid_of, token_places
from toolkit.errors import UserError, unknown
from toolkit.sample import Hook, State

if TYPE_CHECKING:
    from toolkit.model import Model


@dataclass
class Batch:
    """What was seen while a batch of n images was drawn.

    prompts: theirs. latent: rows and columns. columns: which tokens each word has, [n, words, L], or None, where each token is by itself.
    means: site -> [groups, n, columns, places]. counts: site -> the steps of each group so far.
    """

    prompts: Sequence[str]
    latent: tuple[int, int]
    columns: Tensor | None
    means: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, list[int]] = field(default_factory=dict)


class HeatMaps(Hook):
    """Running means of cross-attention's probabilities for every image that is sampled with this hook; see `heat_maps`."""

    def __init__(self, model: Model, maps: AttentionMaps, words: Sequence[str], groups: int) -> None:
        self.words, self.groups = tuple(words), groups
        self._model, self._maps = model, maps
        self._batches: list[Batch] = []

    def on_prompt(self, state: State) -> None:
        each = [token_places(self._model.arch, state.prompts, [word] * len(state.prompts)) for word in self.words]
        rows, columns = state.latents.shape[-2:]
        self._batches.append(Batch(list(state.prompts), (rows, columns), torch.stack(each, 1) if each else None))

    def on_attention(self, state: State, site: str, attention: nn.Module, output: Tensor) -> None:
        if site not in self._maps.sites:
            return
        batch, count = self._batches[-1], len(state.prompts)
        first = list(state.texts).index("prompt") * count
        seen = self._maps.probabilities(site, slice(first, first + count)).float().mean(1)  # [n, places, L]
        self._maps.forget(site)
        words = batch.columns.unbind(1) if batch.columns is not None else ()
        kept = (torch.stack([(seen * own[:, None]).sum(-1) for own in words], 1) if words else seen.mT).cpu()
        if site not in batch.means:
            batch.means[site], batch.counts[site] = torch.zeros(self.groups, *kept.shape), [0] * self.groups
        group, counts = state.step * self.groups // state.steps, batch.counts[site]
        counts[group] += 1
        batch.means[site][group].lerp_(kept, 1 / counts[group])

    @property
    def bytes(self) -> int:
        """What is kept of all images so far."""
        return sum(mean.nbytes for batch in self._batches for mean in batch.means.values())

    @property
    def sites(self) -> list[str]:
        """The layers that were seen."""
        return list(self._batches[0].means) if self._batches else []

    def mean(self, image: int, site: str, group: int | None = None) -> Tensor:
        """A layer's means for an image, counted over all calls of the sampler: [columns, places], of a group of steps or of all (None).

        The columns are the words, or the prompt's tokens.
        """
        batch, row = self._at(image)
        if site not in batch.means:
            raise unknown("layer", site, batch.means)
        if group is not None:
            return batch.means[site][group, row]
        weights = torch.tensor(batch.counts[site], dtype=torch.float32)
        return torch.einsum("g,gcp->cp", weights / weights.sum(), batch.means[site][:, row])

    def of(
        self,
        word: str,
        image: int = 0,
        *,
        size: tuple[int, int] | None = None,
        sites: Sequence[str] | None = None,
        group: int | None = None,
    ) -> Tensor:
        """The heat map of a word for an image, [rows, columns], float32.

        size: None is the latent's. sites: None is all. A word that the prompt does not say, or that was not asked for, is a UserError.
        """
        batch, row = self._at(image)
        if self.words and word not in self.words:
            raise unknown("word of these heat maps", word, self.words)
        says = token_places(self._model.arch, [batch.prompts[row]], [word])[0].cpu()
        if not says.any():
            raise UserError(f"prompt {batch.prompts[row]!r} does not say {word!r}, whose heat map is asked for; give a word that it says")
        each = []
        for site in batch.means if sites is None else sites:
            mean = self.mean(image, site, group)
            one = mean[self.words.index(word)] if self.words else mean[says].sum(0)
            grid = one.view(1, 1, *grid_of(len(one), batch.latent))
            each.append(F.interpolate(grid, size or batch.latent, mode="bicubic").clamp(min=0))
        return torch.stack(each).mean(0)[0, 0]

    def _at(self, image: int) -> tuple[Batch, int]:
        row = image
        for batch in self._batches:
            if 0 <= row < len(batch.prompts):
                return batch, row
            row -= len(batch.prompts)
        raise IndexError(f"image {image} of {sum(len(batch.prompts) for batch in self._batches)}")


@contextmanager
def heat_maps(model: Model, words: Sequence[str] = (), *, groups: int = 1, sites: Sequence[str] | None = None) -> Iterator[HeatMaps]:
    """Within the block, what cross-attention attends to for the images that are sampled with the hook.

        with heat_maps(model, ["cat"]) as maps:
            image, *_ = generate(model, ["a cat"], [0], hooks=[maps])
        overlay(image, maps.of("cat")).save("cat.png")

    words: of which maps are kept, one for each; none keeps one for each token. groups: into how many parts of nearly equal length the
    steps are divided. sites: as in `attention_maps`; cross-attention's alone. What is done to a layer's probabilities on top of its
    queries and keys, such as control of words, is not in its maps.
    """
    if groups < 1:
        raise UserError(f"groups is {groups}, needs at least 1; give a larger number")
    known = model.arch.cross_attention_sites()
    for site in sites or ():
        if site not in known:
            raise unknown("cross-attention", site, known)
    with attention_maps(model.arch, sites) as maps:
        yield HeatMaps(model, maps, words, groups)
