"""Images that are kept: one PNG each, named by what was asked for, so that none is drawn twice."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.prompts import Prompt
from eval.rates import Shown
from toolkit.images import save_png, to_pil

LONGEST = 60  # characters of a prompt in a file's name


@dataclass(frozen=True)
class Gallery:
    """folder: one folder in it for whatever drew images. keeps: whether new ones are written."""

    folder: Path
    keeps: bool = False

    def file(self, of: str, prompt: Prompt) -> Path:
        """Where the image of a prompt is."""
        words = re.sub(r"\W+", "-", prompt.text).strip("-")[:LONGEST]
        return self.folder / of / f"{words}.{hashlib.blake2b(prompt.text.encode(), digest_size=3).hexdigest()}.{prompt.seed}.png"

    def keep(self, of: str, shown: Iterable[Shown]) -> None:
        """Write the images that are not there, if any are to be kept."""
        for item in shown if self.keeps else ():
            file = self.file(of, item.prompt)
            if not file.is_file():
                file.parent.mkdir(parents=True, exist_ok=True)
                save_png(to_pil(item.pixels[None].float() / 255)[0], file)

    def lacks(self, of: str, prompts: Sequence[Prompt]) -> bool:
        """Whether an image of these is to be kept and is not there."""
        return self.keeps and not all(self.file(of, prompt).is_file() for prompt in prompts)
