"""What the world contains, and how a scene becomes pixels and masks.

A scene is a background colour and up to four objects, each at a place, all in one style. Rendering is deterministic in
the scene and the generator it is given, so that whatever is measured on an image has a ground truth.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

ASSETS = Path(__file__).parent / "assets"
SIZE = 64

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "red": (214, 60, 58),
    "orange": (242, 146, 48),
    "yellow": (250, 220, 84),
    "green": (86, 170, 84),
    "blue": (62, 112, 214),
    "purple": (140, 84, 190),
    "pink": (246, 158, 196),
    "brown": (126, 84, 56),
    "gray": (150, 152, 156),
    "white": (246, 246, 246),
}

# Place -> (centre x, centre y, side of the object's square), in pixels. All corners have the same phase on the generator's
# latent grid of 4 pixels, and objects do not move about: a sprite has two looks in latents and no more, so that a small model
# can know every one of them.
PLACES: dict[str, tuple[int, int, int]] = {
    "center": (32, 32, 44),
    "left": (16, 32, 28),
    "right": (48, 32, 28),
    "top left": (16, 16, 28),
    "top right": (48, 16, 28),
    "bottom left": (16, 48, 28),
    "bottom right": (48, 48, 28),
}
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")


@dataclass(frozen=True)
class Thing:
    """One emoji object. role: "scored", "held_out" (never seen in training) or "extra" (only trained on)."""

    name: str
    role: str
    group: str
    given: tuple[str, ...]
    held_back: tuple[str, ...]

    @property
    def synonyms(self) -> tuple[str, ...]:
        """Every other word for it."""
        return self.given + self.held_back


@dataclass(frozen=True)
class Scene:
    """background: a key of BACKGROUNDS. style: one of World.styles. items: (place, object name) pairs."""

    background: str
    style: str
    items: tuple[tuple[str, str], ...]

    def swapped(self) -> Scene:
        """The same objects with their places reversed."""
        places = [place for place, _ in self.items]
        return replace(self, items=tuple(zip(reversed(places), (name for _, name in self.items), strict=True)))


class World:
    """The objects, their sprites and everything that is sampled from them."""

    def __init__(self) -> None:
        spec = json.loads((ASSETS / "objects.json").read_text())
        self.styles: tuple[str, ...] = tuple(spec["styles"])
        self.things: dict[str, Thing] = {}
        self._row: dict[str, int] = {}
        for row, entry in enumerate(spec["objects"]):
            synonyms = entry["synonyms"]
            thing = Thing(entry["name"], entry["role"], entry["group"], tuple(synonyms["given"]), tuple(synonyms["held_back"]))
            self.things[thing.name] = thing
            self._row[thing.name] = row
        self._cell, self._columns = int(spec["cell"]), int(spec["columns"])
        self._atlas = Image.open(ASSETS / "atlas.webp").convert("RGBA")
        self._resized: dict[tuple[str, str, int], Image.Image] = {}

    def names(self, *roles: str) -> list[str]:
        """Names of the objects with one of these roles, in the world's order."""
        return [thing.name for thing in self.things.values() if thing.role in roles]

    def group(self, group: str) -> list[str]:
        """Names of the scored objects of a group, e.g. "weapon"."""
        return [thing.name for thing in self.things.values() if thing.group == group and thing.role == "scored"]

    def sprite(self, name: str, style: str, side: int) -> Image.Image:
        """The object's picture, RGBA, `side` pixels square."""
        key = (name, style, side)
        if key not in self._resized:
            cell = 4 * self._row[name] + self.styles.index(style)
            x, y = cell % self._columns * self._cell, cell // self._columns * self._cell
            cut = self._atlas.crop((x, y, x + self._cell, y + self._cell))
            self._resized[key] = cut.resize((side, side), Image.Resampling.LANCZOS)
        return self._resized[key]

    def render(self, scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Pixels [64, 64, 3] uint8 and one boolean mask per object [k, 64, 64]; the colour varies a little."""
        canvas = blank(scene.background, rng)
        masks = np.zeros((len(scene.items), SIZE, SIZE), dtype=bool)
        for mask, (place, name) in zip(masks, scene.items, strict=True):
            mask |= paste(canvas, place, self.sprite(name, scene.style, PLACES[place][2]))
        return np.asarray(canvas), masks


def paste(canvas: Image.Image, place: str, sprite: Image.Image, shift: tuple[int, int] = (0, 0)) -> np.ndarray:
    """Draw a sprite at a place, moved by a shift in pixels; returns where it covers the canvas [64, 64] bool."""
    x, y, _ = PLACES[place]
    corner = (x + shift[0] - sprite.width // 2, y + shift[1] - sprite.height // 2)
    canvas.paste(sprite, corner, sprite)
    cover = Image.new("L", (SIZE, SIZE))
    cover.paste(sprite.getchannel("A"), corner)
    return np.asarray(cover) > 127


def blank(background: str, rng: np.random.Generator) -> Image.Image:
    """An empty scene in a background colour, which varies by up to 6 levels a channel."""
    colour = np.clip(np.array(BACKGROUNDS[background]) + rng.integers(-6, 7, size=3), 0, 255)
    return Image.new("RGB", (SIZE, SIZE), tuple(int(c) for c in colour))


def held_out_triple(name: str, background: str, place: str) -> bool:
    """Whether this combination is one of the 10 % that no training image shows."""
    return hashlib.blake2b(f"{name}|{background}|{place}".encode(), digest_size=2).digest()[0] % 10 == 0


def allowed(scene: Scene) -> bool:
    """Whether a scene may be trained on."""
    return not any(held_out_triple(name, scene.background, place) for place, name in scene.items)


def random_scene(world: World, names: list[str], rng: np.random.Generator, *, count: int | None = None) -> Scene:
    """A scene that may be trained on, of distinct objects drawn from `names`.

    count: how many objects; None draws 1 (58 %), 2 (28 %), 3, 4 (5 % each) or none (4 %).
    """
    while True:
        k = int(rng.choice(5, p=[0.04, 0.58, 0.28, 0.05, 0.05])) if count is None else count
        chosen = [names[i] for i in rng.choice(len(names), size=k, replace=False)]
        scene = Scene(pick(rng, list(BACKGROUNDS)), pick(rng, list(world.styles)), tuple(zip(_places(k, rng), chosen, strict=True)))
        if allowed(scene):
            return scene


def _places(count: int, rng: np.random.Generator) -> list[str]:
    if count == 1:
        return ["center" if rng.random() < 0.7 else pick(rng, [p for p in PLACES if p != "center"])]
    if count == 2:
        return ["left", "right"]
    return sorted((QUADRANTS[i] for i in rng.choice(4, size=count, replace=False)), key=QUADRANTS.index)


def pick(rng: np.random.Generator, options: list[str]) -> str:
    """One of the options, uniformly."""
    return options[int(rng.integers(len(options)))]


@lru_cache(maxsize=1)
def load_world() -> World:
    """The world that ships with the project."""
    return World()
