"""Encoded prompts, and what layers read of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Text:
    """Encoded prompts.

    hidden [n, L, d]: what the denoiser reads. ids [n, L]: token ids. length [n]: tokens up to and including EOT (so the
    last subject token of a prompt is at `length - 2`), of the first encoder where rows of several follow one another.
    pooled [n, p] or None. guidance [n]: the scale that a distilled denoiser reads, None is 1; others read none.
    """

    hidden: Tensor
    ids: Tensor
    length: Tensor
    pooled: Tensor | None = None
    guidance: Tensor | None = None

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, index: Any) -> Text:
        """Rows of the batch; index is anything that indexes a tensor's first axis and keeps it."""
        columns: dict[str, Any] = {name: None if value is None else value[index] for name, value in self._columns().items()}
        return Text(**columns)

    def to(self, device: str | torch.device) -> Text:
        """On another device."""
        columns: dict[str, Any] = {name: None if value is None else value.to(device) for name, value in self._columns().items()}
        return Text(**columns)

    @staticmethod
    def cat(parts: Sequence[Text]) -> Text:
        """Batches one after another."""
        given = [part._columns() for part in parts]
        columns: dict[str, Any] = {name: None if value is None else torch.cat([c[name] for c in given]) for name, value in given[0].items()}
        return Text(**columns)

    def ends(self) -> Tensor:
        """Hidden rows at the prompts' ends of text [n, d]."""
        return self.hidden[torch.arange(len(self), device=self.hidden.device), self.length - 1]

    def tensors(self) -> dict[str, Tensor]:
        """Those that it has, by name."""
        return {name: value for name, value in self._columns().items() if value is not None}

    def _columns(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Segment:
    """Rows of encoded prompts from one encoder.

    rows [n, L, d]. ids [n, L] or None for a pooled vector (L = 1). length [n]: tokens up to and including EOT.
    leading: rows at the start that are the same in every prompt (1 for BOS, 0 without). causal: whether a row sees only
    the rows before it.
    """

    rows: Tensor
    ids: Tensor | None
    length: Tensor
    leading: int = 1
    causal: bool = True


@dataclass(frozen=True)
class Stream:
    """What some linear layers of the denoiser read of an encoded prompt as it is, and those layers.

    linears: site -> layer; a bias, where there is one, is no part of what an edit changes. segments: encoded prompts -> the
    rows that the layers read.
    """

    linears: Mapping[str, nn.Linear]
    segments: Callable[[Text], tuple[Segment, ...]]
