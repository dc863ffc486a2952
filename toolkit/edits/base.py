"""The edit: a small frozen file that changes a model and can be taken off again bit-exactly."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from toolkit.errors import UserError, unknown

if TYPE_CHECKING:
    from toolkit.model import Model

TEXT_ENCODERS = frozenset({"text_encoder", "text_encoder_2", "text_encoder_3"})


def read_by(components: Iterable[str]) -> frozenset[str]:
    """The components whose output the given ones read: the denoiser reads the text encoders, they read the tokens."""
    return TEXT_ENCODERS if "denoiser" in components else frozenset()


def frozen(tensor: Tensor) -> Tensor:
    """A copy for an edit to keep: float32 (or the half type it has), on the CPU, contiguous, cut off from any graph."""
    dtype = tensor.dtype if tensor.dtype in (torch.float16, torch.bfloat16) else torch.float32
    return tensor.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)


def not_mergeable(edit: Edit) -> UserError:
    """The error for an edit that cannot become weights of a checkpoint."""
    return UserError(f"a {edit.kind()} edit cannot be written into a checkpoint; detach it first, and attach it when sampling")


def by_precedence(parts: Iterable[tuple[Edit, float]]) -> list[tuple[Edit, float]]:
    """Parts of edits with their scales in the order in which they act on weights: those that multiply them, then the rest as given."""
    return sorted(parts, key=lambda part: not part[0].relative)


@dataclass(frozen=True)
class EditInfo:
    """Where an edit comes from. Saved as JSON in the file's header.

    method and config: who fitted it, with the resolved options. base: the fingerprint of the model it was fitted on
    (`Model.fingerprint`). on: names of the edits that were attached then. triggers: new words that prompts may use.
    """

    method: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    base: Mapping[str, str] = field(default_factory=dict)
    on: tuple[str, ...] = ()
    triggers: tuple[str, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """From what a file's header holds. Anything else than this class's fields is a UserError."""
        fields = {item.name for item in dataclasses.fields(cls)}
        if not isinstance(value, dict) or not value.keys() <= fields:
            raise UserError(f"edit's origin is {value!r}, need an object with keys {', '.join(sorted(fields))}; fit or download it again")
        return cls(**{**value, "on": tuple(value.get("on", ())), "triggers": tuple(value.get("triggers", ()))})


@dataclass(frozen=True, eq=False)
class Edit(ABC):
    """Base of every edit kind. One subclass per file in toolkit/edits; the file's stem is the kind's name."""

    info: EditInfo

    mergeable: ClassVar[bool]  # can be written into a checkpoint's weights
    scalable: ClassVar[bool]  # scale 0.5 is half the edit
    relative: ClassVar[bool] = False  # it multiplies weights, before any edit adds to them; `delta` is in units of their base values
    exports: ClassVar[tuple[str, ...]]  # formats `toolkit.io.export` can write it in

    @classmethod
    def kind(cls) -> str:
        """The kind's name: the stem of the file that defines it."""
        return cls.__module__.rpartition(".")[2]

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What the file holds."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: dict[str, Tensor], info: EditInfo) -> Self:
        """The inverse of `tensors`. Missing or misshapen tensors are a UserError."""

    @abstractmethod
    def sites(self) -> list[str]:
        """What it changes: parameter names ("denoiser....to_k.weight"), tokens ("text_encoder:<toy>") or attention modules."""

    @abstractmethod
    def delta(self, site: str) -> Tensor:
        """What it adds at one of its `sites` at scale 1, dense, float32: a parameter's change (of a `relative` edit in units of the
        parameter's base values), a token's rows [k, d], or all numbers of what it puts behind a module.

        Needs no model. A site that it does not change is a UserError.
        """

    @property
    @abstractmethod
    def reads(self) -> frozenset[str]:
        """Components whose output it was fitted to ("text_encoder", ...): later edits that write them conflict."""

    @property
    @abstractmethod
    def writes(self) -> frozenset[str]:
        """Components it changes ("denoiser", "text_encoder", "tokens")."""

    def weight(self, name: str, current: Tensor, scale: float) -> Tensor:
        """The new value of parameter `name`, from its current float32 value. Called for `parameter_names` only.

        Default: current + scale * delta.
        """
        return current + scale * self.delta(name).to(current.device)

    def parameter_names(self) -> list[str]:
        """The parameters that `weight` changes."""
        return []

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that parameter `name` must have."""
        return tuple(self.delta(name).shape)

    def parts(self, scale: float = 1.0) -> list[tuple[Edit, float]]:
        """The edits that it is made of with their scales, in the order in which they apply; itself unless it is a chain."""
        return [(self, scale)]

    def enter(self, model: Model, scale: float = 1.0) -> Any:
        """Changes that are not parameter values (tokens, modules), at this scale. Returns what `leave` needs. Default: none."""
        return None

    def leave(self, model: Model, state: Any) -> None:
        """Undo `enter` exactly. Called in the reverse order of the enters."""


class Words(Edit, ABC):
    """Base of the kinds that are new words: their sites are what the file holds, rows by token."""

    def sites(self) -> list[str]:
        return list(self.tensors())

    def delta(self, site: str) -> Tensor:
        rows = self.tensors()
        if site not in rows:
            raise unknown("site", site, rows)
        return rows[site].float()

    @property
    def reads(self) -> frozenset[str]:
        return TEXT_ENCODERS

    @property
    def writes(self) -> frozenset[str]:
        return frozenset({"tokens"})
