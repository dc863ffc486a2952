"""The models and edits that the app may use: those of its command line, and those in its working folder. Knows no Gradio."""

from __future__ import annotations

import gc
from argparse import Namespace
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.errors import UserError
from toolkit.workspace import PARTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from toolkit.edits.base import Edit
    from toolkit.model import Model
    from toolkit.workspace import Workspace


@dataclass
class Shelf:
    """One model is in memory at a time, without edits between jobs.

    workspace: whose `models/`, `edits/` and `runs/` are on it too. given: edits of the command line by name, with their scales.
    options: `device`, `dtype` and so on of models that are loaded later. allow_hub: whether hub ids may be loaded.
    """

    workspace: Workspace
    model: Model
    given: Mapping[str, tuple[Edit, float]]
    options: Mapping[str, Any]
    allow_hub: bool = False

    def __post_init__(self) -> None:
        self.first = self.model.source

    @classmethod
    def of(cls, args: Namespace, workspace: Workspace) -> Shelf:
        """With what --model, --edit and the others ask for, loaded."""
        from toolkit.commands import open_model

        model = open_model(args)
        edits = model.edits
        model.detach_all()
        names = [Path(written.rpartition("@")[0] or written).stem for written in args.edit]
        given = {f"given/{number}-{name}": edit for number, (name, edit) in enumerate(zip(names, edits, strict=True), 1)}
        return cls(workspace, model, given, vars(args), args.allow_hub)

    # --- models -----------------------------------------------------------------------------------------------------
    def models(self) -> list[str]:
        """The names of the models that may be loaded, besides hub ids."""
        return list(dict.fromkeys([self.first, "emoji-sd", *self.workspace.models()]))

    def check_model(self, name: str) -> str:
        """The name, if it may be loaded. Anything else is a UserError; nothing is loaded."""
        from toolkit.model import HUB_ID

        if name in self.models():
            return name
        if not HUB_ID.fullmatch(name) or name.partition("/")[0] in ("", name, *PARTS) or Path(name).exists():
            raise UserError(f"no model {name[:100]!r}; choose one from the list, or put it into {self.workspace.folder / 'models'}")
        if not self.allow_hub:
            raise UserError(f"{name[:100]!r} would be loaded from a hub, which is off; start the app with --allow-hub")
        return name

    def source(self, name: str) -> str:
        """What `load_model` is given for this name."""
        return str(self.workspace.path(name)) if name in self.workspace.models() else name

    def place(self, name: str) -> Path | None:
        """Where a model is on the disk; None for one on a hub."""
        from toolkit.model import EMBEDDED

        path = EMBEDDED if name == "emoji-sd" else Path(self.source(name))
        return path if path.exists() else None

    def open(self, name: str) -> Model:
        """The model of this name, without edits; for jobs. The one that was in memory before is let go of."""
        from toolkit.commands import open_model

        if self.check_model(name) != self.model.source:
            source = self.source(name)
            del self.model  # memory for one, not for two
            gc.collect()
            try:
                self.model = open_model(Namespace(**{**self.options, "model": source, "edit": []}))
            except BaseException:
                self.model = open_model(Namespace(**{**self.options, "model": self.first, "edit": []}))
                raise
            self.model.source = name
        self.model.detach_all()
        return self.model

    # --- edits ------------------------------------------------------------------------------------------------------
    def edits(self) -> list[tuple[str, str]]:
        """A label and the name of every edit, the command line's first, then the newest run's."""
        return [(name.partition("/")[2], name) for name in (*self.given, *self.workspace.edits())]

    def scale(self, name: str) -> float:
        """The strength to begin with."""
        return self.given[name][1] if name in self.given else 1.0

    def scalable(self, name: str) -> bool:
        """Whether an edit has strengths besides 1."""
        return all(part.scalable for part, _ in self.edit(name, self.model).parts())

    def edit(self, name: str, model: Model | Callable[[], Model]) -> Edit:
        """The edit of this name, for a model, or for what gives it when another tool's file needs it."""
        from toolkit.io.files import load_edit

        if name in self.given:
            return self.given[name][0]
        if name not in self.workspace.edits():
            raise UserError(f"no edit {name[:100]!r}; choose one from the list")
        return load_edit(self.workspace.edit_file(name), model)

    @contextmanager
    def edited(self, model: Model, strengths: Mapping[str, float]) -> Iterator[Model]:
        """Within the block these edits are attached, in their order."""
        edits = [(self.edit(name, model), strength) for name, strength in strengths.items()]
        try:
            for edit, strength in edits:
                model.attach(edit, strength)
            yield model
        finally:
            model.detach_all()
