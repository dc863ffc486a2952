"""Pictures as users have them: turned, transparent, not square, broken."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from toolkit.errors import UserError
from toolkit.model import Model
from toolkit.pictures import captioned, masks_of, pictures
from trainers.photos import load_masks, load_photos, to_latents

RED, BLUE, WHITE = torch.tensor([1.0, -1.0, -1.0]), torch.tensor([-1.0, -1.0, 1.0]), torch.ones(3)


def halves(path: Path, size: tuple[int, int] = (16, 16), **options: object) -> Path:
    """A picture that is red on the left and blue on the right."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[:, : size[0] // 2], pixels[:, size[0] // 2 :] = (255, 0, 0), (0, 0, 255)
    Image.fromarray(pixels).save(path, **options)  # pyright: ignore[reportArgumentType]
    return path


def test_pictures_become_centre_squares_in_order(tmp_path: Path) -> None:
    wide, small = halves(tmp_path / "wide.png", (64, 32)), halves(tmp_path / "small.webp", (8, 8), lossless=True)
    pixels = load_photos([wide, small], 16)
    assert pixels.shape == (2, 3, 16, 16) and pixels.dtype == torch.float32 and pixels.min() == -1 and pixels.max() == 1
    for picture in pixels:
        torch.testing.assert_close(picture[:, 8, 2], RED, atol=0.15, rtol=0)
        torch.testing.assert_close(picture[:, 8, -3], BLUE, atol=0.15, rtol=0)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    (turned,) = load_photos([halves(tmp_path / "turned.jpg", (32, 32), exif=exif, quality=95)], 16)
    torch.testing.assert_close(turned[:, 8, 3], BLUE, atol=0.15, rtol=0)
    exif[0x0112] = 6  # a quarter: the left side is on top
    (turned,) = load_photos([halves(tmp_path / "quarter.jpg", (32, 32), exif=exif, quality=95)], 16)
    torch.testing.assert_close(turned[:, 3, 8], RED, atol=0.15, rtol=0)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_over_white(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "clear.png"
    if mode == "P":
        Image.new("P", (8, 8)).save(path, transparency=0)
    else:
        Image.new(mode, (8, 8), (0,) * len(mode)).save(path)
    assert torch.equal(load_photos([path], 8)[0, :, 4, 4], WHITE)


@pytest.mark.parametrize("mode", ["L", "1", "CMYK"])
def test_other_colour_modes_are_read(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("picture.jpg" if mode == "CMYK" else "picture.png")
    Image.new("RGB", (8, 8), "white").convert(mode).save(path)
    torch.testing.assert_close(load_photos([path], 8), torch.ones(1, 3, 8, 8), atol=0.05, rtol=0)


def test_masks_are_cut_like_their_pictures(tmp_path: Path) -> None:
    picture, mask = halves(tmp_path / "a.png", (32, 16)), tmp_path / "mask.png"
    left = np.zeros((16, 32), np.uint8)
    left[:, :16] = 255
    Image.fromarray(left).save(mask)
    masks = load_masks([mask], [picture], 8)
    assert masks.shape == (1, 1, 8, 8) and torch.equal(masks[0, 0, :, :4], torch.ones(8, 4)) and not masks[0, 0, :, 4:].any()


def test_latents_are_the_models(tiny: Model, tmp_path: Path) -> None:
    pixels = load_photos([halves(tmp_path / f"{i}.png", (40 + i, 40)) for i in range(9)], tiny.arch.image_size)
    latents = to_latents(tiny.arch, pixels)
    assert latents.shape == (9, *tiny.arch.latent_shape(16, 16)) and not latents.requires_grad
    torch.testing.assert_close(latents[8:], tiny.arch.encode_images(pixels[8:]), atol=1e-5, rtol=1e-5)


def test_latents_that_are_not_finite_are_told(tiny: Model) -> None:
    with pytest.raises(UserError, match="not finite"):
        to_latents(tiny.arch, torch.full((1, 3, 16, 16), float("nan")))


def broken(tmp_path: Path) -> Path:
    path = halves(tmp_path / "whole.png", (64, 64))
    (tmp_path / "cut.png").write_bytes(path.read_bytes()[:100])
    return tmp_path / "cut.png"


def text(tmp_path: Path) -> Path:
    (tmp_path / "text.png").write_text("no picture")
    return tmp_path / "text.png"


@pytest.mark.parametrize("make", [broken, text, lambda folder: folder / "missing.png", lambda folder: folder])
def test_bad_pictures_are_named_in_one_line(tmp_path: Path, make) -> None:
    path = make(tmp_path)
    with pytest.raises(UserError) as error:
        load_photos([path], 8)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_bad_masks_are_named(tmp_path: Path) -> None:
    picture, other, black = halves(tmp_path / "a.png"), halves(tmp_path / "b.png", (8, 16)), tmp_path / "c.png"
    Image.new("L", (16, 16)).save(black)
    with pytest.raises(UserError, match=r"b\.png is 8x16, its picture .*a\.png is 16x16"):
        load_masks([other], [picture], 8)
    with pytest.raises(UserError, match=r"c\.png is black everywhere"):
        load_masks([black], [picture], 8)


def test_folders_give_pictures_masks_and_captions(tmp_path: Path) -> None:
    photos, masks = tmp_path / "photos", tmp_path / "masks"
    photos.mkdir()
    masks.mkdir()
    files = (halves(photos / "1.png"), halves(photos / "2.JPG", format="JPEG"))
    (photos / "notes.txt").write_text("")
    assert pictures(photos) == files and captioned(files, photos) == (files, ())
    (photos / "metadata.jsonl").write_text('{"file_name": "2.JPG", "text": "a <toy>, red"}\n\n{"file_name": "1.png", "text": "<toy>"}\n')
    assert captioned(files, photos) == (files, ("<toy>", "a <toy>, red"))
    given = (halves(masks / "1.webp"), halves(masks / "2.png"))
    assert masks_of(files, masks) == given
    given[1].unlink()
    with pytest.raises(UserError, match=r"no mask for 2\.JPG"):
        masks_of(files, masks)


def test_a_picture_with_several_captions_is_there_for_each_with_the_token(tmp_path: Path) -> None:
    files = (halves(tmp_path / "1.png"), halves(tmp_path / "2.png"))
    rows = [("1.png", "a <toy>"), ("1.png", "a <toy> and a <pal>"), ("1.png", "a <pal>"), ("2.png", "two of them")]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps({"file_name": name, "text": text}) + "\n" for name, text in rows))
    assert captioned(files, tmp_path, "<toy>") == ((files[0], files[0], files[1]), ("a <toy>", "a <toy> and a <pal>", "two of them"))
    assert [text for text in captioned(files, tmp_path)[1]] == [text for _, text in rows]
    with pytest.raises(UserError, match=r"none of the captions for 1\.png .* names <cat>"):
        captioned(files, tmp_path, "<cat>")


@pytest.mark.parametrize(
    ("written", "message"),
    [('{"file_name": "1.png", "text": "x"}', r"no caption for 2\.png"), ('{"file": "1.png"}', "'file_name'"), ("not json", "cannot read")],
)
def test_bad_captions_are_named(tmp_path: Path, written: str, message: str) -> None:
    files = (halves(tmp_path / "1.png"), halves(tmp_path / "2.png"))
    (tmp_path / "metadata.jsonl").write_text(written)
    with pytest.raises(UserError, match=message):
        captioned(files, tmp_path)


def test_folders_without_pictures_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no picture in"):
        pictures(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        pictures(tmp_path / "nowhere")
