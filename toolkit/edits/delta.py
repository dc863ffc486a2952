"""Changes of named parameters of any shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor

from toolkit.edits.base import Edit, EditInfo, frozen, read_by
from toolkit.errors import UserError, unknown


@dataclass(frozen=True, eq=False)
class Sparse:
    """The non-zero entries of a tensor. indices [n]: into the flattened tensor; values [n]; size: its shape."""

    indices: Tensor
    values: Tensor
    size: tuple[int, ...]

    def dense(self) -> Tensor:
        """The whole tensor, float32."""
        full = torch.zeros(self.size, device=self.values.device).flatten()
        full[self.indices.long()] = self.values.float()
        return full.view(self.size)


@dataclass(frozen=True, eq=False)
class Delta(Edit):
    """W -> W + scale * delta for named parameters.

    dense: parameter name -> change. sparse: parameter name -> its non-zero entries. A name is in one of them.

    File: `dense.<name>`; `sparse.<name>|indices`, `sparse.<name>|values` and `sparse.<name>|size`.

    Make one with `from_deltas`, which chooses the smaller form.
    """

    dense: Mapping[str, Tensor]
    sparse: Mapping[str, Sparse] = field(default_factory=dict)

    mergeable: ClassVar[bool] = True
    scalable: ClassVar[bool] = True
    exports: ClassVar[tuple[str, ...]] = ("delta", "checkpoint")

    @classmethod
    def from_deltas(cls, deltas: Mapping[str, Tensor], info: EditInfo | None = None) -> Self:
        """From parameter name -> dense change. Parameters that do not change are left out."""
        dense: dict[str, Tensor] = {}
        sparse: dict[str, Sparse] = {}
        for name, delta in deltas.items():
            kept = frozen(delta)
            indices = kept.flatten().nonzero().flatten()
            indices = indices.to(torch.int32 if kept.numel() < 2**31 else torch.int64)
            if len(indices) * (indices.element_size() + kept.element_size()) >= kept.nbytes:
                dense[name] = kept
            elif len(indices):
                sparse[name] = Sparse(indices, kept.flatten()[indices.long()], tuple(kept.shape))
        return cls(info or EditInfo(), dense, sparse)

    @classmethod
    def merge(cls, edits: Sequence[Delta], scales: Sequence[float] | None = None, info: EditInfo | None = None) -> Self:
        """One edit that is the sum of several, each times its scale."""
        scales = scales or [1.0] * len(edits)
        total: dict[str, Tensor] = {}
        for edit, scale in zip(edits, scales, strict=True):
            for name in edit.sites():
                total[name] = total.get(name, torch.zeros(())) + scale * edit.delta(name)
        return cls.from_deltas(total, info)

    def tensors(self) -> dict[str, Tensor]:
        tensors = {f"dense.{name}": delta for name, delta in self.dense.items()}
        for name, entries in self.sparse.items():
            tensors[f"sparse.{name}|indices"] = entries.indices
            tensors[f"sparse.{name}|values"] = entries.values
            tensors[f"sparse.{name}|size"] = torch.tensor(entries.size, dtype=torch.int64)
        return tensors

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], info: EditInfo) -> Self:
        dense: dict[str, Tensor] = {}
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            form, _, name = key.partition(".")
            if form == "dense":
                dense[name] = tensor
            elif form == "sparse" and "|" in name:
                name, _, part = name.rpartition("|")
                parts.setdefault(name, {})[part] = tensor
            else:
                raise UserError(f"delta edit has a tensor {key!r} that belongs to no parameter; fit or download it again")
        return cls(info, dense, {name: _entries(name, **given) for name, given in parts.items()})

    def sites(self) -> list[str]:
        return self.parameter_names()

    def parameter_names(self) -> list[str]:
        return [*self.dense, *self.sparse]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.sparse[name].size if name in self.sparse else tuple(self.dense[name].shape)

    def delta(self, site: str) -> Tensor:
        if site in self.sparse:
            return self.sparse[site].dense()
        if site in self.dense:
            return self.dense[site].float()
        raise unknown("site", site, self.sites())

    @property
    def writes(self) -> frozenset[str]:
        return frozenset(name.partition(".")[0] for name in self.sites())

    @property
    def reads(self) -> frozenset[str]:
        return read_by(self.writes)


def _entries(name: str, indices: Tensor | None = None, values: Tensor | None = None, size: Tensor | None = None, **other: Tensor) -> Sparse:
    """The entries of one parameter as its file tensors give them."""
    if indices is None or values is None or size is None or other:
        raise UserError(f"delta edit lacks one of indices, values and size of {name}; fit or download it again")
    entries = Sparse(indices, values, tuple(size.tolist()))
    inside = not len(indices) or 0 <= int(indices.min()) <= int(indices.max()) < int(size.prod())
    if indices.shape != values.shape or not inside:
        raise UserError(f"delta edit has indices of {name} outside its shape {entries.size}; fit or download it again")
    return entries
