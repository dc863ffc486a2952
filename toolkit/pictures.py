"""Folders of pictures as users have them: the picture files, their masks, their captions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from toolkit.errors import UserError

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
METADATA = "metadata.jsonl"


def pictures(folder: str | Path) -> tuple[Path, ...]:
    """The picture files of a folder by name. No folder or no picture is a UserError."""
    if not Path(folder).is_dir():
        raise UserError(f"{folder} is not a folder; give a folder of pictures")
    found = tuple(sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in PICTURES))
    if not found:
        raise UserError(f"no picture in {folder}; put files of type {', '.join(sorted(PICTURES))} there")
    return found


def masks_of(images: Sequence[Path], folder: str | Path) -> tuple[Path, ...]:
    """The mask with the same name (suffixes may differ) for every picture."""
    by_name = {path.stem: path for path in pictures(folder)}
    for image in images:
        if image.stem not in by_name:
            raise UserError(f"no mask for {image.name} in {folder}; give one file named {image.stem} per picture")
    return tuple(by_name[image.stem] for image in images)


def captioned(images: Sequence[Path], folder: str | Path, token: str = "") -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Pictures with their captions from the folder's metadata.jsonl, which are () when there is no such file.

    One JSON object a line with `file_name` and `text`, the layout that `datasets` calls imagefolder. A picture with several lines is there
    once for each, or for each that has the token, where subjects share it.
    """
    path = Path(folder) / METADATA
    if not path.is_file():
        return tuple(images), ()
    texts: dict[str, list[str]] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.strip():
                row = json.loads(line)
                texts.setdefault(row["file_name"], []).append(row["text"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {path} ({error}); write one JSON object a line with file_name and text") from error
    found: list[tuple[Path, str]] = []
    for image in images:
        if not (own := texts.get(image.name, [])):
            raise UserError(f"no caption for {image.name} in {path}; add a line for it or remove the file")
        if len(own) > 1 and not (own := [text for text in own if token in text]):
            raise UserError(f"none of the captions for {image.name} in {path} names {token}; add a line that does")
        found += [(image, text) for text in own]
    return tuple(image for image, _ in found), tuple(text for _, text in found)


def open_photo(path: Path) -> Image.Image:
    """One picture as RGB, turned as EXIF says, transparency over white."""
    if not Path(path).is_file():
        raise UserError(f"no picture file {path}; give files, for a folder toolkit.pictures.pictures(folder)")
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file).convert("RGBA")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read picture {path} ({error}); give a complete PNG, JPEG or WebP file") from error
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


def open_mask(path: Path, image: Path, size: tuple[int, int]) -> Image.Image:
    """A mask in gray. One of another size than its picture, whose (width, height) is given, is a UserError."""
    mask = open_photo(path).convert("L")
    if mask.size != size:
        given, needed = "x".join(map(str, mask.size)), "x".join(map(str, size))
        raise UserError(f"mask {path} is {given}, its picture {image} is {needed}; give a mask of the picture's size")
    return mask
