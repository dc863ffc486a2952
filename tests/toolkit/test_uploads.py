"""Pictures of strangers: what is refused, before it is decoded, and what is kept of the rest."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from toolkit.errors import UserError
from toolkit.uploads import Limits, check_image, store_images

LIMITS = Limits(files=3, bytes=100_000, pixels=10_000)


def bomb(path: Path, width: int = 60_000, height: int = 60_000) -> Path:
    """A PNG whose header promises more than there is memory."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))
    return path


def picture(path: Path, size: tuple[int, int] = (40, 30)) -> Path:
    Image.new("RGB", size, "red").save(path)
    return path


@pytest.mark.parametrize("side", [200, 12_000, 60_000])
def test_a_bomb_is_refused_by_its_header(tmp_path: Path, side: int) -> None:
    with pytest.raises(UserError, match="more than 10,000 pixels"):
        check_image(bomb(tmp_path / "a.png", side, side), LIMITS)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"#!/bin/sh\necho",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"\x89PNG\r\n\x1a\n",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"\x80\x04cos\n",
    ],
)
def test_what_is_no_picture_is_refused_whatever_its_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cat.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"cat\.png is no picture that is taken"):
        check_image(path, LIMITS)


def test_too_many_bytes_and_too_many_files(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(bytes(100_001))
    with pytest.raises(UserError, match=r"0\.1 MB"):
        check_image(path, LIMITS)
    with pytest.raises(UserError, match="4 pictures are given, from 1 to 3 are taken"):
        store_images([picture(tmp_path / "a.png")] * 4, tmp_path / "out", LIMITS)
    with pytest.raises(UserError, match="0 pictures"):
        store_images([], tmp_path / "out", LIMITS)
    assert not (tmp_path / "out").exists()


def test_pictures_are_kept_upright_and_without_what_else_their_files_held(tmp_path: Path) -> None:
    image, exif = Image.new("RGB", (40, 30), "red"), Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "where I live"
    image.save(tmp_path / "a.jpg", exif=exif)
    [stored] = store_images([tmp_path / "a.jpg"], tmp_path / "out", LIMITS)
    with Image.open(stored) as kept:
        assert (kept.format, kept.size, dict(kept.getexif()), kept.info) == ("PNG", (30, 40), {}, {})


def test_a_damaged_picture_leaves_nothing(tmp_path: Path) -> None:
    good = picture(tmp_path / "good.png")
    damaged = tmp_path / "bad.png"
    damaged.write_bytes(picture(tmp_path / "noise.png", (90, 90)).read_bytes()[:-40])
    with pytest.raises(UserError, match=r"bad\.png is damaged"):
        store_images([good, damaged], tmp_path / "out", LIMITS)
    assert not list((tmp_path / "out").iterdir())
