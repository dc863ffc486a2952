"""Build the sprite atlas and the object list of the embedded model's world.

    python -m trainers.world.atlas [--work build/emoji]

Reads `objects.toml` beside this file (which emoji, what each is called, and its role), fetches the emoji packs with the npm client,
checks them against the pinned checksums, and writes into `toolkit/world/assets`:

- `atlas.webp`: 48x48 RGBA sprites. Cell `4 * i + s` shows object i in style s; cells run row-major, `columns` of them in a row.
- `objects.json`: the objects in the atlas's order (scored, held_out, extra), their synonyms, and the atlas's layout.

Roles. scored: counted in every measurement. held_out: a new subject, which no model has seen. extra: only trained on.

Synonyms. Only words of the packs describe an object: every word of a synonym must be a word of the packs' names or keywords for its
code point, so "squirt gun" is allowed where both "squirt" and "gun" are keywords. Which of them can stand for the object is decided
by hand in `objects.toml`. A synonym belongs to one object and is nobody's name. In the listed order they are, by turns, `given`
(an erasure method may be told them) and `held_back` (it never is), so that a measurement can ask what the method did not hear about.

Needs npm, and `pip install resvg-py` (the `world` extra) to rasterise the flat Fluent emoji; neither is needed to use the result.
Licences of the packs: see NOTICE.
"""

import argparse
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "toolkit" / "world" / "assets"
OBJECTS = Path(__file__).with_name("objects.toml")

STYLES = ("twemoji", "noto", "fluent 3d", "fluent flat")
ROLES = ("scored", "held_out", "extra")
CELL = 48
COLUMNS = 36
LOSSLESS_LIMIT = 3_500_000  # bytes; a larger atlas is stored lossy
SIZE_LIMIT = 4_000_000
# Fluent 3D sprites end in a nearly invisible haze; counted as content, it would shrink what one sees of the sprite.
VISIBLE_ALPHA = 16


class AtlasError(Exception):
    """One line that says what was found, what is needed, and what to do."""


@dataclass(frozen=True)
class Pack:
    """An npm package, pinned to the bytes of its tarball."""

    name: str
    version: str
    sha256: str

    @property
    def tarball(self) -> str:
        """The file name that `npm pack` gives it."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


TWITTER = Pack("emoji-datasource-twitter", "16.0.0", "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877")
GOOGLE = Pack("emoji-datasource-google", "16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438")
FLUENT_3D = Pack("@lobehub/fluent-emoji-3d", "1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58")
FLUENT_FLAT = Pack("@lobehub/fluent-emoji-flat", "1.1.0", "8f9113c027c7c20eced0070354715a4093a459b8bef6332b91d45f38c9bdb147")
OPENMOJI = Pack("openmoji", "17.0.0", "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68")
EMOJILIB = Pack("emojilib", "4.0.2", "e8b7ed3b6bdb77173da2cfc4b39ee6ccc39c11680262046c6984d04b102c06c2")

# In the order of STYLES: the pack and the folder and suffix of its pictures.
PICTURES = (
    (TWITTER, "package/img/twitter/64/", ".png"),
    (GOOGLE, "package/img/google/64/", ".png"),
    (FLUENT_3D, "package/assets/", ".webp"),
    (FLUENT_FLAT, "package/assets/", ".svg"),
)


@dataclass(frozen=True)
class WorldObject:
    """One line of `objects.toml`."""

    codepoint: str  # one code point, lower-case hex, without a variation selector
    name: str
    role: str
    group: str
    synonyms: tuple[str, ...]


def fetch(pack: Pack, work: Path) -> Path:
    """The pack's tarball in `work`, downloaded if it is not there. Raises AtlasError if its checksum is not the pinned one."""
    path = work / pack.tarball
    if not path.exists():
        spec = f"{pack.name}@{pack.version}"
        try:
            subprocess.run(["npm", "pack", spec, "--silent", "--pack-destination", str(work)], check=True, stdout=subprocess.DEVNULL)
        except FileNotFoundError:
            raise AtlasError("npm was not found: the emoji packs are npm packages; install Node.js") from None
        except subprocess.CalledProcessError as error:
            raise AtlasError(f"npm pack {spec} failed with exit status {error.returncode}; see its message above") from None
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != pack.sha256:
        raise AtlasError(f"{path} has sha256 {found}, needed is {pack.sha256}; delete it and run again")
    return path


def read_members(tarball: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """The wanted files of a tarball by name, in one pass (a gzip stream cannot be entered in the middle)."""
    found: dict[str, bytes] = {}
    with tarfile.open(tarball, "r|gz") as archive:
        for member in archive:
            if member.isfile() and wanted(member.name) and (file := archive.extractfile(member)):
                found[member.name] = file.read()
    return found


def read_json(pack: Pack, work: Path, member: str) -> Any:
    return json.loads(read_members(fetch(pack, work), member.__eq__)[member])


def load_objects(path: Path) -> list[WorldObject]:
    """The objects of the TOML file in the order of the atlas. Raises AtlasError where the table contradicts itself."""
    table = tomllib.loads(path.read_text(encoding="utf-8"))["objects"]
    objects = [WorldObject(**{**row, "synonyms": tuple(row["synonyms"])}) for row in table]
    if unknown := {o.role for o in objects} - set(ROLES):
        raise AtlasError(f"{path}: unknown roles {sorted(unknown)}; a role is one of {', '.join(ROLES)}")
    objects.sort(key=lambda o: ROLES.index(o.role))
    words = Counter(o.name for o in objects) + Counter(synonym for o in objects for synonym in o.synonyms)
    codepoints = Counter(o.codepoint for o in objects)
    if twice := [key for key, count in (words + codepoints).items() if count > 1]:
        raise AtlasError(f"{path}: {', '.join(twice)} stand more than once; a name, synonym or code point belongs to one object")
    if few := [o.name for o in objects if o.role == "scored" and not 2 <= len(o.synonyms) <= 6]:
        raise AtlasError(f"{path}: {', '.join(few)} need two to six synonyms each, as scored objects; give some or change the role")
    return objects


def words_of(phrases: Iterable[str]) -> set[str]:
    """Lower-case words, with hyphens, underscores and punctuation as spaces."""
    return {word for phrase in phrases for word in re.split(r"[\W_]+", phrase.lower()) if word}


def pack_words(work: Path) -> dict[str, set[str]]:
    """The words of the packs' names and keywords for every code point."""
    words: dict[str, set[str]] = {}

    def add(codepoint: str, phrases: Iterable[str]) -> None:
        words.setdefault(codepoint.lower().removesuffix("-fe0f"), set()).update(words_of(phrases))

    for entry in read_json(TWITTER, work, "package/emoji.json"):
        add(entry["unified"], [entry["name"] or "", *entry["short_names"]])
    for entry in read_json(OPENMOJI, work, "package/data/openmoji.json"):
        add(entry["hexcode"], [entry["annotation"], entry["tags"], entry["openmoji_tags"]])
    for emoji, keywords in read_json(EMOJILIB, work, "package/dist/emoji-en-US.json").items():
        add("-".join(f"{ord(character):x}" for character in emoji), keywords)
    return words


def characters(work: Path) -> dict[str, str]:
    """The emoji of every code point, with the selector (VS16) where the plain character is drawn as black-and-white text."""
    unified: list[str] = [entry["unified"].lower() for entry in read_json(TWITTER, work, "package/emoji.json")]
    return {code.removesuffix("-fe0f"): "".join(chr(int(part, 16)) for part in code.split("-")) for code in unified}


def check_synonyms(objects: Iterable[WorldObject], words: dict[str, set[str]]) -> None:
    """Raises AtlasError unless every word of every synonym is a word of the packs for that object."""
    strange = [f"{s!r} of {o.name}" for o in objects for s in o.synonyms if not words_of([s]) <= words.get(o.codepoint, set())]
    if strange:
        raise AtlasError(f"{OBJECTS}: not in the packs' names or keywords: {', '.join(strange)}; use other synonyms")


def open_picture(data: bytes, suffix: str) -> Image.Image:
    """An RGBA picture. An SVG is drawn four times larger than its cell, so that the final resize decides its edges, as for the others."""
    if suffix == ".svg":
        try:
            from resvg_py import svg_to_bytes  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise AtlasError("rasterising SVG needs resvg-py: pip install resvg-py") from None
        data = bytes(svg_to_bytes(svg_string=data.decode(), width=4 * CELL, height=4 * CELL))
    return Image.open(io.BytesIO(data)).convert("RGBA")


def make_sprite(picture: Image.Image) -> Image.Image:
    """Crop to what is visible, pad to a square, resize to the cell: all styles fill their cells alike, whatever margins they have."""
    box = picture.getchannel("A").point([255 * (alpha >= VISIBLE_ALPHA) for alpha in range(256)]).getbbox()
    if box is None:
        raise AtlasError("a picture is fully transparent; choose another object")
    content = picture.crop(box)
    side = max(content.size)
    square = Image.new("RGBA", (side, side))
    square.paste(content, ((side - content.width) // 2, (side - content.height) // 2))
    # Pillow resizes RGBA on premultiplied colours, so invisible pixels do not darken the edges.
    return square.resize((CELL, CELL), Image.Resampling.LANCZOS)


def style_sprites(objects: list[WorldObject], style: int, work: Path) -> list[Image.Image]:
    """Every object's sprite in one style. Raises AtlasError if the pack lacks one."""
    pack, folder, suffix = PICTURES[style]
    # Packs disagree on whether a file's name carries the variation selector.
    names = {f"{folder}{o.codepoint}{selector}{suffix}" for o in objects for selector in ("", "-fe0f")}
    files = {name.replace("-fe0f", ""): data for name, data in read_members(fetch(pack, work), names.__contains__).items()}
    if missing := [o.name for o in objects if f"{folder}{o.codepoint}{suffix}" not in files]:
        raise AtlasError(f"{pack.name}@{pack.version} has no picture of {', '.join(missing)}; choose other objects")
    return [make_sprite(open_picture(files[f"{folder}{o.codepoint}{suffix}"], suffix)) for o in objects]


def compose(sprites: list[list[Image.Image]]) -> Image.Image:
    """One picture of all sprites[style][object]."""
    cells = [sprite for of_object in zip(*sprites, strict=True) for sprite in of_object]
    atlas = Image.new("RGBA", (COLUMNS * CELL, -(-len(cells) // COLUMNS) * CELL))
    for index, sprite in enumerate(cells):
        atlas.paste(sprite, (index % COLUMNS * CELL, index // COLUMNS * CELL))
    return atlas


def encode(atlas: Image.Image) -> bytes:
    """WebP: lossless where small enough, otherwise lossy colours with exact alpha (masks come from alpha)."""
    for limit, options in ((LOSSLESS_LIMIT, {"lossless": True}), (SIZE_LIMIT, {"quality": 92, "alpha_quality": 100})):
        buffer = io.BytesIO()
        atlas.save(buffer, "WEBP", method=6, **options)
        if buffer.tell() <= limit:
            return buffer.getvalue()
    raise AtlasError(f"the atlas takes {buffer.tell()} bytes, at most {SIZE_LIMIT} are allowed; drop some extra objects")


def describe(objects: list[WorldObject], emoji: dict[str, str]) -> str:
    """The text of objects.json, one object a line so that a change reads as one in a diff."""
    head = {"version": 1, "styles": STYLES, "cell": CELL, "columns": COLUMNS}
    lines = [
        json.dumps(
            {
                "name": o.name,
                "emoji": emoji[o.codepoint],
                "codepoint": o.codepoint,
                "role": o.role,
                "group": o.group,
                "synonyms": {"given": o.synonyms[0::2], "held_back": o.synonyms[1::2]},
            },
            ensure_ascii=False,
        )
        for o in objects
    ]
    return json.dumps(head)[:-1] + ', "objects": [\n' + ",\n".join(lines) + "\n]}\n"


def write(path: Path, data: bytes) -> None:
    """Written beside its place and then renamed, so that nobody ever reads half a file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainers.world.atlas", description="Build the embedded world's sprite atlas.")
    parser.add_argument("--work", type=Path, default=Path("build/emoji"), help="where the packs' tarballs are kept (default: %(default)s)")
    work: Path = parser.parse_args(arguments).work
    try:
        objects = load_objects(OBJECTS)
        work.mkdir(parents=True, exist_ok=True)
        check_synonyms(objects, pack_words(work))
        listing = describe(objects, characters(work))
        atlas = encode(compose([style_sprites(objects, style, work) for style in range(len(STYLES))]))
    except AtlasError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    ASSETS.mkdir(parents=True, exist_ok=True)
    write(ASSETS / "atlas.webp", atlas)
    write(ASSETS / "objects.json", listing.encode())
    print(f"{len(objects)} objects in {len(STYLES)} styles: {len(atlas)} bytes in {ASSETS / 'atlas.webp'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
