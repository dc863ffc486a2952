"""New words that every layer reads in its own way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.edits.base import EditInfo, Words, frozen
from toolkit.edits.token import TokenEdit
from toolkit.errors import UserError

if TYPE_CHECKING:
    from toolkit.arch.base import Architecture
    from toolkit.arch.text import Text
    from toolkit.model import Model

Rows = Mapping[str, Mapping[str, Mapping[str, Tensor]]]


@dataclass(frozen=True, eq=False)
class LayerTokenEdit(Words):
    """New words with embedding rows for each cross-attention: the space P+ (Voynov et al., arXiv 2303.09522).

    tokens: word -> component -> site of `Architecture.cross_attention_sites` -> rows [k, d]; all sites of the model, with one k.

    Attached, the tokenizers know the words, and their rows in the embedding are the means over the sites. `Architecture.predict` tells
    the prompts; those that say one of the words are encoded once for each site, with its rows, and the site's layers read that. It is
    kept for as long as the same prompts are predicted with, and several edits of this kind are encoded together. Prompts are known by
    their token ids. What reads an encoded prompt in any other way reads the means: a pooled encoding, regions, a diffusers pipeline.

    File: one tensor `<component>:<token>|<site>` each.
    """

    tokens: Rows

    mergeable: ClassVar[bool] = False  # no embedding has several rows for a word
    scalable: ClassVar[bool] = False
    exports: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for token, parts in self.tokens.items():
            shapes = {component: {tuple(rows.shape) for rows in sites.values()} for component, sites in parts.items()}
            if uneven := [component for component, given in shapes.items() if len(given) != 1]:
                what = f"rows of {uneven[0]}:{token} have the shapes {sorted(shapes[uneven[0]])}"
                raise UserError(f"{what}, need one for all layers; fit or download it again")
        self.mean()  # which looks at the rest

    @classmethod
    def from_rows(cls, tokens: Rows, info: EditInfo | None = None) -> Self:
        """From word -> component -> site -> rows [k, d]. Kept in float32, on the CPU."""
        kept = {
            token: {part: {site: frozen(rows) for site, rows in sites.items()} for part, sites in parts.items()}
            for token, parts in tokens.items()
        }
        return cls(info or EditInfo(triggers=tuple(kept)), kept)

    def mean(self) -> TokenEdit:
        """The words with the mean of each one's rows over the sites."""

        def mean(sites: Mapping[str, Tensor]) -> Tensor:
            return torch.stack([sites[site] for site in sorted(sites)]).double().mean(0).float()  # of equal rows exactly these

        means = {token: {part: mean(sites) for part, sites in parts.items()} for token, parts in self.tokens.items()}
        return TokenEdit.from_rows(means, self.info)

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"{part}:{token}|{site}": rows
            for token, parts in self.tokens.items()
            for part, sites in parts.items()
            for site, rows in sites.items()
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], info: EditInfo) -> Self:
        tokens: dict[str, dict[str, dict[str, Tensor]]] = {}
        for key, rows in tensors.items():
            owner, bar, site = key.rpartition("|")
            component, colon, token = owner.partition(":")
            if not bar or not colon:
                raise UserError(f"layer_token edit has a tensor {key!r} that names no token and layer; fit or download it again")
            tokens.setdefault(token, {}).setdefault(component, {})[site] = rows
        return cls(info, tokens)

    def enter(self, model: Model, scale: float = 1.0) -> tuple[Any, PerLayer]:
        """Extend tokenizers and embeddings, and listen. Nothing is changed when it raises."""
        sites, words = list(model.arch.cross_attention_sites()), word_counts(model.arch)
        for token, parts in self.tokens.items():
            for component, given in parts.items():
                if given.keys() != set(sites):
                    what = f"rows of {component}:{token} are for {len(given)} layers, {len(given.keys() & set(sites))} of which are among"
                    what = f"{what} the {len(sites)} cross-attentions of {model.source} ({model.arch.name})"
                    raise UserError(f"{what}; attach it to a model like the one it was fitted on")
        mean = self.mean()
        before = mean.enter(model)
        rows: dict[str, Callable[[], Tensor]] = {}
        for component in before:
            each = [parts[component] for parts in self.tokens.values() if component in parts]
            stacked = torch.cat([torch.stack([given[site] for site in sites]) for given in each], 1).to(model.arch.device)
            rows[component] = lambda stacked=stacked: stacked
        return before, PerLayer(model.arch, {component: words[component] for component in before}, rows)

    def leave(self, model: Model, state: tuple[Any, PerLayer]) -> None:
        before, acting = state
        acting.end()
        self.mean().leave(model, before)


def word_counts(arch: Architecture) -> dict[str, int]:
    """Component -> the id that its tokenizer's next new word will have."""
    return {component: len(tokenizer) for component, tokenizer in arch.tokenizers().items()}


class PerLayer:
    """New words at work in a denoiser: what the layers of each cross-attention read where a prompt says one of them.

    first: component -> the id of the first word's first row. rows: component -> a function that gives the rows of all words, one after
    another, for each site [sites, k, d]; with a graph, when they are trained.
    """

    def __init__(self, arch: Architecture, first: Mapping[str, int], rows: Mapping[str, Callable[[], Tensor]]) -> None:
        self.arch, self.first, self.rows = arch, first, rows
        self.component, *_ = arch.token_embeddings()  # whose ids a `Text` has
        self.count = {component: given().shape[1] for component, given in rows.items()}
        self.kept: tuple[Text, Tensor, Tensor] | None = None
        self.told: tuple[Tensor, Tensor, Tensor] | None = None
        self.present: tuple[Tensor, Tensor, Tensor] | None = None
        denoiser = arch.components()["denoiser"]
        self.handles: list[Any] = [denoiser.register_forward_pre_hook(self._begin), denoiser.register_forward_hook(self._end)]
        sites = list(arch.cross_attention_sites())
        for name, layer in arch.text_linears().items():
            number = sites.index(name.rpartition(".")[0])
            self.handles.append(layer.register_forward_pre_hook(partial(self._read_own, number)))
        arch.readers.append(self)

    def end(self) -> None:
        """Everything as before."""
        self.arch.readers[:] = [reader for reader in self.arch.readers if reader is not self]
        for handle in self.handles:
            handle.remove()

    def __call__(self, text: Text) -> None:
        """The prompts of the denoiser's next call. The first of all that listen encodes for all of them."""
        every = [reader for reader in self.arch.readers if isinstance(reader, PerLayer)]
        if every[0] is not self:
            return
        said = torch.stack([one._says(text.ids) for one in every]).any(0)
        rows = said.nonzero().flatten()
        self.told = (rows, *self._encoded(every, text[rows])) if len(rows) else None

    def _says(self, ids: Tensor) -> Tensor:
        """Which prompts [n] say one of the words."""
        first, count = self.first.get(self.component, 0), self.count.get(self.component, 0)
        return ((ids >= first) & (ids < first + count)).any(1)

    def _encoded(self, every: list[PerLayer], text: Text) -> tuple[Tensor, Tensor]:
        """Of each prompt which of the different ones it is [n], and what the sites read of these [sites, m, L, d]."""
        trained = torch.is_grad_enabled() and text.hidden.requires_grad
        if self.kept and not trained and torch.equal(self.kept[0].ids, text.ids) and torch.equal(self.kept[0].hidden, text.hidden):
            return self.kept[1:]
        ids, which = torch.unique(text.ids, dim=0, return_inverse=True)
        numbers = which.tolist()
        different = text[[numbers.index(number) for number in range(len(ids))]]
        kind = text.hidden.device.type
        # outside training prompts are encoded before the denoiser's autocast begins
        with torch.autocast(kind, enabled=trained and torch.is_autocast_enabled(kind)):
            each = [self._through(every, number, different, trained) for number in range(len(self.arch.cross_attention_sites()))]
        encoded = which, torch.stack(each)
        live = any(given().requires_grad for one in every for given in one.rows.values())
        self.kept = None if trained or live else (text, *encoded)
        return encoded

    def _through(self, every: list[PerLayer], number: int, text: Text, grad: bool) -> Tensor:
        """Prompts encoded with the rows of one site."""
        plain = self.arch.token_embeddings()
        try:
            for component, embedding in plain.items():
                own = [(one.first[component], given()[number]) for one in every if (given := one.rows.get(component))]
                self.arch.set_token_embedding(component, _Instead(embedding, own))
            return self.arch.encode_again(text, grad=grad).hidden
        finally:
            for component, embedding in plain.items():
                self.arch.set_token_embedding(component, embedding)

    def _begin(self, denoiser: nn.Module, given: Any) -> None:
        self.present, self.told = self.told, None

    def _end(self, denoiser: nn.Module, given: Any, output: Any) -> None:
        if not torch.is_grad_enabled():  # with gradient checkpointing the layers are called once more, in the backward pass
            self.present = None

    def _read_own(self, number: int, layer: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self.present is None:
            return None
        rows, which, encoded = self.present
        hidden, *others = given
        return hidden.index_copy(0, rows, encoded[number][which].to(hidden)), *others


class _Instead(nn.Module):
    """An embedding with other rows for some ids: each pair is the first id and the rows from there on."""

    def __init__(self, embedding: nn.Module, rows: list[tuple[int, Tensor]]) -> None:
        super().__init__()
        self.embedding, self.rows = embedding, rows

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.embedding(ids)
        for first, rows in self.rows:
            own = (ids >= first) & (ids < first + len(rows))
            found = torch.where(own[..., None], F.embedding((ids - first).clamp(0, len(rows) - 1), rows.to(found)), found)
        return found
