"""Pictures that are dropped into a tab, as the trainer will cut them, and masks for them: painted by hand or made from attention."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image, ImageOps

from tabs import live, looks
from tabs.base import App
from tabs.shelf import Shelf
from toolkit.errors import UserError
from toolkit.images import save_png
from toolkit.pictures import open_photo
from toolkit.uploads import check_image

if TYPE_CHECKING:
    from toolkit.jobs import Job

SIDE = 512  # of the canvas that masks are painted on
PAINT = "#ff2d78"
PAINTED = 128  # opacity from which a place counts as painted


class GivenPictures:
    """Where pictures are dropped; below, how they are cut, and a canvas for masks. `inputs` are what an event is given."""

    def __init__(self, app: App) -> None:
        self.app, classes = app, looks.pixels(app.shelf.model.arch.image_size)
        shown: dict[str, Any] = {
            "format": "png",
            "columns": 5,
            "object_fit": "contain",
            "height": "auto",
            "elem_classes": [*classes, "pal-drop"],
        }
        self.photos = gr.Gallery(
            label="Pictures of it: drop 3 to 10 here", type="filepath", file_types=["image"], **{**shown, "height": 170}, interactive=True
        )
        self.cut = gr.Gallery(
            label="As cut for training; choose one to mask",
            elem_id="cut",
            visible=False,
            interactive=False,
            allow_preview=False,
            **shown,
        )
        with gr.Accordion("Masks: what counts in a picture (optional)", open=False):
            self.which = gr.Number(1, label="Picture", precision=0, minimum=1)
            self.canvas = gr.ImageEditor(
                label="Paint or crop",
                type="pil",
                sources=(),
                transforms=("crop",),
                layers=False,
                brush=gr.Brush(default_size=SIDE // 12, colors=[PAINT], color_mode="fixed"),
                canvas_size=(SIDE, SIDE),
                height=SIDE // 2 + 140,
                format="png",
            )
            with gr.Row():
                keep = gr.Button("Keep as its mask", size="sm", min_width=120)
                crop = gr.Button("Keep it as cropped", size="sm", min_width=120)
                self.make = gr.Button("Find by attention", size="sm", min_width=120)
            self.masks = gr.Gallery(label="Masks: white counts", type="filepath", elem_id="masks", **{**shown, "height": 150})
        look = [self.photos, self.which]
        gr.on([self.photos.upload, self.photos.delete], self._cut, self.photos, self._shown, api_visibility="private", **live.QUIET)
        self.cut.select(self._choose, self.photos, [self.which, self.canvas], api_visibility="private", **live.QUIET)
        self.which.input(self._open, look, self.canvas, api_visibility="private", **live.QUIET)
        keep.click(self._mask, [*look, self.canvas, self.masks], self.masks, api_name="mask", **live.QUIET)
        self.follow(crop.click(self._crop, [*look, self.canvas], self.photos, api_visibility="private", **live.QUIET))

    @property
    def inputs(self) -> list[Any]:
        return [self.photos, self.masks]

    @property
    def _shown(self) -> list[Any]:
        return [self.cut, self.masks]

    def follow(self, event: Any) -> None:
        """Show how the pictures are cut that an event has put there."""
        event.then(self._cut, self.photos, self._shown, api_visibility="private", **live.QUIET)

    def attend(self, bar: live.JobBar, class_name: Any, model: Any) -> None:
        """Have the button make masks from what the model attends to at the class name."""

        def start(session: str, photos: Any, class_name: Any, model: Any) -> Job:
            paths = given(self.app, photos)
            word = live.text(class_name, "the class name", longest=100)
            name = self.app.shelf.check_model(live.text(model, "the model"))
            return self.app.start(session, f"Masks: {word}", attended, shelf=self.app.shelf, model=name, paths=paths, class_name=word)

        def show(job: Job) -> dict[Any, Any]:
            return {self.masks: [(mask, captioned(number)) for number, mask in enumerate(job.result, 1)]}

        names, inputs = ["pictures", "class_name", "model"], [self.photos, class_name, model]
        self.make.click(bar.event(start, show, names), inputs, [*bar.outputs, self.masks], api_name="attention_masks", **live.STARTED)

    # --- events -----------------------------------------------------------------------------------------------------
    def _cut(self, photos: Any) -> tuple[Any, Any]:
        """What the trainer sees of the pictures; masks of other pictures are forgotten when there are none."""
        if not photos:
            return gr.Gallery([], visible=False), []
        with live.told():
            paths, side = given(self.app, photos), self.app.shelf.model.arch.image_size
            cut = [square(open_photo(path), side) for path in paths]
            return gr.Gallery(cut, visible=True, columns=min(max(len(cut), 3), 8), selected_index=None), gr.skip()

    def _choose(self, event: gr.SelectData, photos: Any) -> tuple[int, Any]:
        number = int(event.index if isinstance(event.index, int) else 0) + 1
        return number, self._open(photos, number)

    def _open(self, photos: Any, which: Any) -> Any:
        with live.told():
            return square(open_photo(self._one(photos, which)), SIDE)

    def _mask(self, photos: Any, which: Any, canvas: Any, masks: Any) -> Any:
        with live.told():
            self._one(photos, which)
            mask = painted(canvas)
            others = {number: path for number, path in numbered(self.app, masks, len(photos)).items() if number != which}
            return [(each, captioned(number)) for number, each in sorted({**others, int(which): mask}.items())]

    def _crop(self, photos: Any, which: Any, canvas: Any) -> Any:
        with live.told():
            self._one(photos, which)
            if not isinstance(canvas, dict) or canvas.get("background") is None:
                raise UserError("no picture is on the canvas; choose one above, and crop it there")
            cropped = canvas["background"].convert("RGB")
            return [cropped if number == which else path for number, (path, _) in enumerate(photos, 1)]

    def _one(self, photos: Any, which: Any) -> Path:
        paths = given(self.app, photos)
        return paths[live.whole(which, "number of the picture", 1, len(paths)) - 1]


def given(app: App, photos: Any) -> list[Path]:
    """The files of a gallery, each a picture within the limits."""
    if not photos:
        raise UserError("no picture is given; drop some of it first")
    if len(photos) > app.limits.files:
        raise UserError(f"{len(photos)} pictures are given, at most {app.limits.files} are taken; give fewer")
    paths = [Path(path) for path, _ in photos]
    for path in paths:
        if not path.is_file():
            raise UserError(f"picture {path.name[:100]} is no longer there; drop it again")
        check_image(path, app.limits)
    return paths


def numbered(app: App, masks: Any, count: int) -> dict[int, Path]:
    """The masks of a gallery by the numbers of their pictures, which their captions say; one without a caption is in its place."""
    found: dict[int, Path] = {}
    for place, (path, (_, caption)) in enumerate(zip(given(app, masks), masks, strict=True) if masks else (), 1):
        said = re.fullmatch(r"of picture (\d{1,3})", caption or "")
        number = int(said[1]) if said else place
        if not 0 < number <= count:
            raise UserError(f"a mask is for picture {number}, and there are {count}; remove it")
        found[number] = path
    return found


def captioned(number: int) -> str:
    return f"of picture {number}"


def square(picture: Image.Image, side: int) -> Image.Image:
    """The part of a picture that is trained on."""
    return ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS)


def painted(canvas: Any) -> Image.Image:
    """What was painted on a canvas, white on black. Nothing is a UserError."""
    layers = canvas.get("layers") if isinstance(canvas, dict) else None
    if not layers:
        raise UserError("nothing is painted; choose a picture, and paint over what counts in it")
    mask = Image.new("L", layers[0].size)
    for layer in layers:
        mask.paste(255, mask=layer.convert("RGBA").getchannel("A").point(lambda alpha: 255 * (alpha >= PAINTED)).resize(mask.size))
    if not mask.getbbox():
        raise UserError("nothing is painted; choose a picture, and paint over what counts in it")
    return mask


def store_masks(masks: dict[int, Path], images: Sequence[Path], folder: Path) -> tuple[Path, ...]:
    """Write a mask for every picture, named as it is, of its size: what was painted on the square that is trained on; all where nothing
    was."""
    folder.mkdir()
    stored = []
    for number, image in enumerate(images, 1):
        with Image.open(image) as picture:
            mask = Image.new("L", picture.size, 0 if number in masks else 255)
        if number in masks:
            side = min(mask.size)
            with Image.open(masks[number]) as own:
                cut = ImageOps.fit(own.convert("L"), (side, side), Image.Resampling.BILINEAR)
            mask.paste(cut.point(partial(_black_or_white)), ((mask.width - side) // 2, (mask.height - side) // 2))
        stored.append(save_png(mask, folder / image.name))
    return tuple(stored)


def _black_or_white(value: int) -> int:
    return 255 * (value >= PAINTED)


def attended(shelf: Shelf, model: str, paths: Sequence[Path], class_name: str) -> list[Image.Image]:
    """For every picture a mask of what the model attends to at the class name; for jobs."""
    from toolkit.images import to_pil
    from trainers.attention_masks import foreground
    from trainers.photos import load_photos, to_latents

    arch = shelf.open(model).arch
    masks = foreground(arch, to_latents(arch, load_photos(paths, arch.image_size)), class_name)
    return [mask.convert("L").resize((SIDE, SIDE), Image.Resampling.NEAREST) for mask in to_pil(masks[:, None].expand(-1, 3, -1, -1))]
