"""What training changes in the model within a `with` block: parameters, low-rank factors beside layers, or modules behind attention."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.edits.chain import Chain
from toolkit.edits.delta import Delta
from toolkit.edits.low_rank import LowRank
from toolkit.edits.module import FORMS, ModuleEdit, SmallModule, add_after
from toolkit.runs import seeded

if TYPE_CHECKING:
    from toolkit.edits.base import Edit, EditInfo
    from toolkit.model import Model
    from toolkit.prompt_search import TokenRows


Layer = nn.Linear | nn.Conv2d


class Trainable(nn.Module, ABC):
    """Parameters that act in a model within a `with` block.

        with weights:
            loss = ...(model)           # differentiable with respect to weights.parameters()
            with weights.off():         # the model as it was
                ...
        edit = weights.edit(info)

    After the block, also after an exception, the model's modules and parameters are the objects that were there before.
    """

    @abstractmethod
    def enter(self) -> None:
        """Act."""

    @abstractmethod
    def leave(self) -> None:
        """Act no longer."""

    @abstractmethod
    def edit(self, info: EditInfo) -> Edit:
        """The change as it is now."""

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within the block the model is as it was."""
        self.leave()
        try:
            yield
        finally:
            self.enter()

    def __enter__(self) -> Self:
        self.enter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.leave()


class FullWeights(Trainable):
    """Copies of named parameters, which take their place. The model's own stay as they are and cost no copy of the model.

    names: as in `Architecture.parameter`, e.g. "denoiser....to_k.weight". The copies are float32.
    """

    def __init__(self, model: Model, names: Sequence[str]) -> None:
        super().__init__()
        self._own = {name: model.arch.parameter(name) for name in names}
        self.copies = nn.ParameterList(nn.Parameter(own.detach().float().clone()) for own in self._own.values())
        self._owners = {name: _owner(model, name) for name in names}

    def enter(self) -> None:
        self._put(self.copies)

    def leave(self) -> None:
        self._put(self._own.values())

    def edit(self, info: EditInfo) -> Delta:
        changes = {name: copy.detach() - own.float() for (name, own), copy in zip(self._own.items(), self.copies, strict=True)}
        return Delta.from_deltas(changes, info)

    def _put(self, parameters: Any) -> None:
        for (owner, name), parameter in zip(self._owners.values(), parameters, strict=True):
            owner._parameters[name] = parameter


class LoraWeights(Trainable):
    """W -> W + (alpha / rank) up down for each linear layer or convolution (LoRA, Hu et al., arXiv 2106.09685).

    layers: site -> layer. Of a convolution `down` is one of rank channels, and `up` mixes these. alpha: None is the rank. down starts
    normal with deviation 1 / rank and up at zero, as in diffusers' training scripts. A hook on each layer adds what the factors give, so
    that the layer's name and weight stay as they are.
    start: an edit of some of these layers that is not trained: it acts where the factors act, and is part of what `edit` gives.
    """

    def __init__(
        self, layers: Mapping[str, Layer], rank: int, *, alpha: float | None = None, seed: int = 0, start: LowRank | None = None
    ) -> None:
        super().__init__()
        self._layers, self.scale = dict(layers), (rank if alpha is None else alpha) / rank
        place = {site: layer.weight.device for site, layer in layers.items()}
        starts = {
            site: torch.randn(rank, *layer.weight.shape[1:], generator=seeded("lora", seed, site)) / rank for site, layer in layers.items()
        }
        self.down = nn.ParameterList(nn.Parameter(start.to(place[site])) for site, start in starts.items())
        self.up = nn.ParameterList(nn.Parameter(torch.zeros(len(one.weight), rank, device=place[site])) for site, one in layers.items())
        self.start = start
        self._given = {site: tuple(part.to(place[site]) for part in parts) for site, parts in _parts(start).items()} if start else {}
        self._handles: list[Any] = []

    def enter(self) -> None:
        for site, parts in self._given.items():
            self._handles.append(self._layers[site].register_forward_hook(partial(_add, 1.0, parts)))
        for layer, down, up in zip(self._layers.values(), self.down, self.up, strict=True):
            self._handles.append(layer.register_forward_hook(partial(_add, self.scale, (down, up))))

    def leave(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def edit(self, info: EditInfo) -> LowRank:
        factors = zip(self._layers, self.down, self.up, strict=True)
        trained = LowRank.from_factors({site: (self.scale * up.detach(), down.detach()) for site, down, up in factors}, info)
        return LowRank.merge([self.start, trained], info=info) if self.start else trained


class WordsAndWeights(Trainable):
    """New words, which are in the model already, and weights that are trained with them.

    `off` leaves the words where they are: no prompt for the model as it was has them. finish: what becomes of the change of the
    weights, None is nothing.
    """

    def __init__(self, rows: TokenRows, weights: Trainable, finish: Callable[[Any], Edit] = lambda change: change) -> None:
        super().__init__()
        self.rows, self.weights, self._finish = rows, weights, finish

    def enter(self) -> None:
        self.weights.enter()

    def leave(self) -> None:
        self.weights.leave()

    def edit(self, info: EditInfo) -> Edit:
        """The words, then the change of the weights, where there are some."""
        if not any(True for _ in self.weights.parameters()):
            return self.rows.edit(info)
        part = replace(info, on=(), triggers=(), config={}, notes={})
        return Chain.of([self.rows.edit(part), self._finish(self.weights.edit(part))], info=info)


class WithAuxiliary(Trainable):
    """Weights, and modules that are trained beside them and are no part of the edit."""

    def __init__(self, weights: Trainable, auxiliary: nn.Module) -> None:
        super().__init__()
        self.weights, self.auxiliary = weights, auxiliary

    def enter(self) -> None:
        self.weights.enter()

    def leave(self) -> None:
        self.weights.leave()

    def edit(self, info: EditInfo) -> Edit:
        return self.weights.edit(info)


class ModuleWeights(Trainable):
    """y -> y + f(y) for the output y of attention modules, with a small module f for each, which adds nothing at first.

    sites: of `Architecture.attention_sites`. form: of `toolkit.edits.module.FORMS`.
    """

    def __init__(self, model: Model, sites: Iterable[str], *, form: str, rank: int, seed: int = 0) -> None:
        super().__init__()
        self._form, self._handles = form, list[Any]()
        self._seen: dict[str, Tensor] | None = None
        known = model.arch.attention_sites()
        self._attention = {site: known[site] for site in sites}
        self._weights: dict[str, dict[str, nn.Parameter]] = {}
        for site in self._attention:
            start = FORMS[form].start(model.arch.attention_width(site), rank, seeded("module", seed, site))
            self._weights[site] = {name: nn.Parameter(tensor.to(model.arch.device)) for name, tensor in start.items()}
        self.weights = nn.ParameterList(weight for weights in self._weights.values() for weight in weights.values())

    def enter(self) -> None:
        for site, attention in self._attention.items():
            self._handles.append(add_after(attention, FORMS[self._form], self._weights[site], seen=partial(self._note, site)))

    def leave(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    @contextmanager
    def added(self) -> Iterator[dict[str, Tensor]]:
        """Site -> what its module adds in the last prediction of the block [n, tokens, d], with the graph."""
        self._seen = {}
        try:
            yield self._seen
        finally:
            self._seen = None

    def edit(self, info: EditInfo) -> ModuleEdit:
        return ModuleEdit.from_modules({site: SmallModule(self._form, weights) for site, weights in self._weights.items()}, info)

    def _note(self, site: str, added: Tensor) -> None:
        if self._seen is not None:
            self._seen[site] = added


def _parts(edit: LowRank) -> dict[str, tuple[Tensor, ...]]:
    """Site -> the matrices that an edit of linear layers is the product of, the first to be applied first."""
    return {**{site: (edit.down[site], up) for site, up in edit.up.items()}, **{site: (dense,) for site, dense in edit.dense.items()}}


def _add(scale: float, parts: Sequence[Tensor], module: Layer, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """A layer's output with that of these parts of its change, one after the other; the first one is of the layer's kind."""
    first, *rest = parts
    value = given[0].to(first.dtype)
    if isinstance(module, nn.Conv2d):
        value = F.conv2d(value, first, None, module.stride, module.padding, module.dilation)  # pyright: ignore[reportArgumentType]
        for part in rest:
            value = F.conv2d(value, part[:, :, None, None])
    else:
        for part in parts:
            value = F.linear(value, part)
    return output + scale * value.to(output.dtype)


def _owner(model: Model, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and what the parameter is called there."""
    component, _, path = name.partition(".")
    owner, _, own = path.rpartition(".")
    return model.arch.components()[component].get_submodule(owner), own
