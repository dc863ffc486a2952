"""Several edits, one after another."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from toolkit import registry
from toolkit.edits.base import Edit, EditInfo, by_precedence
from toolkit.errors import UserError, unknown


@dataclass(frozen=True, eq=False)
class Chain(Edit):
    """An ordered composition: "my dog, without weapons".

    edits: first applied first. scales: one per edit, () for all 1. A model attaches the parts one by one, so what a
    chain can do (scale, merge, export) is what each part can do.

    File: the tensors of part i are named `<i>.<name>`; `info.notes["parts"]` has each part's kind, scale and info.
    """

    edits: tuple[Edit, ...]
    scales: tuple[float, ...] = ()

    mergeable: ClassVar[bool] = True  # of a chain whose parts all are; see __post_init__
    scalable: ClassVar[bool] = True
    exports: ClassVar[tuple[str, ...]] = ("diffusers-lora", "kohya-lora", "embedding", "delta", "checkpoint")

    def __post_init__(self) -> None:
        scales = self.scales or (1.0,) * len(self.edits)
        if not self.edits or len(scales) != len(self.edits):
            raise UserError(f"chain of {len(self.edits)} edits and {len(scales)} scales; give at least one edit, and one scale for each")
        notes = [
            {"kind": edit.kind(), "scale": scale, "info": dataclasses.asdict(edit.info)}
            for edit, scale in zip(self.edits, scales, strict=True)
        ]
        object.__setattr__(self, "scales", scales)
        for edit, scale in self.parts():
            if scale != 1.0 and not edit.scalable:
                raise UserError(f"a {edit.kind()} edit cannot be scaled, scale {scale} was given; give it scale 1")
        for ability in ("mergeable", "scalable"):
            object.__setattr__(self, ability, all(getattr(part, ability) for part, _ in self.parts()))
        object.__setattr__(self, "info", dataclasses.replace(self.info, notes={**self.info.notes, "parts": notes}))

    @classmethod
    def of(cls, edits: Sequence[Edit], scales: Sequence[float] = (), info: EditInfo | None = None) -> Self:
        """A chain of these edits; its trigger words are theirs."""
        triggers = tuple(dict.fromkeys(word for edit in edits for word in edit.info.triggers))
        return cls(info or EditInfo(triggers=triggers), tuple(edits), tuple(scales))

    def tensors(self) -> dict[str, Tensor]:
        return {f"{i}.{name}": tensor for i, edit in enumerate(self.edits) for name, tensor in edit.tensors().items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], info: EditInfo) -> Self:
        parts: list[dict[str, Any]] = list(info.notes.get("parts", ()))
        own: list[dict[str, Tensor]] = [{} for _ in parts]
        for key, tensor in tensors.items():
            number, _, name = key.partition(".")
            if not number.isdecimal() or int(number) >= len(parts):
                raise UserError(f"chain of {len(parts)} edits has a tensor {key!r} that belongs to none; fit or download it again")
            own[int(number)][name] = tensor
        edits = [
            registry.load("edit", part["kind"]).from_tensors(tensors, EditInfo.from_json(part["info"]))
            for part, tensors in zip(parts, own, strict=True)
        ]
        return cls(info, tuple(edits), tuple(part["scale"] for part in parts))

    def parts(self, scale: float = 1.0) -> list[tuple[Edit, float]]:
        return [part for edit, own in zip(self.edits, self.scales, strict=True) for part in edit.parts(own * scale)]

    def sites(self) -> list[str]:
        return list(dict.fromkeys(site for edit in self.edits for site in edit.sites()))

    def parameter_names(self) -> list[str]:
        return list(dict.fromkeys(name for edit in self.edits for name in edit.parameter_names()))

    def delta(self, site: str) -> Tensor:
        """The sum of the parts' changes, each times its scale. There is none where one of several multiplies: a UserError."""
        parts = [(edit, scale) for edit, scale in self.parts() if site in edit.sites()]
        if not parts:
            raise unknown("site", site, self.sites())
        if len(parts) > 1 and (multiplying := next((edit for edit, _ in parts if edit.relative), None)):
            what = f"a {multiplying.kind()} edit and others change {site}, and what they add together depends on the model's weights"
            raise UserError(f"{what}; read the deltas of the chain's parts one by one")
        return torch.stack([scale * edit.delta(site) for edit, scale in parts]).sum(0)

    def weight(self, name: str, current: Tensor, scale: float) -> Tensor:
        for edit, own in by_precedence(self.parts(scale)):
            if name in edit.parameter_names():
                current = edit.weight(name, current, own)
        return current

    @property
    def reads(self) -> frozenset[str]:
        return frozenset().union(*(edit.reads for edit in self.edits))

    @property
    def writes(self) -> frozenset[str]:
        return frozenset().union(*(edit.writes for edit in self.edits))
