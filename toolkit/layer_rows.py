"""Finding words against a loss, with embedding rows for each layer that reads text (P+, arXiv 2303.09522)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from toolkit.edits.layer_token import LayerTokenEdit, PerLayer, word_counts
from toolkit.errors import UserError
from toolkit.prompt_search import LiveTokens, TokenRows

if TYPE_CHECKING:
    from toolkit.arch.text import Text
    from toolkit.edits.base import EditInfo
    from toolkit.model import Model


class LayerRows(nn.Module):
    """New tokens with trainable rows for each cross-attention, in the model within `unlisted`.

    All start where the rows of `TokenRows` start, which has the same arguments. No gradient reaches anything but the rows: each site's
    from what its layers read, and from a pooled encoding all, since that is made with their means.
    """

    def __init__(self, model: Model, tokens: Mapping[str, str | Tensor | None], *, vectors: int = 1, seed: int = 0) -> None:
        super().__init__()
        self._model, self._sites = model, list(model.arch.cross_attention_sites())
        if not self._sites:
            raise UserError(f"{model.arch.name} has no cross-attention to learn words for; load a Stable Diffusion 1, 2 or XL model")
        start = TokenRows(model, tokens, vectors=vectors, seed=seed).edit()
        self._tokens = list(start.tokens)
        self.rows = nn.ModuleDict(
            {
                part: _SideBySide(
                    nn.Parameter(rows[part].to(embedding.weight.device).repeat(len(self._sites), 1, 1)) for rows in start.tokens.values()
                )
                for part, embedding in model.arch.token_embeddings().items()
            }
        )
        means = nn.ModuleDict({part: _Mean(rows) for part, rows in self.rows.items()})
        self._means = LiveTokens(start.info, start.tokens, means)

    def forward(self, prompts: Sequence[str]) -> Text:
        """The prompts, encoded with the graph back to the rows' means; a prediction with this makes the rest of it."""
        return self._model.arch.encode(prompts, grad=True)

    def edit(self, info: EditInfo | None = None) -> LayerTokenEdit:
        """The rows as they are now."""
        tokens: dict[str, dict[str, dict[str, Tensor]]] = {token: {} for token in self._tokens}
        for part, trained in self.rows.items():
            for parts, rows in zip(tokens.values(), trained.parameters(), strict=True):
                parts[part] = dict(zip(self._sites, rows, strict=True))
        return LayerTokenEdit.from_rows(tokens, info)

    @contextmanager
    def unlisted(self) -> Iterator[Self]:
        """Within the block the words are in the model, but not among its edits; see `TokenRows.unlisted`."""
        first = word_counts(self._model.arch)
        with self._means.unlisted(self._model):
            acting = PerLayer(self._model.arch, {part: first[part] for part in self.rows}, dict(self.rows.items()))
            try:
                yield self
            finally:
                acting.end()


class _SideBySide(nn.ParameterList):
    """Parameters [sites, k, d], one for each token, which called are one tensor."""

    def __call__(self) -> Tensor:  # a list's own refuses
        return torch.cat(list(self.parameters()), 1)


class _Mean(nn.Module):
    """The mean of rows over the sites [k, d]."""

    def __init__(self, rows: nn.Module) -> None:
        super().__init__()
        self.rows = rows

    def forward(self) -> Tensor:
        return self.rows().mean(0)
