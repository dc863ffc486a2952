"""Shut parameters: each is kept as it is or put out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from toolkit.edits.base import Edit, EditInfo, read_by
from toolkit.errors import UserError, unknown


@dataclass(frozen=True, eq=False)
class Mask(Edit):
    """W0 -> W0 * M for named parameters, M binary: 1 keeps, 0 shuts. At a scale s, W0 * (1 - s (1 - M)): what is shut keeps 1 - s.

    bits: parameter name -> M, flattened, eight entries to a byte [ceil(n / 8)] as np.packbits has them; those after the last are 0.
    sizes: parameter name -> its shape.

    Masks act on the base, before edits that add to it, in whatever order they are attached; several together shut what any of
    them shuts. `delta` is M - 1, in units of the base's own values: what is added is W0 times that.

    File: `<name>|bits` uint8 and `<name>|size` int64.

    Make one with `from_masks`.
    """

    bits: Mapping[str, Tensor]
    sizes: Mapping[str, tuple[int, ...]]

    mergeable: ClassVar[bool] = True
    scalable: ClassVar[bool] = True
    relative: ClassVar[bool] = True
    exports: ClassVar[tuple[str, ...]] = ("checkpoint",)

    def __post_init__(self) -> None:
        if self.bits.keys() != self.sizes.keys():
            lacking = sorted(self.bits.keys() ^ self.sizes.keys())
            raise UserError(f"mask edit lacks the bits or the size of {', '.join(lacking)}; fit or download it again")
        for name, bits in self.bits.items():
            size, whole = self.sizes[name], math.prod(self.sizes[name])
            if bits.dtype != torch.uint8 or bits.shape != (math.ceil(whole / 8),) or min(size, default=0) < 0:
                given, needed = f"{bits.dtype} {list(bits.shape)}", f"uint8 [{math.ceil(whole / 8)}]"
                raise UserError(f"mask of {name} {list(size)} is {given}, need {needed}; fit or download it again")

    @classmethod
    def from_masks(cls, masks: Mapping[str, Tensor], info: EditInfo | None = None) -> Self:
        """From parameter name -> M, of the parameter's shape, True or 1 where it is kept. Parameters that are kept whole are left out."""
        kept = {name: mask.detach().cpu().bool() for name, mask in masks.items() if not mask.all()}
        bits = {name: torch.from_numpy(np.packbits(mask.flatten().numpy())) for name, mask in kept.items()}
        return cls(info or EditInfo(), bits, {name: tuple(mask.shape) for name, mask in kept.items()})

    @classmethod
    def union(cls, edits: Sequence[Mask], info: EditInfo | None = None) -> Self:
        """One edit that shuts what any of these shuts: the product of their masks. Of one parameter in two shapes is a UserError."""
        bits: dict[str, Tensor] = {}
        sizes: dict[str, tuple[int, ...]] = {}
        for edit in edits:
            for name, own in edit.bits.items():
                if (other := sizes.setdefault(name, edit.sizes[name])) != edit.sizes[name]:
                    given = f"{list(other)} and {list(edit.sizes[name])}"
                    raise UserError(f"masks of {name} are {given}, need one shape; unite masks of one model")
                bits[name] = bits[name] & own if name in bits else own
        return cls(info or EditInfo(), bits, sizes)

    def tensors(self) -> dict[str, Tensor]:
        sizes = {f"{name}|size": torch.tensor(size, dtype=torch.int64) for name, size in self.sizes.items()}
        return {**{f"{name}|bits": bits for name, bits in self.bits.items()}, **sizes}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], info: EditInfo) -> Self:
        parts: dict[str, dict[str, Tensor]] = {"bits": {}, "size": {}}
        for key, tensor in tensors.items():
            name, _, part = key.rpartition("|")
            if part not in parts or not name:
                raise UserError(f"mask edit has a tensor {key!r} that belongs to no parameter; fit or download it again")
            parts[part][name] = tensor
        return cls(info, parts["bits"], {name: tuple(map(int, size.flatten().tolist())) for name, size in parts["size"].items()})

    def sites(self) -> list[str]:
        return self.parameter_names()

    def parameter_names(self) -> list[str]:
        return list(self.bits)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.sizes[name]

    def kept(self, name: str) -> Tensor:
        """M of a parameter, in its shape, True where it is kept."""
        if name not in self.bits:
            raise unknown("site", name, self.sites())
        size = self.sizes[name]
        entries = np.unpackbits(self.bits[name].numpy(), count=math.prod(size))
        return torch.from_numpy(entries).view(torch.bool).view(size)

    def delta(self, site: str) -> Tensor:
        return self.kept(site).float() - 1

    def weight(self, name: str, current: Tensor, scale: float) -> Tensor:
        return torch.where(self.kept(name).to(current.device), current, (1 - scale) * current)

    @property
    def writes(self) -> frozenset[str]:
        return frozenset(name.partition(".")[0] for name in self.bits)

    @property
    def reads(self) -> frozenset[str]:
        return read_by(self.writes)
