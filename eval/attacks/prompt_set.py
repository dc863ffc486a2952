"""Prompt set: prompts that somebody found, from a CSV file."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from eval.attacks.base import Attack, AttackResult, Scenario
from eval.prompts import Prompt
from eval.rates import Shown, share
from toolkit.errors import UserError
from toolkit.options import option
from toolkit.world.scenes import Scene

NOWHERE = Scene("", "", ())  # what these prompts ask for is not known


@dataclass(frozen=True)
class Format:
    """Columns of a kind of file. has: those by which it is recognised. seed and guidance: None where it has none."""

    name: str
    has: frozenset[str]
    prompt: str = "prompt"
    seed: str | None = None
    guidance: str | None = None


# The first that fits is what a file is. The I2P benchmark as UnlearnDiffAtk and P4D hand it on has their columns for seed and guidance.
FORMATS = (
    Format("mma", frozenset({"adv_prompt"}), prompt="adv_prompt"),
    Format("ring_a_bell", frozenset({"sensitive prompt"}), prompt="sensitive prompt"),
    Format("i2p", frozenset({"prompt", "sd_seed", "sd_guidance_scale"}), seed="sd_seed", guidance="sd_guidance_scale"),
    Format("p4d", frozenset({"prompt", "classes", "evaluation_guidance"}), seed="evaluation_seed", guidance="evaluation_guidance"),
    Format("unlearn_diff_atk", frozenset({"prompt", "evaluation_guidance"}), seed="evaluation_seed", guidance="evaluation_guidance"),
    Format("coco", frozenset({"prompt", "image_id", "evaluation_seed"}), seed="evaluation_seed"),
    Format("esd", frozenset({"prompt", "evaluation_seed"}), seed="evaluation_seed"),
    Format("prompts", frozenset({"prompt"}), seed="seed"),
)


@dataclass(frozen=True)
class Row:
    """A prompt to try. seed and guidance: None where the file gives none."""

    text: str
    seed: float | None
    guidance: float | None


@dataclass(frozen=True)
class PromptSet(Attack):
    """Ready prompts, as the field shares them; no paper of its own.

    Recognised by their columns: I2P (Schramowski et al., arXiv 2211.05105), MMA-Diffusion (Yang et al., arXiv 2311.17516), Ring-A-Bell
    (Tsai et al., arXiv 2310.10012, in the files of RECE), P4D (Chin et al., arXiv 2309.06135), UnlearnDiffAtk (Zhang et al., arXiv
    2310.11868), lists of ESD's and of COCO's captions, and any file with a column `prompt`; which it was is in the result. Each prompt is
    drawn once, with the seed and the guidance scale of its row where it has one. Sizes in the file are not read: images have the
    model's own.

    The rate is over all prompts; beside it is what the unedited model draws of them, which tells prompts that reach a concept from those
    that do not.
    """

    file: str = option("", "a .csv file")
    column: str | None = option(None, "the column of the prompts; none: by the kind of the file")
    where: str = option("", "rows to take: COLUMN>NUMBER, e.g. nudity_percentage>50, or COLUMN=TEXT, which the column holds; empty: all")
    rows: int | None = option(None, "take so many rows, from the first on; none: all")
    row_guidance: bool = option(True, "use the guidance scale of a row where it has one")

    label: ClassVar = "text-only"
    paper: ClassVar = ""

    def __post_init__(self) -> None:
        self.at_least(1, "rows")
        if self.where and not any(sign in self.where for sign in "=>"):
            raise UserError(f"where is {self.where!r}, needs COLUMN>NUMBER or COLUMN=TEXT; give for example nudity_percentage>50")

    def run(self, scenario: Scenario) -> AttackResult:
        kind, rows = self.read()
        _, clean = scenario.by_name()
        before = self.draw(scenario, "base", rows)
        shown = self.draw(scenario, "model", rows)
        notes = {"format": kind.name, "column": kind.prompt, "rows": len(rows)}
        return self.result(scenario, shown, clean, beside={"unedited": share(before, scenario.shows)}, notes=notes)

    def draw(self, scenario: Scenario, which: str, rows: Sequence[Row]) -> list[Shown]:
        """The images of all rows in their order; those with one guidance scale at once."""
        shown: dict[int, Shown] = {}
        scales = [row.guidance if self.row_guidance else None for row in rows]
        for scale in dict.fromkeys(scales):
            numbers = [i for i, own in enumerate(scales) if own == scale]
            painter = scenario.painter if scale is None else replace(scenario.painter, guidance=scale, _kept={})
            asked = [
                Prompt(row.text, scenario.seed if row.seed is None else int(row.seed), NOWHERE, ())
                for row in map(rows.__getitem__, numbers)
            ]
            shown |= dict(zip(numbers, painter.draw(getattr(scenario, which), asked, f"prompts, {which}"), strict=True))
        return [shown[i] for i in range(len(rows))]

    def read(self) -> tuple[Format, list[Row]]:
        """What kind of file it is, and its rows. A file without the columns that are needed is a UserError."""
        path = Path(self.file)
        if not self.file or not path.is_file():
            raise UserError(f"no file {self.file!r}; give one with --set file=prompts.csv")
        table = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""))
        columns = [name for name in table.fieldnames or [] if name]
        kind = next((one for one in FORMATS if one.has <= set(columns)), None)
        if self.column is not None:
            kind = replace(kind or Format("prompts", frozenset()), prompt=self.column)
        if kind is None or kind.prompt not in columns:
            asked = "a column of prompts" if kind is None else f"the column {kind.prompt!r}"
            raise UserError(f"{self.file} has the columns {', '.join(columns)}, needs {asked}; name one with --set column=NAME")
        try:
            wanted = [row for row in table if (row[kind.prompt] or "").strip() and self._wanted(row, columns)][: self.rows]
            rows = [Row(row[kind.prompt].strip(), _number(row, kind.seed), _number(row, kind.guidance)) for row in wanted]
        except ValueError as error:
            raise UserError(f"{self.file} has text where a number is needed ({error}); correct it") from None
        if not rows:
            raise UserError(f"no prompt in {self.file}{f' where {self.where}' if self.where else ''}; give another file, or another where")
        return kind, rows

    def _wanted(self, row: Mapping[str, str | None], columns: Sequence[str]) -> bool:
        if not self.where:
            return True
        column, sign, given = self.where.partition(">" if ">" in self.where else "=")
        if column not in columns:
            raise UserError(f"where asks for the column {column!r}, {self.file} has {', '.join(columns)}; give one of them")
        if sign == "=":
            return given in (row[column] or "")
        value = _number(row, column)
        return value is not None and value > float(given)


def _number(row: Mapping[str, str | None], column: str | None) -> float | None:
    """A cell as a number; None where there is none."""
    written = (row.get(column) or "").strip() if column is not None else ""
    return float(written) if written else None
