"""Regional cross-attention: each region of an image reads its own prompt, through its own edit.

MultiBooth: Towards Generating All Your Concepts in an Image from Text, Zhu et al., arXiv 2404.14239, its regional customization.

Equation
    At each place p of a layer, before its out-projection,
        o(p) = sum_r w_r(p) softmax(s q(p) K_r^T) V_r / sum_r w_r(p),    K_r = (W_k + dW_k^r) c_r,    V_r = (W_v + dW_v^r) c_r,
    over the regions r, with c_r their encoded prompts and dW^r their edits, and the background r = 0, the image's own prompt. Under
    classifier-free guidance the other half of a batch has the negative prompt for all c_r, with the same dW^r.
    w_r(p) = weight_r m_r(p), where m_r is the region's mask; w_0(p) = 1 - max_r m_r(p).
Shapes
    q: [n, T, heads * d] for T places, K_r and V_r: [L, heads * d]. The queries are made once for the whole image, K_r and V_r once for
    all steps, since they depend on neither image nor timestep. R regions add one attention to a layer, of R times the queries of the
    largest region's places.
Defaults
    weight 1 for each region: where they overlap, the mean.
Deviations
    A region has the places where its mask is above 0, and may have any shape, where the paper crops a box. The printed weights
    divide by the number of overlapping regions and sum to 1 at once; this is the plain weighted mean. A region reads its own prompt
    alone, where the paper adds the encoded base prompt to it: the sum is twice as long as what layers were trained to read. `encode` can
    do it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.attention import grid_of
from toolkit.edits.base import Edit
from toolkit.edits.chain import Chain
from toolkit.edits.token import TokenEdit
from toolkit.errors import UserError
from toolkit.model import Model
from toolkit.sample import Hook, State


@dataclass(frozen=True, eq=False)
class Region:
    """A part of the image with a prompt of its own.

    prompt: what is there. box: (x0, y0, x1, y1), in shares of the image's width and height, from its upper left corner. mask: [h, w] in
    [0, 1], in the image's proportions and at least as fine as its latent. One of both is given. edit: holds here alone; it may change
    tokens and the layers that read text. weight: against regions that overlap this one.
    """

    prompt: str
    box: tuple[float, float, float, float] | None = None
    mask: Tensor | None = None
    edit: Edit | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        where = f"region {self.prompt!r}"
        if (self.box is None) == (self.mask is None):
            raise UserError(f"{where} has {'no' if self.box is None else 'both a'} box and mask, needs one of them; give box or mask")
        if self.box is not None:
            x0, y0, x1, y1 = self.box
            if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
                raise UserError(f"{where} has box {self.box}, needs 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1; give shares of the sides")
        if self.mask is not None and (self.mask.ndim != 2 or not 0 <= self.mask.min() <= self.mask.max() <= 1 or not self.mask.any()):
            low, high = self.mask.min().item(), self.mask.max().item()
            what = f"{where} has a mask {list(self.mask.shape)} from {low:g} to {high:g}"
            raise UserError(f"{what}, needs [h, w] from 0 to 1 and not all 0; scale it, or leave the region out")
        if not self.weight > 0:
            raise UserError(f"{where} has weight {self.weight}, needs more than 0; leave the region out")
        tokens = [part for part, _ in self.parts() if isinstance(part, TokenEdit)]
        words = [word for part in tokens for word in part.tokens]
        if words and not any(word in self.prompt for word in words):
            raise UserError(f"{where} has an edit with the words {', '.join(words)} and says none of them; write one in its prompt")

    def parts(self) -> list[tuple[Edit, float]]:
        """The parts of its edit with their scales."""
        return self.edit.parts() if self.edit else []

    def change(self) -> list[Edit]:
        """What its edit changes beside tokens, as one edit or none."""
        parts = [(part, scale) for part, scale in self.parts() if not isinstance(part, TokenEdit)]
        return [Chain.of([part for part, _ in parts], [scale for _, scale in parts])] if parts else []

    def share(self, grid: tuple[int, int], latent: tuple[int, int]) -> Tensor:
        """How much of each cell of a grid is in it: [rows, columns], float32.

        The mean of the mask over the cell; at a grid of which it fills no cell, as much more as makes its fullest cell full.
        latent: rows and columns of the finest grid. A mask that does not fit them is a UserError.
        """
        if self.mask is None:
            x0, y0, x1, y1 = self.box or (0.0, 0.0, 1.0, 1.0)
            within, peak = torch.outer(_overlap(y0, y1, grid[0]), _overlap(x0, x1, grid[1])), 1.0
        else:
            (height, width), (rows, columns) = self.mask.shape, latent
            if height * columns != width * rows or height < rows:
                what = f"region {self.prompt!r} has a mask {height}x{width}, the image's latent is {rows}x{columns}"
                raise UserError(f"{what}; give a mask of the image's size")
            mask = self.mask.float().cpu()
            within, peak = F.interpolate(mask[None, None], grid, mode="area")[0, 0], mask.max()
        return within * (peak / within.max())


@dataclass(frozen=True)
class Read:
    """What rows of a batch read in some regions, by their numbers. keys, values: site -> [regions, k, heads, L, d], k is 1 or the rows."""

    numbers: list[int]
    keys: dict[str, Tensor]
    values: dict[str, Tensor]


@dataclass(frozen=True)
class Inside:
    """The places that regions have a share in, at one grid. w is w_r(p) / sum_r w_r(p) of the equation.

    places: [regions, k], their numbers, as many for each as for the largest one. shares: w there, [regions, 1, k, 1], 0 where a region has
    none. rest: [T, 1], what is left to the background.
    """

    places: Tensor
    shares: Tensor
    rest: Tensor


class Regional(Hook):
    """Regions at work in a denoiser's cross-attention; see `regional`. As a hook it is told by the sampler what a batch reads."""

    def __init__(self, model: Model, regions: Sequence[Region], encode: Callable[[list[str]], Tensor]) -> None:
        self._model, self._regions = model, regions
        self._sites: dict[str, Any] = model.arch.cross_attention_sites()
        hidden = encode([region.prompt for region in regions])
        self._prompts = self._read({number: hidden[number : number + 1] for number in range(len(regions))})
        self._others: tuple[Tensor, Read] | None = None
        self._told: tuple[list[Read | None], int] | None = None
        self._queries: dict[str, Tensor] = {}
        self._latent: tuple[int, int] = (0, 0)
        self._insides: dict[tuple[int, ...], Inside] = {}  # by the number of places, and which regions

    def on_prompt(self, state: State) -> None:
        self.tell([None if name == "prompt" else text.hidden for name, text in state.texts.items()], len(state.prompts))

    def tell(self, conditions: Sequence[Tensor | None], count: int) -> None:
        """What the rows of the next calls read: `count` rows each of these conditions, in this order.

        None is the prompt. The others, [count, L, d], are read everywhere, in each region through its edit. A call of `count` rows
        alone reads the prompt; rows after those that are told are left alone.
        """
        self._told = [self._prompts if hidden is None else self._through_edits(hidden) for hidden in conditions], count

    def hooks(self) -> list[Any]:
        """Handles of the hooks that make it act."""
        handles: list[Any] = [self._model.arch.components()["denoiser"].register_forward_pre_hook(self._begin)]
        for site, attention in self._sites.items():
            handles.append(attention.to_q.register_forward_hook(partial(self._note, site)))
            handles.append(attention.to_out[0].register_forward_pre_hook(partial(self._mix, site)))
        return handles

    def _through_edits(self, hidden: Tensor) -> Read | None:
        """Of a condition other than the prompt: only regions with changed layers read it otherwise than the background does."""
        hidden = hidden[:1] if torch.equal(hidden, hidden[:1].expand_as(hidden)) else hidden
        if self._others is None or not torch.equal(self._others[0], hidden):  # a sampler has it again for each batch
            changed = [number for number, region in enumerate(self._regions) if region.change()]
            if not changed:
                return None
            self._others = hidden, self._read(dict.fromkeys(changed, hidden))
        return self._others[1]

    @torch.no_grad()
    def _read(self, texts: dict[int, Tensor]) -> Read:
        """What regions, by their numbers, make of encoded prompts [k, L, d], each with its edit attached."""
        made: list[dict[str, tuple[Tensor, Tensor]]] = []
        for number, hidden in texts.items():
            with self._model.attached(*self._regions[number].change()):
                made.append({site: _keys_and_values(attention, hidden) for site, attention in self._sites.items()})
        keys, values = ({site: torch.stack([each[site][i] for each in made]) for site in self._sites} for i in (0, 1))
        return Read(list(texts), keys, values)

    def _begin(self, denoiser: nn.Module, given: tuple[Any, ...]) -> None:
        if self._told is None:
            raise UserError("regions are on, and the sampler does not know them; give it what `regional` yields, as in hooks=[regions]")
        rows, columns = given[0].shape[-2:]
        if (rows, columns) != self._latent:
            self._latent, self._insides = (rows, columns), {}

    def _note(self, site: str, layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        self._queries[site] = output

    def _mix(self, site: str, layer: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What the out-projection reads [n, T, heads * d]: the background's in, all regions' mixed out."""
        background, query = given[0], self._queries.pop(site)
        parts, count = self._told or ([], 0)
        if len(background) == count:
            parts = [self._prompts]
        mixed = background.clone()
        for own, new, asked, read in zip(*(x.split(count) for x in (background, mixed, query)), parts, strict=False):
            if read:
                new.copy_(self._mixed(site, read, own, asked))
        return mixed, *given[1:]

    def _mixed(self, site: str, read: Read, background: Tensor, query: Tensor) -> Tensor:
        """The equation for rows that read the same: background and query [count, T, heads * d]."""
        attention, (count, places) = self._sites[site], background.shape[:2]
        key, value = (x[site].to(query) for x in (read.keys, read.values))
        regions, texts = key.shape[:2]
        inside = self._inside(places, read.numbers, background.device)
        asked = query[:, inside.places].transpose(0, 1).reshape(regions, texts, -1, query.shape[-1])  # of the regions' own places
        asked = _heads(attention, asked).flatten(0, 1)
        seen = F.scaled_dot_product_attention(asked, key.flatten(0, 1), value.flatten(0, 1), scale=attention.scale)
        seen = seen.transpose(1, 2).reshape(regions, count, -1, query.shape[-1])
        mixed = inside.rest * background
        for where, part in zip(inside.places, inside.shares * seen, strict=True):  # one by one, so that sums have an order on any device
            mixed.index_add_(1, where, part.to(mixed))
        return mixed

    def _inside(self, places: int, numbers: list[int], device: torch.device) -> Inside:
        """Where these regions are at the grid of so many places; the others' share is the background's."""
        if (places, *numbers) not in self._insides:
            grid = grid_of(places, self._latent)
            masks = torch.stack([region.share(grid, self._latent) for region in self._regions]).flatten(1)
            weights = torch.tensor([region.weight for region in self._regions])[:, None]
            share = torch.cat([(1 - masks.amax(0, keepdim=True)).clamp(min=0), weights * masks])
            share = share / share.sum(0)
            others = [1 + number for number in range(len(self._regions)) if number not in numbers]
            rest, own = share[0] + share[others].sum(0), share[1:][numbers]  # rest is 1 exactly where none of these regions is
            most = int((own > 0).sum(1).max())
            # A smaller region asks at some other places too, where its share is 0.
            chosen = torch.argsort((own > 0).byte(), dim=1, descending=True, stable=True)[:, :most]
            shares = own.gather(1, chosen)[:, None, :, None]
            self._insides[places, *numbers] = Inside(chosen.to(device), shares.to(device), rest[:, None].to(device))
        return self._insides[places, *numbers]


@contextmanager
def regional(model: Model, regions: Sequence[Region], *, encode: Callable[[list[str]], Tensor] | None = None) -> Iterator[Regional]:
    """Within the block, the image reads these regions' prompts where they are, and its own prompt elsewhere.

        with regional(model, [Region("a <toy>", box=(0, 0, 0.5, 1), edit=toy)]) as regions:
            images = generate(model, ["a room"], [0], hooks=[regions])

    The new words of all edits are there for every prompt. The negative prompt is read everywhere, in a region through its edit, so that
    one region that is everywhere is the model with its edit attached. What reads the prompt as one vector (SDXL's pooled encoding) is
    told the image's prompt. All is as before after the block, also when it raises.

    encode: prompts -> what the layers read [n, L, d], None is as the architecture does.
    """
    if not model.arch.cross_attention_sites():
        raise UserError(f"{model.arch.name} has no cross-attention that regions could divide; load a Stable Diffusion 1, 2 or XL model")
    if not regions:
        raise UserError("no regions were given, needs at least one; give some, or sample without")
    for region in regions:
        _check(region, model)
    attached = {id(part) for edit, _ in model.edits for part, _ in edit.parts()}
    tokens = {id(part): part for region in regions for part, _ in region.parts() if isinstance(part, TokenEdit)}
    with ExitStack() as stack:
        stack.enter_context(model.attached(*(part for key, part in tokens.items() if key not in attached)))
        acting = Regional(model, regions, encode or (lambda prompts: model.arch.encode(prompts).hidden))
        for handle in acting.hooks():
            stack.callback(handle.remove)
        yield acting


def _check(region: Region, model: Model) -> None:
    """Whether its edit can hold in it alone."""
    readers = {f"{site}.weight" for site in model.arch.text_linears()}
    for part, _ in region.parts():
        known = readers & set(part.parameter_names())
        other = [site for site in part.sites() if site not in known and not isinstance(part, TokenEdit)]
        if other:
            what = f"the {part.kind()} edit of region {region.prompt!r} changes {other[0]} ({len(other)} such), which the whole image reads"
            raise UserError(f"{what}; a region's may change tokens and the layers that read text: attach it to the model instead")


def _keys_and_values(attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Of encoded prompts [n, L, d], each [n, heads, L, d']."""
    given = hidden.to(attention.to_k.weight)
    return _heads(attention, attention.to_k(given)), _heads(attention, attention.to_v(given))


def _heads(attention: Any, rows: Tensor) -> Tensor:
    """[..., T, heads * d] -> [..., heads, T, d]."""
    return rows.unflatten(-1, (attention.heads, -1)).transpose(-3, -2)


def _overlap(low: float, high: float, cells: int) -> Tensor:
    """How much of each of so many cells is between two shares of the side: [cells]."""
    start = torch.arange(cells)
    return (torch.clamp(start + 1, max=high * cells) - torch.clamp(start, min=low * cells)).clamp(min=0)
