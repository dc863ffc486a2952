"""Pages of results, each section of which is made by one benchmark."""

from __future__ import annotations

import re
from pathlib import Path

from toolkit.runs import write_atomic


def write_section(page: Path, section: str) -> None:
    """Put a section, which begins with its "## " heading, in the place of the one with this heading, or at the end of the page."""
    text = page.read_text(encoding="utf-8") if page.exists() else "# Performance\n\n"
    heading, new = section.partition("\n")[0], section.rstrip() + "\n"
    parts = [part.rstrip() + "\n" for part in re.split(r"^(?=## )", text, flags=re.MULTILINE)]
    old = [part.startswith(heading + "\n") for part in parts]
    parts = [new if is_old else part for part, is_old in zip(parts, old, strict=True)] + ([] if any(old) else [new])
    write_atomic(page, "\n".join(parts))


def in_turns(count: int) -> str:
    """How often a number was measured, in words."""
    return "in one turn" if count == 1 else f"the median of {count} turns"
