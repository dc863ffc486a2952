"""Small modules behind attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolkit.edits.base import Edit, EditInfo, frozen, read_by
from toolkit.errors import UserError, unknown

if TYPE_CHECKING:
    from toolkit.model import Model

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Form:
    """A kind of small module.

    shapes: name of a tensor -> a letter for each of its axes; axes of one letter have one size, "d" is the width of the attention's
    output. apply: from the tensors and that output [..., d], what is added to it. start: from d, a rank and a generator, tensors with
    which nothing is added yet.
    """

    shapes: Mapping[str, str]
    apply: Callable[[Weights, Tensor], Tensor]
    start: Callable[[int, int, torch.Generator], dict[str, Tensor]]


def bottleneck(weights: Weights, output: Tensor) -> Tensor:
    """up(gelu(down(output))): an adapter (Houlsby et al., arXiv 1902.00751)."""
    inner = F.gelu(F.linear(output, weights["down.weight"], weights["down.bias"]))
    return F.linear(inner, weights["up.weight"], weights["up.bias"])


def start_bottleneck(width: int, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    """down as torch starts a linear layer, up at zero."""
    bound = width**-0.5
    weight, bias = ((2 * torch.rand(shape, generator=generator) - 1) * bound for shape in ((rank, width), (rank,)))
    return {"down.weight": weight, "down.bias": bias, "up.weight": torch.zeros(width, rank), "up.bias": torch.zeros(width)}


FORMS: dict[str, Form] = {
    "bottleneck": Form({"down.weight": "rd", "down.bias": "r", "up.weight": "dr", "up.bias": "d"}, bottleneck, start_bottleneck),
}


@dataclass(frozen=True, eq=False)
class SmallModule:
    """A module of one of `FORMS` and its tensors."""

    form: str
    weights: Weights

    def sizes(self, site: str) -> dict[str, int]:
        """Letter -> size of the form's axes. Tensors that are not the form's are a UserError; site: for its message."""
        if self.form not in FORMS:
            raise unknown("form of a module", self.form, FORMS)
        shapes, sizes = FORMS[self.form].shapes, dict[str, int]()
        given = {name: tuple(tensor.shape) for name, tensor in self.weights.items()}
        for name, letters in shapes.items():
            for letter, size in zip(letters, given.get(name, ()), strict=False):
                sizes.setdefault(letter, size)
        if given != {name: tuple(sizes.get(letter, -1) for letter in letters) for name, letters in shapes.items()}:
            needed = ", ".join(f"{name} [{', '.join(letters)}]" for name, letters in shapes.items())
            raise UserError(f"{self.form} module of {site} has {given}, needs {needed}; fit or download it again")
        return sizes


@dataclass(frozen=True, eq=False)
class ModuleEdit(Edit):
    """y -> y + scale * f(y) for the output y of attention modules, with a small module f for each of them.

    modules: site of `Architecture.attention_sites` -> module. Where an attention has outputs of several kinds, y is the first, the
    image's. Attached, a forward hook on each of them adds what its module gives, computed in the model's type; the modules of edits
    that are attached later see the sum.

    File: `<form>.<site>|<name>` for each tensor. Make one with `from_modules`.
    """

    modules: Mapping[str, SmallModule]

    mergeable: ClassVar[bool] = False  # what it adds depends on the image, so that no weights hold it
    scalable: ClassVar[bool] = True
    exports: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for site, module in self.modules.items():
            module.sizes(site)

    @classmethod
    def from_modules(cls, modules: Mapping[str, SmallModule], info: EditInfo | None = None) -> Self:
        """From site -> module. Kept in float32, on the CPU."""
        kept = {site: SmallModule(m.form, {name: frozen(tensor) for name, tensor in m.weights.items()}) for site, m in modules.items()}
        return cls(info or EditInfo(), kept)

    def tensors(self) -> dict[str, Tensor]:
        return {f"{m.form}.{site}|{name}": tensor for site, m in self.modules.items() for name, tensor in m.weights.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], info: EditInfo) -> Self:
        found: dict[tuple[str, str], dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            owner, bar, name = key.partition("|")
            form, dot, site = owner.partition(".")
            if not bar or not dot:
                raise UserError(f"module edit has a tensor {key!r} that belongs to no module; fit or download it again")
            found.setdefault((form, site), {})[name] = tensor
        return cls(info, {site: SmallModule(form, weights) for (form, site), weights in found.items()})

    def sites(self) -> list[str]:
        return list(self.modules)

    def delta(self, site: str) -> Tensor:
        """The module's tensors, flattened, one after another."""
        if site not in self.modules:
            raise unknown("site", site, self.modules)
        return torch.cat([tensor.float().flatten() for tensor in self.modules[site].weights.values()])

    @property
    def writes(self) -> frozenset[str]:
        return frozenset(site.partition(".")[0] for site in self.modules)

    @property
    def reads(self) -> frozenset[str]:
        return read_by(self.writes)

    def enter(self, model: Model, scale: float = 1.0) -> list[Any]:
        """Hooks, whose handles it returns. Nothing is changed when it raises."""
        known = model.arch.attention_sites()
        for site, module in self.modules.items():
            if site not in known:
                what = f"edit adds to {site}, which {model.source} ({model.arch.name}) does not have"
                raise UserError(f"{what}; attach it to a model like the one it was fitted on")
            if (given := module.sizes(site)["d"]) != (needed := model.arch.attention_width(site)):
                what = f"module of {site} is for width {given}, the attention of {model.source} has {needed}"
                raise UserError(f"{what}; attach it to a model like the one it was fitted on")
        place, dtype, handles = model.arch.device, model.arch.dtype, []
        for site, module in self.modules.items():
            weights = {name: tensor.to(place, dtype) for name, tensor in module.weights.items()}
            handles.append(add_after(known[site], FORMS[module.form], weights, scale))
        return handles

    def leave(self, model: Model, state: list[Any]) -> None:
        for handle in state:
            handle.remove()


def add_after(attention: nn.Module, form: Form, weights: Weights, scale: float = 1.0, seen: Callable[[Tensor], None] | None = None) -> Any:
    """Adds scale times what a small module gives to what an attention module does. Returns the hook's handle.

    It is computed in the type of the tensors, which are where the output is. seen: is told what is added.
    """
    dtype = next(iter(weights.values())).dtype

    def after(module: nn.Module, given: Any, output: Any) -> Any:
        image, *others = (output,) if isinstance(output, Tensor) else output
        added = scale * form.apply(weights, image.to(dtype))
        if seen is not None:
            seen(added)
        image = image + added.to(image.dtype)
        return (image, *others) if others else image

    return attention.register_forward_hook(after)
