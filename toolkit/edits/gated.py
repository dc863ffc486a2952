"""Low-rank changes that act for some prompts and not for others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.arch.text import Text
from toolkit.edits.base import Edit, EditInfo, frozen, read_by
from toolkit.edits.low_rank import LowRank
from toolkit.errors import UserError

if TYPE_CHECKING:
    from toolkit.arch.base import Architecture
    from toolkit.model import Model

GATE, FACTORS = "gate.", "low_rank."  # how the names of tensors begin


@dataclass(frozen=True, eq=False)
class Gate:
    """How near a prompt is to the nearest of k names, from 0 to 1.

    It is the larger of two numbers: the cosine of the encoded prompt to the name, each at its end of text and less what is there
    without a prompt; and the share of the name's tokens that are in the prompt. From `floor`, where it is 0, it grows to 1.

    rows [k, d]: encoded names at their ends of text. ids [k, L]: their token ids, each once, and -1 elsewhere. nothing [d]: what is
    there without a prompt. floor []: below 1.
    """

    rows: Tensor
    ids: Tensor
    nothing: Tensor
    floor: Tensor

    def __post_init__(self) -> None:
        shapes = [tuple(getattr(self, field.name).shape) for field in fields(self)]
        names, width = (*self.rows.shape, 0, 0)[:2]
        fits = self.rows.ndim == self.ids.ndim == 2 and len(self.ids) == names > 0 and shapes[2:] == [(width,), ()]
        if not fits or not self.floor < 1:
            raise UserError(f"gate has rows, ids, nothing and floor {shapes}, needs [k, d], [k, L], [d] and [] below 1; fit it again")

    @classmethod
    def of(cls, arch: Architecture, names: Sequence[str], floor: float) -> Self:
        """That of these names."""
        text, nothing = arch.encode(list(names)), arch.encode([""])
        own = [list(dict.fromkeys(ids[inside].tolist())) for ids, inside in zip(text.ids, _inside(text), strict=True)]
        longest = max(map(len, own))
        ids = torch.tensor([[*row, *[-1] * (longest - len(row))] for row in own])
        return cls(frozen(text.ends()), ids, frozen(nothing.ends()[0]), torch.tensor(floor))

    def __call__(self, text: Text) -> Tensor:
        """Of each of n encoded prompts [n], float32."""
        rows, ids, nothing, floor = (getattr(self, field.name).to(text.hidden.device) for field in fields(self))
        ends = text.ends().float()
        near = F.cosine_similarity((ends - nothing)[:, None], (rows - nothing)[None], dim=-1)
        near = near * (ends != 0).any(-1, keepdim=True)  # an encoding of zeros is how some models are told that there is no prompt
        said = text.ids.masked_fill(~_inside(text), -2)
        shared = (ids[None, :, :, None] == said[:, None, None]).any(-1).sum(-1) / (ids >= 0).sum(-1)
        nearest = torch.maximum(near, shared).amax(1)
        return ((nearest - floor) / (1 - floor)).clamp(0, 1)


@dataclass(frozen=True, eq=False)
class Gated(Edit):
    """W -> W + scale * gate(prompt) * up @ down for each linear layer.

    low_rank: the factors. gate: of each row of a batch, from its prompt, so that prompts in one batch do not disturb one another,
    nor the side without a prompt of classifier-free guidance.

    Attached, a forward hook on each layer adds what its factors give, in float32; the layers stay as they are. The gate is told the
    prompts by `Architecture.predict`, and holds until the denoiser is called again. A call of the denoiser by another way, such as
    that of a diffusers pipeline, tells no prompt: the gate is 1 then.

    `delta` is the change with the gate at 1. File: the tensors of the low-rank edit, named `low_rank.<name>`, and `gate.rows`,
    `gate.ids`, `gate.nothing` and `gate.floor`.
    """

    low_rank: LowRank
    gate: Gate

    mergeable: ClassVar[bool] = False  # what it adds depends on the prompt, so that no weights hold it
    scalable: ClassVar[bool] = True
    exports: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for name in self.low_rank.sites():
            if len(self.low_rank.shape(name)) != 2:
                raise UserError(f"gated edit of {name} has shape {self.low_rank.shape(name)}, needs [out, in]; gate linear layers only")

    def tensors(self) -> dict[str, Tensor]:
        gate = {f"{GATE}{field.name}": getattr(self.gate, field.name) for field in fields(self.gate)}
        return {**gate, **{f"{FACTORS}{name}": tensor for name, tensor in self.low_rank.tensors().items()}}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], info: EditInfo) -> Self:
        gate = {key.removeprefix(GATE): tensor for key, tensor in tensors.items() if not key.startswith(FACTORS)}
        if gate.keys() != (needed := {field.name for field in fields(Gate)}):
            raise UserError(f"gated edit has {sorted(gate)} beside its factors, needs {sorted(needed)}; fit or download it again")
        factors = {key.removeprefix(FACTORS): tensor for key, tensor in tensors.items() if key.startswith(FACTORS)}
        return cls(info, LowRank.from_tensors(factors, info), Gate(**gate))

    def sites(self) -> list[str]:
        return self.low_rank.sites()

    def delta(self, site: str) -> Tensor:
        return self.low_rank.delta(site)

    @property
    def writes(self) -> frozenset[str]:
        return self.low_rank.writes

    @property
    def reads(self) -> frozenset[str]:
        return read_by(self.writes)

    def enter(self, model: Model, scale: float = 1.0) -> _Acting:
        """Hooks and a reader of prompts. Nothing is changed when it raises."""
        parts = model.arch.components().items()
        modules = {f"{part}.{path}.weight": module for part, whole in parts for path, module in whole.named_modules()}
        layers: dict[str, nn.Linear] = {}
        for name in self.sites():
            given, layer = self.low_rank.shape(name), modules.get(name)
            if not isinstance(layer, nn.Linear) or given != tuple(layer.weight.shape):
                has = list(layer.weight.shape) if isinstance(layer, nn.Linear) else "no such layer"
                what = f"gated edit of {name} is {list(given)}, {model.source} ({model.arch.name}) has {has}"
                raise UserError(f"{what}; attach it to a model like the one it was fitted on")
            layers[name] = layer
        return _Acting(self, model.arch, layers, scale)

    def leave(self, model: Model, state: _Acting) -> None:
        state.end(model.arch)


class _Acting:
    """A gated edit in a model: the gates of the denoiser's present call, of the next one when its prompts were told, and hooks."""

    def __init__(self, edit: Gated, arch: Architecture, layers: dict[str, nn.Linear], scale: float) -> None:
        self.gate = edit.gate
        self.told: Tensor | None = None
        self.present: Tensor | None = None
        self.handles: list[Any] = [arch.components()["denoiser"].register_forward_pre_hook(self._begin)]
        for name, layer in layers.items():
            up, down = (factor.to(layer.weight.device) for factor in edit.low_rank.factors(name))  # float32, whatever the layer is
            self.handles.append(layer.register_forward_hook(partial(self._add, scale * up, down)))
        self.reader = self.read
        arch.readers.append(self.reader)

    def end(self, arch: Architecture) -> None:
        """Everything as before."""
        arch.readers[:] = [reader for reader in arch.readers if reader is not self.reader]
        for handle in self.handles:
            handle.remove()

    @torch.no_grad()
    def read(self, text: Text) -> None:
        """The prompts of the denoiser's next call."""
        self.told = self.gate(text)

    def _begin(self, denoiser: nn.Module, given: Any) -> None:
        self.present, self.told = self.told, None

    def _add(self, up: Tensor, down: Tensor, layer: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = given[0].float()
        change = F.linear(F.linear(x, down.to(x.device)), up.to(x.device))
        if self.present is not None:
            change = change * self.present.to(change).view(-1, *[1] * (change.ndim - 1))
        return output + change.to(output)


def _inside(text: Text) -> Tensor:
    """Which tokens are of the prompts' words [n, L]: not what begins, ends or fills up."""
    place = torch.arange(text.ids.shape[1], device=text.ids.device)
    return (place > 0) & (place < text.length[:, None] - 1)
