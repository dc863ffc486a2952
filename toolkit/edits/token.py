"""New words: rows of the token embedding."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from toolkit.edits.base import EditInfo, Words, frozen
from toolkit.errors import UserError, unknown

if TYPE_CHECKING:
    from toolkit.model import Model


def vector_names(token: str, count: int) -> list[str]:
    """The words that a token of `count` vectors adds to a tokenizer, as diffusers names them: <toy>, <toy>_1, ..."""
    return [token, *(f"{token}_{i}" for i in range(1, count))]


@dataclass(frozen=True, eq=False)
class TokenEdit(Words):
    """New words with their own embedding rows.

    tokens: word -> component -> rows [k, d]; k > 1 spells the word with several vectors in a row.

    Attached, the tokenizer and the embedding of each component are replaced by extended copies; detached, the old
    objects are put back. Both encoders of a model with two get the same words.

    File: one tensor `<component>:<token>` each.
    """

    tokens: Mapping[str, Mapping[str, Tensor]]

    mergeable: ClassVar[bool] = True
    scalable: ClassVar[bool] = False
    exports: ClassVar[tuple[str, ...]] = ("embedding", "checkpoint")

    def __post_init__(self) -> None:
        for token, rows in self.tokens.items():
            if not token or token != token.lower() or any(map(str.isspace, token)):
                raise UserError(f"token {token!r} is not one lower-case word, which prompts are read as; rename it, e.g. '<toy>'")
            for component, vectors in rows.items():
                if vectors.ndim != 2 or not len(vectors):
                    raise UserError(f"rows of {component}:{token} are {tuple(vectors.shape)}, need [vectors, d]; give at least one")

    @classmethod
    def from_rows(cls, tokens: Mapping[str, Mapping[str, Tensor]], info: EditInfo | None = None) -> Self:
        """From word -> component -> rows [k, d] or one row [d]. Kept in float32, on the CPU."""
        kept = {token: {part: frozen(torch.atleast_2d(row)) for part, row in rows.items()} for token, rows in tokens.items()}
        return cls(info or EditInfo(triggers=tuple(kept)), kept)

    def tensors(self) -> dict[str, Tensor]:
        return {f"{component}:{token}": rows for token, parts in self.tokens.items() for component, rows in parts.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], info: EditInfo) -> Self:
        tokens: dict[str, dict[str, Tensor]] = {}
        for key, rows in tensors.items():
            component, colon, token = key.partition(":")
            if not colon:
                raise UserError(f"token edit has a tensor {key!r} that names no token; fit or download it again")
            tokens.setdefault(token, {})[component] = rows
        return cls(info, tokens)

    def enter(self, model: Model, scale: float = 1.0) -> dict[str, tuple[Any, nn.Module]]:
        """Extend tokenizers and embeddings. Returns the old ones by component. Nothing is changed when it raises."""
        arch = model.arch
        tokenizers, embeddings = arch.tokenizers(), arch.token_embeddings()
        new: dict[str, tuple[Any, nn.Module]] = {}
        for component in dict.fromkeys(component for rows in self.tokens.values() for component in rows):
            if component not in embeddings:
                raise unknown("text encoder", component, embeddings)
            rows = {token: parts[component] for token, parts in self.tokens.items() if component in parts}
            tokenizer = _extend_tokenizer(tokenizers[component], rows)
            new[component] = tokenizer, _extend_embedding(embeddings[component], rows, component, len(tokenizers[component]))
        for component, (tokenizer, embedding) in new.items():
            arch.set_tokenizer(component, tokenizer)
            arch.set_token_embedding(component, embedding)
        return {component: (tokenizers[component], embeddings[component]) for component in new}

    def leave(self, model: Model, state: dict[str, tuple[Any, nn.Module]]) -> None:
        for component, (tokenizer, embedding) in state.items():
            model.arch.set_tokenizer(component, tokenizer)
            model.arch.set_token_embedding(component, embedding)


def _extend_tokenizer(tokenizer: Any, rows: Mapping[str, Tensor]) -> Any:
    """A copy of the tokenizer that also knows the tokens' words."""
    extended, known = copy.deepcopy(tokenizer), tokenizer.get_vocab()
    for token, vectors in rows.items():
        for name in vector_names(token, len(vectors)):
            if name in known or not extended.add_tokens(name):
                raise UserError(f"token {name!r} is already a word of the tokenizer; rename the token or detach the edit that has it")
    return extended


def _extend_embedding(embedding: nn.Embedding, rows: Mapping[str, Tensor], component: str, words: int) -> nn.Embedding:
    """The embedding with the new rows after those of the tokenizer's `words`, and the old one's type, device and mode.

    T5's has rows without a word, to make their number a round one. New words take these first.
    """
    old = embedding.weight.detach()
    for token, vectors in rows.items():
        if vectors.shape[1] != old.shape[1]:
            given, needed = tuple(vectors.shape), f"[{len(vectors)}, {old.shape[1]}]"
            raise UserError(f"rows of {component}:{token} are {list(given)}, this model needs {needed}; fit the token on this model")
    if len(old) < words:
        raise UserError(f"the tokenizer of {component} has {words} words for {len(old)} embedding rows; load a model where they agree")
    new = torch.cat([vectors.to(old.device, old.dtype) for vectors in rows.values()])
    table = torch.cat([old[:words], new, old[words + len(new) :]])
    extended = nn.Embedding.from_pretrained(table, freeze=not embedding.weight.requires_grad)
    return extended.train(embedding.training)
