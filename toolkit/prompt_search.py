"""Finding words against a loss: new tokens whose embedding rows are trained while the model stays frozen.

Textual inversion looks for rows that draw a subject, attacks for rows that bring an erased concept back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.edits.base import EditInfo
from toolkit.edits.token import TokenEdit
from toolkit.errors import PalimpsestError, UserError
from toolkit.runs import seeded

if TYPE_CHECKING:
    from toolkit.arch.text import Text
    from toolkit.model import Model

SPREAD = 0.1  # noise between the vectors of one token, in standard deviations of the embedding table


class TokenRows(nn.Module):
    """New tokens with trainable embedding rows, in the model within a `with` block.

        with TokenRows(model, {"<toy>": "dog"}, vectors=2) as rows:
            loss = ...(rows(["a photo of a <toy>"]))  # differentiable with respect to rows.parameters()
        edit = rows.edit()

    The frozen rows and the trainable ones are looked up side by side (the idea of refiners' `ConceptExtender`), so no
    gradient reaches the frozen rows and none has to be masked. After the block, also after an exception, the tokenizers
    and embeddings are the objects that were there before. Token edits are attached before the block, not inside it.

    model: the model to find words for, with any edits attached. tokens: word -> where its rows start: a word or phrase
    (the mean of its tokens' rows), rows [k, d], or None for the mean of the table. vectors: rows for each token that
    gives none; several start at the phrase's rows in turn with a little noise, and are called <toy>, <toy>_1, ...
    """

    def __init__(self, model: Model, tokens: Mapping[str, str | Tensor | None], *, vectors: int = 1, seed: int = 0) -> None:
        super().__init__()
        if vectors < 1:
            raise UserError(f"{vectors} vectors for each token, needs at least 1; give a larger number")
        self._model = model
        embeddings, tokenizers = model.arch.token_embeddings(), model.arch.tokenizers()
        if any(embedding.weight.device.type != model.arch.device.type for embedding in embeddings.values()):
            raise UserError("parts of the model are offloaded, and words are found with all of them in place; load it without --offload")
        start = TokenEdit.from_rows(
            {
                token: {
                    part: initial_rows(embedding, tokenizers[part], init, vectors, seeded("token rows", seed, part, token))
                    for part, embedding in embeddings.items()
                }
                for token, init in tokens.items()
            }
        )
        self.rows = nn.ModuleDict(
            {
                part: _OneAfterAnother(nn.Parameter(rows[part].to(embedding.weight.device, copy=True)) for rows in start.tokens.values())
                for part, embedding in embeddings.items()
            }
        )
        self._edit = LiveTokens(start.info, start.tokens, self.rows)

    def forward(self, prompts: Sequence[str]) -> Text:
        """The prompts, encoded with the graph back to the rows."""
        return self._model.arch.encode(prompts, grad=True)

    def edit(self, info: EditInfo | None = None) -> TokenEdit:
        """The rows as they are now."""
        tokens: dict[str, dict[str, Tensor]] = {token: {} for token in self._edit.tokens}
        for part, trained in self.rows.items():
            for rows, row in zip(tokens.values(), trained.parameters(), strict=True):
                rows[part] = row
        return TokenEdit.from_rows(tokens, info)

    @contextmanager
    def unlisted(self) -> Iterator[Self]:
        """Within the block the words are in the model, but not among its edits, so that an edit fitted there is not one on top of them.

        Edits are not attached or detached inside it.
        """
        with self._edit.unlisted(self._model):
            yield self

    def __enter__(self) -> Self:
        self._model.attach(self._edit)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._model.detach(self._edit)


class _OneAfterAnother(nn.ParameterList):
    """Parameters [k, d], which called are one tensor."""

    def __call__(self) -> Tensor:  # a list's own refuses
        return torch.cat(list(self.parameters()))


@dataclass(frozen=True, eq=False)
class LiveTokens(TokenEdit):
    """A token edit whose rows are computed whenever they are read: component -> a module that gives those of all tokens, in order."""

    rows: nn.ModuleDict = field(default_factory=nn.ModuleDict)

    @contextmanager
    def unlisted(self, model: Model) -> Iterator[None]:
        """See `TokenRows.unlisted`."""
        state = self.enter(model)
        try:
            yield
        finally:
            self.leave(model, state)

    def enter(self, model: Model, scale: float = 1.0) -> dict[str, tuple[Any, nn.Module]]:
        state = super().enter(model, scale)
        for component, (tokenizer, old) in state.items():
            model.arch.set_token_embedding(component, ExtendedEmbedding(old, self.rows[component], len(tokenizer)))
        return state


class ExtendedEmbedding(nn.Module):
    """An embedding with other rows for new words: ids below `words` are looked up in the one, the rest in what `rows()` gives."""

    def __init__(self, frozen: nn.Module, rows: nn.Module, words: int) -> None:
        super().__init__()
        self.frozen, self.rows, self.words = frozen, rows, words

    @property
    def weight(self) -> Tensor:
        """The whole table, for whoever reads it."""
        table: Any = self.frozen.weight
        new = self.rows().to(table.dtype)
        return torch.cat([table[: self.words], new, table[self.words + len(new) :]])

    def forward(self, ids: Tensor) -> Tensor:
        old = self.frozen(ids.clamp(max=self.words - 1))
        new = F.embedding((ids - self.words).clamp(min=0), self.rows().to(old.dtype))
        return torch.where((ids >= self.words).unsqueeze(-1), new, old)


def initial_rows(embedding: nn.Embedding, tokenizer: Any, init: str | Tensor | None, count: int, generator: torch.Generator) -> Tensor:
    """Rows [count, d] to start a token from: see `TokenRows`. Given rows are taken as they are."""
    if isinstance(init, Tensor):
        return torch.atleast_2d(init)
    table = embedding.weight.detach().float()
    if init is None:
        pieces = table.mean(0, keepdim=True)
    else:
        ids = tokenizer(init, add_special_tokens=False).input_ids
        if not ids:
            raise UserError(f"the word {init!r} to start a token from has no tokens; give one such as 'dog'")
        pieces = table[ids]
    if count == 1:
        return pieces.mean(0, keepdim=True)
    noise = torch.randn(count, table.shape[1], generator=generator).to(table.device)
    return pieces[torch.arange(count) % len(pieces)] + SPREAD * table.std() * noise


def search(
    rows: TokenRows, loss: Callable[[int], Tensor], *, steps: int, lr: float = 1e-2, seed: int = 0, keep_best: bool = False
) -> list[float]:
    """Lower a loss by Adam (Kingma & Ba, arXiv 1412.6980) on the rows; returns the losses.

    loss: the loss of a step, to be called within the rows' block. What it draws from torch's generator is determined by
    the seed, and that generator is afterwards as before. keep_best: end with the rows that had the lowest loss instead
    of the last ones. A loss that is not finite is an error.
    """
    parameters = list(rows.parameters())
    optimizer = torch.optim.Adam(parameters, lr=lr)
    losses: list[float] = []
    best: list[Tensor] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for step in range(steps):
            value = loss(step)
            losses.append(value.item())
            if not math.isfinite(losses[-1]):
                raise PalimpsestError(f"prompt search: the loss became {losses[-1]} at step {step}; lower lr (now {lr})")
            if keep_best and losses[-1] <= min(losses):
                best = [parameter.detach().clone() for parameter in parameters]
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    for parameter, row in zip(parameters, best, strict=False):  # `best` is empty without keep_best
        parameter.data.copy_(row)
    return losses
