"""Runs an experiment: every cell is one JSON file, and what is there already, of whatever experiment, is not measured again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from eval import stored
from eval.bench_results import Costs, Measured
from eval.cells import Cell, Pair
from eval.fidelity import drift, oracle_kid
from eval.rates import Painter, Shown
from eval.stored import from_json, to_json
from eval.unedited import Unedited
from toolkit.errors import UserError
from toolkit.io.files import FILE_NAME, save_edit
from toolkit.runs import timed
from toolkit.world.scenes import World

if TYPE_CHECKING:
    from toolkit.model import Model

DRIFT = 32  # images of everything else whose pixels are compared with those of the unedited model


@dataclass
class Bench:
    """Where cells are measured. out: the folder that new files go to; those in `stored.RESULTS` are found as well."""

    world: World
    model: Model
    painter: Painter
    out: Path

    @cached_property
    def measured_by(self) -> dict[str, Any]:
        """What the painter measures with; it hashes the oracle's weights, so once for all cells."""
        return self.painter.measured_by()

    @cached_property
    def unedited(self) -> Unedited:
        """What the model draws without an edit."""
        key = hashlib.blake2b(repr((self.model.fingerprint, self.measured_by)).encode(), digest_size=6).hexdigest()
        return Unedited(self.world, self.model, self.painter, self.out / f"unedited.{key}.json")

    def file(self, cell: Cell) -> Path:
        """The JSON file of a cell. Another model, task, method, option or way to draw has another file."""
        key = repr((cell.fitted.name(), cell.fitted.config(), cell.goal, self.model.fingerprint, self.measured_by))
        return self.out / f"{cell.name}.{hashlib.blake2b(key.encode(), digest_size=6).hexdigest()}.json"

    def missing(self, cell: Cell) -> list[str]:
        """The labels whose images the cell's file does not hold."""
        return _missing(self._record(cell), cell)

    def measured(self, cell: Cell) -> Measured | None:
        """What the cell's file holds; None when anything is missing."""
        record = self._record(cell)
        if _missing(record, cell):
            return None
        images = {}
        for label, pairs in cell.asked.items():
            drawn = _by_prompts(map(from_json, record["images"][label]))
            images[label] = [drawn[pair] for pair in pairs]
        costs = Costs(record["seconds"], record["peak_memory_mb"], record["bytes"])
        return Measured(cell, images, costs, record["steps"], record["kid"], record.get("drift", ()))

    def measure(self, cell: Cell) -> None:
        """Fit the method, draw what is missing before and after, and write what the oracle reads, label by label."""
        method, record = cell.fitted, self._record(cell)
        if self.model.arch.name not in method.architectures:
            raise UserError(
                f"{cell.method} does not work on {self.model.arch.name} models; take it out of the experiment, or give another --model"
            )
        with TemporaryDirectory() as folder:
            task = cell.to_fit(self.world, Path(folder))
            with timed() as cost:
                edit = method.fit(self.model, task)
            size = save_edit(edit, Path(folder) / FILE_NAME).stat().st_size
        record |= {
            "method": method.name(),
            "config": method.config(),
            "task": asdict(cell.goal),
            "measured_by": self.measured_by,
            **asdict(cost),
            "bytes": size,
            "steps": edit.info.notes.get("steps"),
        }
        for label in _missing(record, cell):
            asked = cell.asked[label]
            first, title = [first for first, _ in asked], f"{cell.name}, {label}, before"
            kid = self.unedited.kid(first, title) if label == "name" else None
            before = self.unedited.shown(first, title)
            with self.model.attached(edit):
                after = self.painter.draw(self.model, [second for _, second in asked], f"{cell.name}, {label}, after")
            held = map(from_json, record["images"].get(label, ()))
            drawn = _by_prompts([*held, *zip(before, after, strict=True)])
            record["images"][label] = [to_json(*pair) for pair in drawn.values()]
            if label == "name":
                record["kid"] = [kid, oracle_kid(self.world, self.painter.oracle, after).as_json()["value"]]
            if label == "kept":
                record["drift"] = drift(self.painter.draw(self.model, first[:DRIFT], title), after[:DRIFT])
            stored.write(self.file(cell), record)

    def _record(self, cell: Cell) -> dict[str, Any]:
        """What the cell's file holds, or an empty record."""
        return stored.read(self.file(cell), {"images": {}, "kid": [None, None]})


def _missing(record: Mapping[str, Any], cell: Cell) -> list[str]:
    """The labels of a cell whose images are not in its record."""
    held = {label: _by_prompts(map(from_json, rows)) for label, rows in record["images"].items()}
    return [label for label, pairs in cell.asked.items() if not held.get(label, {}).keys() >= set(pairs)]


def _by_prompts(pairs: Iterable[tuple[Shown, Shown]]) -> dict[Pair, tuple[Shown, Shown]]:
    """The images of a label by what they were asked for, before and after."""
    return {(before.prompt, after.prompt): (before, after) for before, after in pairs}
