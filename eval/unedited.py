"""What the unedited model draws, read once for all cells: kept in one file beside theirs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eval import stored
from eval.bench_images import Gallery
from eval.bench_work import claimed
from eval.fidelity import oracle_kid
from eval.prompts import Prompt
from eval.rates import Painter, Shown
from eval.stored import reading_of, reading_to_json
from toolkit.world.scenes import World

if TYPE_CHECKING:
    from toolkit.model import Model


@dataclass(frozen=True)
class Unedited:
    """file: prompt and seed -> what the oracle reads, and a list of those -> its oracle-KID. Nothing else may have made it."""

    world: World
    model: Model
    painter: Painter
    file: Path
    gallery: Gallery

    def shown(self, prompts: Sequence[Prompt], title: str) -> list[Shown]:
        """The images of these prompts, without their pixels. Only those that the file, or the gallery, does not hold are drawn."""
        known = self._read()["shown"]
        fresh = [prompt for prompt in dict.fromkeys(prompts) if _key(prompt) not in known or self.gallery.lacks(self.file.stem, [prompt])]
        if fresh:
            known = self._add(self.painter.draw(self.model, fresh, title))["shown"]
        return [Shown(prompt, reading_of(known[_key(prompt)]), torch.empty(0)) for prompt in prompts]

    def kid(self, prompts: Sequence[Prompt], title: str) -> float | None:
        """The oracle-KID of the images of these prompts, None of too few. All are drawn when the file does not hold it."""
        key = json.dumps([_key(prompt) for prompt in prompts])
        known = self._read()["kid"]
        if key not in known:
            drawn = self.painter.draw(self.model, list(prompts), title)
            known = self._add(drawn, {key: oracle_kid(self.world, self.painter.oracle, drawn).as_json()["value"]})["kid"]
        return known[key]

    def _read(self) -> dict[str, Any]:
        return stored.read(self.file, {"shown": {}, "kid": {}})

    def _add(self, drawn: Sequence[Shown], kid: Mapping[str, float | None] | None = None) -> dict[str, Any]:
        """Write what is new to the file as it is by now, and give what it then holds."""
        self.gallery.keep(self.file.stem, drawn)
        with claimed(self.file, wait=True):  # else of two processes one would write without what the other has just added
            held = self._read()
            held["shown"] |= {_key(item.prompt): reading_to_json(item.reading) for item in drawn}
            held["kid"] |= kid or {}
            stored.write(self.file, held)
        return held


def _key(prompt: Prompt) -> str:
    """What an image depends on beside the model."""
    return f"{prompt.seed} {prompt.text}"
