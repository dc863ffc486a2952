"""A model with a list of edits attached to it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from toolkit import registry
from toolkit.arch.base import Architecture
from toolkit.arch.single_file import recognise
from toolkit.attention_backend import ATTENTIONS, use_attention
from toolkit.edits.base import Edit, EditInfo, by_precedence, not_mergeable
from toolkit.errors import UserError, unknown
from toolkit.fingerprint import fingerprint, same_base
from toolkit.io.files import PICKLES
from toolkit.io.lazy import load_lazily

if TYPE_CHECKING:
    from toolkit.method import Method

EMBEDDED = Path(__file__).parent / "world" / "assets" / "emoji-sd"
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Attached = tuple[tuple[Edit, float], ...]


@dataclass(frozen=True)
class Touched:
    """A parameter that attached edits change: its base values, and the edits whose result it holds now."""

    base: Tensor
    edits: list[tuple[Edit, float]]


class Model:
    """A text-to-image model and the edits attached to it.

    Every attach and detach recomputes the touched parameters from their base values: base, then the edits in order (masks
    before the others), in float32, rounded once to the parameter's type. The base tensors themselves are kept and put back, so the order of
    detaching does not matter and a model without edits is bit for bit what it was. Tokens and modules that an edit
    brings are left in reverse order and entered again in the new one.

    arch: the loaded architecture. source: where it came from, for messages. strict: what is otherwise a warning
    (another base, a conflict between edits) is an error.
    """

    def __init__(self, arch: Architecture, source: str = "", *, strict: bool = False) -> None:
        self.arch = arch
        self.source = source or arch.name
        self.strict = strict
        self._attached: Attached = ()
        self._touched: dict[str, Touched] = {}
        self._entered: list[tuple[Edit, Any]] = []
        self._read_base()

    @property
    def guidance(self) -> float:
        """The guidance scale when none is given: 2 for the embedded model, which larger ones spoil, else its family's."""
        return 2.0 if self.source == "emoji-sd" else self.arch.default_guidance

    def info(self, method: Method, triggers: Sequence[str] = (), notes: Mapping[str, Any] | None = None) -> EditInfo:
        """Where an edit comes from that a method fits to this model as it is now."""
        on = tuple(edit.info.method or edit.kind() for edit, _ in self.edits)
        return EditInfo(method.name(), method.config(), self.fingerprint, on, tuple(triggers), notes or {})

    # --- edits --------------------------------------------------------------------------------------------------
    @property
    def edits(self) -> Attached:
        """The attached edits with their scales, in the order in which they apply."""
        return self._attached

    def attach(self, edit: Edit, scale: float = 1.0) -> None:
        """Put an edit on top of the attached ones.

        An edit that does not fit is a UserError and leaves the model as it was. One that was fitted on another base, or
        that changes what an attached one was fitted to, is a warning (an error when the model is strict).
        """
        if any(edit is other for other, _ in self._attached):
            raise UserError(f"this {edit.kind()} edit is attached already; detach it, or attach it once with another scale")
        earlier = [part for other, _ in self._attached for part, _ in other.parts()]
        for part, own in edit.parts(scale):
            self._check(part, own, earlier)
            earlier.append(part)
        self._set((*self._attached, (edit, scale)))

    def detach(self, edit: Edit) -> None:
        """Take an edit off; the others stay."""
        rest = tuple(pair for pair in self._attached if pair[0] is not edit)
        if rest == self._attached:
            raise UserError(f"this {edit.kind()} edit is not attached; attached are {len(rest)} others")
        self._set(rest)

    def detach_all(self) -> None:
        """Back to the base model."""
        self._set(())

    @contextmanager
    def attached(self, *edits: Edit, scale: float = 1.0) -> Iterator[Self]:
        """Within the block these edits are attached too; after it the same edits as before it, also when it raises."""
        before = self._attached
        try:
            for edit in edits:
                self.attach(edit, scale)
            yield self
        finally:
            self._set(before)

    def merge(self) -> None:
        """Write the attached edits into the weights for good. An edit that cannot be is a UserError."""
        self._check_mergeable()
        self._attached, self._touched, self._entered = (), {}, []
        self._read_base()

    def save(self, folder: str | Path) -> Path:
        """Write the model with the attached edits merged as a diffusers folder. The model itself stays as it is."""
        self._check_mergeable()
        return self.arch.save(Path(folder))

    # --- copies and places --------------------------------------------------------------------------------------
    def reference(self, edits: Sequence[Edit | tuple[Edit, float]] = ()) -> Model:
        """A frozen model with only these edits (each with its scale, else 1), independent of what is done to this one.

        What nobody writes (the image decoder, the base tokenizers) is shared with this model.
        """
        with self._bare():
            arch = self.arch.copy()
        for module in arch.components().values():
            module.eval().requires_grad_(False)
        model = Model(arch, self.source, strict=self.strict)
        for item in edits:
            edit, scale = item if isinstance(item, tuple) else (item, 1.0)
            model.attach(edit, scale)
        return model

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move or round the model; attached edits are computed anew from the moved base."""
        rounded: dict[str, Any] = {"dtype": dtype} if dtype else {}
        moved: dict[str, Any] = {"device": device or self.arch.device, **rounded}
        with self._bare():
            for module in self.arch.components().values():
                left_in_file = any(parameter.is_meta for parameter in module.parameters())
                try:
                    module.to(**(rounded if left_in_file else moved))
                except (RuntimeError, AssertionError) as error:
                    reason = str(error).splitlines()[0]
                    raise UserError(f"cannot move the model to {device}: {reason}; give a device that this machine has") from error
        return self

    # --- how ----------------------------------------------------------------------------------------------------
    @contextmanager
    def _bare(self) -> Iterator[None]:
        """Without any edit within the block."""
        before = self._attached
        self._set(())
        try:
            yield
        finally:
            self._set(before)

    def _set(self, attached: Attached) -> None:
        """Make these the attached edits. When one of them raises, the model is as before."""
        before = self._attached
        try:
            self._apply(attached)
        except BaseException:
            self._apply(before)
            raise

    @torch.no_grad()
    def _apply(self, attached: Attached) -> None:
        """Leave all, recompute what is touched differently, enter all. Weights come first: entering may extend them."""
        while self._entered:
            edit, state = self._entered[-1]
            edit.leave(self, state)
            self._entered.pop()
        parts = [part for edit, scale in attached for part in edit.parts(scale)]
        touching: dict[str, list[tuple[Edit, float]]] = {}
        for part in by_precedence(parts):
            for name in part[0].parameter_names():
                touching.setdefault(name, []).append(part)
        for name in self._touched.keys() - touching.keys():
            self.arch.parameter(name).data = self._touched[name].base
            del self._touched[name]
        for name, edits in touching.items():
            parameter, touched = self.arch.parameter(name), self._touched.get(name)
            if touched and touched.edits == edits:
                continue
            base = touched.base if touched else parameter.data
            value = base.to(torch.promote_types(base.dtype, torch.float32))
            for edit, scale in edits:
                value = edit.weight(name, value, scale)
            self._touched[name] = Touched(base, edits)
            parameter.data = value.to(base.dtype)
        for edit, scale in parts:
            self._entered.append((edit, edit.enter(self, scale)))
        self._attached = attached

    def _read_base(self) -> None:
        """Note what identifies the base, and the shapes that edits must fit; to be called with nothing attached."""
        parts = self.arch.components().items()
        self._shapes = {f"{part}.{name}": tuple(p.shape) for part, module in parts for name, p in module.named_parameters()}
        self.fingerprint = fingerprint(self.arch)
        """What identifies the base model whatever is attached: `EditInfo.base` of the edits fitted on it."""

    # --- checks -------------------------------------------------------------------------------------------------
    def _check(self, edit: Edit, scale: float, earlier: Sequence[Edit]) -> None:
        """Whether one part of an edit can go on top of the earlier ones."""
        if scale != 1.0 and not edit.scalable:
            raise UserError(f"a {edit.kind()} edit cannot be scaled, scale {scale} was given; attach it with scale 1")
        for name in edit.parameter_names():
            given, needed = edit.shape(name), self._shapes.get(name)
            if needed is None:
                what = f"edit changes {name}, which {self.source} ({self.arch.name}) does not have"
                raise UserError(f"{what}; attach it to a model like the one it was fitted on")
            if given != needed:
                what = f"edit of {name} is {list(given)}, the parameter of {self.source} is {list(needed)}"
                raise UserError(f"{what}; attach it to a model like the one it was fitted on")
        if not same_base(edit.info.base, self.fingerprint):
            self._report(f"{edit.info.method or edit.kind()} edit was fitted on another base than {self.source}; fit it on this one")
        for other in earlier:
            if clash := other.reads & edit.writes:
                what = f"{edit.info.method or edit.kind()} edit changes the {' and '.join(sorted(clash))}"
                self._report(f"{what} that the earlier {other.info.method or other.kind()} edit was fitted to; attach it before that one")

    def _report(self, message: str) -> None:
        if self.strict:
            raise UserError(message)
        warnings.warn(message, stacklevel=4)

    def _check_mergeable(self) -> None:
        for edit, _ in (part for attached, scale in self._attached for part in attached.parts(scale)):
            if not edit.mergeable:
                raise not_mergeable(edit)


def load_model(
    source: str = "emoji-sd",
    *,
    device: str = "cpu",
    dtype: str = "float32",
    attention: str = "sdpa",
    strict: bool = False,
    lazily: bool = False,
) -> Model:
    """A model from "emoji-sd" (the embedded one), a diffusers folder, a .safetensors checkpoint or a hub id. Failing to is a UserError.

    dtype: float32, float16 or bfloat16. attention: sdpa (PyTorch's) or xformers, which computes on CUDA devices alone; see
    `use_attention`. lazily: leave the denoiser and the image decoder in their files, when they are on the disk and not on a hub; see
    `load_lazily`.
    """
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if attention not in ATTENTIONS:
        raise unknown("attention", attention, ATTENTIONS)
    path = str(EMBEDDED) if source == "emoji-sd" else source
    family = architecture(path)
    load = partial(load_lazily, family) if lazily and Path(path).exists() else family.load
    model = Model(load(path, dtype=DTYPES[dtype]), source, strict=strict).to(device)
    use_attention(model.arch, attention, device)
    return model


def architecture(source: str) -> type[Architecture]:
    """The architecture of a single file, from what it holds, or of a diffusers folder or hub id, from its model_index.json."""
    if not Path(source).is_dir() and Path(source).suffix in (".safetensors", *PICKLES):
        return recognise(source).family
    if not (Path(source, "model_index.json").is_file() or (HUB_ID.fullmatch(source) and not Path(source).exists())):
        what = f"no model folder at {source!r}"
        raise UserError(f"{what}; give emoji-sd, a diffusers folder, a .safetensors file or a hub id such as owner/name")
    try:
        config: Any = DiffusionPipeline.load_config(source)
        name = config["_class_name"]
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"cannot load {source!r} ({reason}); give emoji-sd, a diffusers folder or a hub id that can be reached") from error
    families = [registry.load("arch", family) for family in registry.names("arch")]
    pipelines = {pipeline: family for family in families for pipeline in family.pipelines}
    if name not in pipelines:
        raise unknown(f"pipeline class in {source}", name, pipelines)
    return pipelines[name]
