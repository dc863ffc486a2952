"""Runs an experiment: every cell, and every attack on it, is one JSON file, and what is there already is not measured again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from eval import stored
from eval.bench_attacks import Attacked, attacked, attempt, scenario
from eval.bench_images import Gallery
from eval.bench_results import Costs, Measured
from eval.bench_work import claimed
from eval.cells import Cell, Pair
from eval.fidelity import drift, oracle_kid
from eval.rates import Painter, Shown
from eval.stored import from_json, shown_of, to_json
from eval.unedited import Unedited
from toolkit.errors import UserError
from toolkit.io.files import FILE_NAME, load_edit, save_edit
from toolkit.runs import device_name, timed
from toolkit.world.scenes import World

if TYPE_CHECKING:
    from toolkit.edits.base import Edit
    from toolkit.model import Model

DRIFT = 32  # images of everything else whose pixels are compared with those of the unedited model
EDITS, IMAGES = "edits", "images"  # folders in `Bench.out`


@dataclass
class Bench:
    """Where cells are measured. out: the folder that new files go to; those in `stored.RESULTS` are found as well.

    images: whether images are kept. Edits are kept where something is asked of them that may be asked again: images, or attacks.
    """

    world: World
    model: Model
    painter: Painter
    out: Path
    images: bool = False

    @cached_property
    def measured_by(self) -> dict[str, Any]:
        """What the painter measures with; it hashes the oracle's weights, so once for all cells."""
        return self.painter.measured_by()

    @cached_property
    def unedited(self) -> Unedited:
        """What the model draws without an edit."""
        file = self.out / f"unedited.{_hash(self.model.fingerprint, self.measured_by)}.json"
        return Unedited(self.world, self.model, self.painter, file, self.gallery)

    @cached_property
    def base(self) -> Model:
        """The unedited model, to attack beside the edited one."""
        return self.model.reference()

    @property
    def gallery(self) -> Gallery:
        """The images that are kept."""
        return Gallery(self.out / IMAGES, self.images)

    # --- files ----------------------------------------------------------------------------------------------------------
    def file(self, cell: Cell) -> Path:
        """The JSON file of a cell. Another model, task, method, option or way to draw has another file."""
        return self.out / f"{cell.name}.{_hash(*self._key(cell))}.json"

    def attack_file(self, cell: Cell, label: str) -> Path:
        """The JSON file of an attack on a cell, likewise."""
        attack = cell.attacks[label]
        return self.out / f"{cell.name}.{label}.{_hash(*self._key(cell), attack.name(), attack.config(), cell.n)}.json"

    def control_file(self, cell: Cell, label: str) -> Path:
        """The JSON file of an attack's control, which knows nothing of the cell but how many images are asked for."""
        attack = cell.attacks[label]
        return self.out / f"control.{label}.{_hash(attack.name(), attack.config(), cell.n, self.model.fingerprint, self.measured_by)}.json"

    def edit_file(self, cell: Cell) -> Path:
        """Where a cell's edit is kept."""
        return self.out / EDITS / f"{self.file(cell).stem}.safetensors"

    def _key(self, cell: Cell) -> tuple[Any, ...]:
        """What a cell's images depend on, beside the prompts."""
        return cell.fitted.name(), cell.fitted.config(), cell.goal, self.model.fingerprint, self.measured_by

    # --- what is there --------------------------------------------------------------------------------------------------
    def missing(self, cell: Cell) -> list[str]:
        """The labels whose images the cell's file (or the gallery, where they are kept) does not hold, and the attacks not tried."""
        return [*self._undrawn(cell, self._record(cell)), *self._untried(cell)]

    def measured(self, cell: Cell) -> Measured | None:
        """What the cell's file holds; None when anything is missing."""
        record = self._record(cell)
        if _missing(record, cell):
            return None
        images = {}
        for label, pairs in cell.asked.items():
            drawn = _by_prompts(map(from_json, record["images"][label]))
            images[label] = [drawn[pair] for pair in pairs]
        costs = Costs(record["seconds"], record["peak_memory_mb"], record["bytes"], record.get("device", "CPU"))
        return Measured(cell, images, costs, record["steps"], record["kid"], record.get("drift", ()))

    def attacked(self, cell: Cell) -> list[Attacked]:
        """What the attacks on a cell achieved, as far as they were tried."""
        return [
            attacked(cell, label, stored.read(file, {}), stored.read(self.control_file(cell, label), {}), file.stem)
            for label in cell.attacks
            if stored.found(file := self.attack_file(cell, label))
        ]

    def _record(self, cell: Cell) -> dict[str, Any]:
        """What the cell's file holds, or an empty record."""
        return stored.read(self.file(cell), {"images": {}, "kid": [None, None]})

    def _undrawn(self, cell: Cell, record: Mapping[str, Any]) -> list[str]:
        """The labels whose images are missing."""
        lost = _missing(record, cell)
        return [label for label, pairs in cell.asked.items() if label in lost or self._unkept(cell, pairs)]

    def _unkept(self, cell: Cell, pairs: Iterable[Pair]) -> bool:
        """Whether an image before or after is to be kept and is not there."""
        before, after = zip(*pairs, strict=True)
        return self.gallery.lacks(self.unedited.file.stem, before) or self.gallery.lacks(self.file(cell).stem, after)

    def _untried(self, cell: Cell) -> list[str]:
        """The attacks without a result, or without the result of their control."""
        return [label for label in cell.attacks if self._lacks_attack(cell, label) or self._lacks_control(cell, label)]

    def _lacks_attack(self, cell: Cell, label: str) -> bool:
        """Whether an attack has no result, or none of its images where they are kept."""
        file = self.attack_file(cell, label)
        if not stored.found(file):
            return True
        rows = stored.read(file, {}).get("images", ())
        return self.gallery.lacks(file.stem, [shown_of(row).prompt for row in rows])

    def _lacks_control(self, cell: Cell, label: str) -> bool:
        """Whether an attack that has a control has no result of it."""
        return cell.attacks[label].controlled and not stored.found(self.control_file(cell, label))

    # --- measuring ------------------------------------------------------------------------------------------------------
    def measure(self, cell: Cell) -> None:
        """Fit the method unless its edit is kept, draw what is missing before and after, and try the attacks that were not tried.

        Every label and every attack is written when it is done.
        """
        if self.model.arch.name not in cell.fitted.architectures:
            raise UserError(
                f"{cell.method} does not work on {self.model.arch.name} models; take it out of the experiment, or give another --model"
            )
        record = self._record(cell)
        edit = self._edit(cell, record)
        for label in self._undrawn(cell, record):
            self._draw(cell, label, edit, record)
            stored.write(self.file(cell), record)
        for label in self._untried(cell):
            self._attack(cell, label, edit)

    def _edit(self, cell: Cell, record: dict[str, Any]) -> Edit:
        """The cell's edit: the one that is kept, or else fitted now; the record then says what made it and what it cost."""
        kept = self.edit_file(cell)
        if kept.is_file() and "seconds" in record:
            return load_edit(kept)
        method, keeps = cell.fitted, bool(cell.attacks) or self.images
        with TemporaryDirectory() as folder:
            task = cell.to_fit(self.world, Path(folder))
            with timed() as cost:
                edit = method.fit(self.model, task)
            edit = cell.asked_by(edit, self.model, self.world)
            size = save_edit(edit, kept if keeps else Path(folder) / FILE_NAME).stat().st_size
        record |= {
            "method": method.name(),
            "config": method.config(),
            "task": asdict(cell.goal),
            "measured_by": self.measured_by,
            **asdict(cost),
            "device": device_name(self.model.arch.device),
            "bytes": size,
            "steps": edit.info.notes.get("steps"),
        }
        if keeps and self._undrawn(cell, record):  # else a run that goes on has the edit and does not know what it cost
            stored.write(self.file(cell), record)
        return edit

    def _draw(self, cell: Cell, label: str, edit: Edit, record: dict[str, Any]) -> None:
        """The images of a label, and what is measured on their pixels, into the record."""
        asked = cell.asked[label]
        first, title = [first for first, _ in asked], f"{cell.name}, {label}, before"
        kid = self.unedited.kid(first, title) if label == "name" else None
        before = self.unedited.shown(first, title)
        with self.model.attached(edit):
            after = self.painter.draw(self.model, [second for _, second in asked], f"{cell.name}, {label}, after")
        self.gallery.keep(self.file(cell).stem, after)
        held = map(from_json, record["images"].get(label, ()))
        drawn = _by_prompts([*held, *zip(before, after, strict=True)])
        record["images"][label] = [to_json(*pair) for pair in drawn.values()]
        if label == "name":
            record["kid"] = [kid, oracle_kid(self.world, self.painter.oracle, after).as_json()["value"]]
        if label == "kept":
            moved = drift(self.painter.draw(self.model, first[:DRIFT], title), after[:DRIFT])
            record["drift"] = [round(value, 6) for value in moved]  # the digits behind depend on how images were batched

    def _attack(self, cell: Cell, label: str, edit: Edit) -> None:
        """Try an attack on the edit, and its control once for all cells, and write what they achieved."""
        attack, file, control = cell.attacks[label], self.attack_file(cell, label), self.control_file(cell, label)
        with self.model.attached(edit):
            tried = scenario(cell, self.world, self.painter, self.model, self.base)
            if self._lacks_attack(cell, label):
                record, found = attempt(attack, lambda: attack.run(tried), cell.n, self.measured_by)
                if found:
                    self.gallery.keep(file.stem, found.shown)
                    if found.edit:
                        save_edit(found.edit, self.out / EDITS / f"{file.stem}.safetensors")
                stored.write(
                    file, {**record, "method": cell.fitted.name(), "method_config": cell.fitted.config(), "task": asdict(cell.goal)}
                )
            if self._lacks_control(cell, label):
                with claimed(control, wait=True):
                    if self._lacks_control(cell, label):
                        stored.write(control, attempt(attack, lambda: attack.run(tried.control()), cell.n, self.measured_by)[0])


def _hash(*parts: Any) -> str:
    """A name for what these values say."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=6).hexdigest()


def _missing(record: Mapping[str, Any], cell: Cell) -> list[str]:
    """The labels of a cell whose images are not in its record."""
    held = {label: _by_prompts(map(from_json, rows)) for label, rows in record["images"].items()}
    return [label for label, pairs in cell.asked.items() if not held.get(label, {}).keys() >= set(pairs)]


def _by_prompts(pairs: Iterable[tuple[Shown, Shown]]) -> dict[Pair, tuple[Shown, Shown]]:
    """The images of a label by what they were asked for, before and after."""
    return {(before.prompt, after.prompt): (before, after) for before, after in pairs}
