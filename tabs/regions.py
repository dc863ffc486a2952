"""Regions painted on a canvas: each colour is a place with a prompt, and an edit that holds there alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr
import numpy as np
from PIL import Image, ImageColor

from tabs import forms, live, looks
from tabs.base import App
from toolkit.errors import UserError

if TYPE_CHECKING:
    from tabs.shelf import Shelf
    from toolkit.jobs import Job

SIDE = 512  # of the canvas
COLOURS = {"red": "#e11d48", "blue": "#2563eb", "green": "#16a34a", "yellow": "#eab308"}
UNPAINTED = "#ffffff"
BOXES = {  # x0, y0, x1, y1 of each colour in turn, in shares of the canvas
    "left and right": ((0, 0, 0.5, 1), (0.5, 0, 1, 1)),
    "above and below": ((0, 0, 1, 0.5), (0, 0.5, 1, 1)),
    "four corners": ((0, 0, 0.5, 0.5), (0.5, 0, 1, 0.5), (0, 0.5, 0.5, 1), (0.5, 0.5, 1, 1)),
}
FIRST = "left and right"
PROMPTS = ("a cat on the left", "a dog on the right", "", "")
MAX_PICTURES, MAX_STEPS = 8, 100
LEAST = 16  # places of the canvas that count as painted
SHAPES = [("as they are painted", "mask"), ("as boxes around them", "box")]


@dataclass(frozen=True)
class Place:
    """A region that is asked for: its colour, what is there, the edit's name or none, and where, a boolean array of the canvas."""

    colour: str
    prompt: str
    edit: str
    where: np.ndarray


class Regions:
    """The part of a tab, made where it stands."""

    def __init__(self, app: App) -> None:
        classes = looks.pixels(app.shelf.model.arch.image_size)
        with gr.Row(elem_classes="pal-columns"):
            with gr.Column(scale=3, min_width=280):
                start = gr.Radio(list(BOXES), value=FIRST, label="Begin with these regions, then paint")
                canvas = gr.ImageEditor(
                    laid_out(FIRST),
                    label="Regions",
                    type="pil",
                    sources=(),
                    transforms=(),
                    layers=False,
                    brush=gr.Brush(default_size=SIDE // 10, colors=[*COLOURS.values(), UNPAINTED], color_mode="fixed"),
                    canvas_size=(SIDE, SIDE),
                    height=SIDE // 2 + 140,
                    format="png",
                )
                shape = gr.Radio(SHAPES, value="mask", label="Regions are")
            with gr.Column(scale=3, min_width=280):
                prompt = gr.Textbox("on a red background", label="The whole picture, and all that is not painted", max_length=live.LONGEST)
                asked: list[Any] = []
                for (name, _), first in zip(COLOURS.items(), PROMPTS, strict=True):
                    with gr.Row(elem_classes=["pal-region", f"pal-{name}"]):
                        asked.append(gr.Textbox(first, label=f"In {name}", max_length=live.LONGEST, min_width=140))
                        asked.append(edit_choice(app, f"Edit in {name}"))
                model = forms.model_choice(app)
                with gr.Accordion("Sampling", open=False):
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=100)
                    count = gr.Slider(1, MAX_PICTURES, 2, step=1, label="Pictures", min_width=160)
                    steps = gr.Slider(1, MAX_STEPS, 20, step=1, label="Steps")
                draw = gr.Button("Draw the regions", variant="primary")
                bar = live.JobBar(app)
                drawn = gr.Gallery(
                    label="Drawn",
                    elem_id="regions-drawn",
                    columns=2,
                    format="png",
                    interactive=False,
                    object_fit="contain",
                    height="auto",
                    elem_classes=classes,
                )
        inputs = [canvas, shape, prompt, *asked, model, seed, count, steps]

        def begin(session: str, *given: Any) -> Job:
            found = settings(app, *given)
            title = f"Regions: {', '.join(place.prompt for place in found['places'])}"
            return app.start(session, title[:200], regions_drawn, shelf=app.shelf, **found)

        def lay_out(name: Any) -> Any:
            with live.told():
                return laid_out(name)

        outputs = [*bar.outputs, drawn]
        event = bar.event(begin, lambda job: {drawn: gr.Gallery(job.result)}, live.names_of(settings))
        draw.click(event, inputs, outputs, api_name="regions", **live.STARTED)
        start.input(lay_out, start, canvas, api_visibility="private", **live.QUIET)


def edit_choice(app: App, label: str) -> gr.Dropdown:
    """One saved edit or none; a list that is looked up whenever the tab is shown."""

    def listed() -> gr.Dropdown:
        return gr.Dropdown([("none", ""), *app.shelf.edits()])

    box = gr.Dropdown([("none", ""), *app.shelf.edits()], value="", label=label, min_width=140)
    app.on_show(listed, [box])
    return box


def laid_out(name: Any) -> Image.Image:
    """What a canvas shows to begin with: white, with boxes in the colours."""
    if name not in BOXES:
        raise UserError(f"no layout {str(name)[:50]!r}; choose one from the list")
    sheet = Image.new("RGB", (SIDE, SIDE), UNPAINTED)
    for colour, box in zip(COLOURS.values(), BOXES[name], strict=False):
        x0, y0, x1, y1 = (round(SIDE * share) for share in box)
        sheet.paste(ImageColor.getrgb(colour), (x0, y0, x1, y1))
    return sheet


def painted(canvas: Any) -> dict[str, np.ndarray]:
    """Where each colour is on a canvas: colour -> boolean [rows, columns]; colours that are nowhere are left out.

    A place has the colour that is nearest to what is there; white is none.
    """
    if not isinstance(canvas, dict):
        raise UserError("nothing is painted; paint where something shall be")
    sheet = Image.new("RGBA", (SIDE, SIDE), UNPAINTED)
    for layer in filter(None, [canvas.get("background"), *canvas.get("layers", ())]):
        sheet.alpha_composite(layer.convert("RGBA").resize(sheet.size, Image.Resampling.NEAREST))
    pixels = np.asarray(sheet).astype(np.int32)
    known = np.array([ImageColor.getrgb(colour) for colour in (*COLOURS.values(), UNPAINTED)])
    nearest = ((pixels[:, :, None, :3] - known) ** 2).sum(-1).argmin(-1)
    found = {name: nearest == number for number, name in enumerate(COLOURS)}
    return {name: where for name, where in found.items() if where.sum() >= LEAST}


def settings(
    app: App,
    canvas: Any,
    shape: Any,
    prompt: Any,
    red: Any,
    red_edit: Any,
    blue: Any,
    blue_edit: Any,
    green: Any,
    green_edit: Any,
    yellow: Any,
    yellow_edit: Any,
    model: Any,
    seed: Any,
    count: Any,
    steps: Any,
) -> dict[str, Any]:
    """What was asked for, checked: the arguments of `regions_drawn`."""
    if shape not in (kinds := [kind for _, kind in SHAPES]):
        raise UserError(f"regions are {str(shape)[:50]!r}, need one of: {', '.join(kinds)}; choose one")
    where, places = painted(canvas), []
    given = {"red": (red, red_edit), "blue": (blue, blue_edit), "green": (green, green_edit), "yellow": (yellow, yellow_edit)}
    for colour, (said, edit) in given.items():
        words = live.optional(said, f"the prompt in {colour}")
        [name] = forms.chosen(app, [edit]) if edit else [""]
        if (colour in where) != bool(words):
            have, lack = ("painted", "has no prompt; write one") if colour in where else ("given a prompt", "is not painted; paint it")
            raise UserError(f"{colour} is {have} and {lack}, or {'remove it' if colour in where else 'empty the prompt'}")
        if name and not words:
            raise UserError(f"{colour} has an edit and no prompt; write one, or choose none")
        if words:
            places.append(Place(colour, words, name, where[colour]))
    first = live.whole(seed, "seed", 0, 2**31)
    return {
        "places": places,
        "boxes": shape == "box",
        "prompt": live.optional(prompt, "the prompt"),
        "model": app.shelf.check_model(live.text(model, "the model")),
        "seeds": list(range(first, first + live.whole(count, "number of pictures", 1, MAX_PICTURES))),
        "steps": live.whole(steps, "steps", 1, MAX_STEPS),
    }


def box_around(where: np.ndarray) -> tuple[float, float, float, float]:
    """The smallest box around what is painted, in shares of the canvas."""
    rows, columns = np.flatnonzero(where.any(axis=1)), np.flatnonzero(where.any(axis=0))
    height, width = where.shape
    return columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height


def regions_drawn(
    shelf: Shelf, places: Sequence[Place], boxes: bool, prompt: str, model: str, seeds: Sequence[int], steps: int
) -> list[Image.Image]:
    """Pictures whose regions read their own prompts through their own edits."""
    import torch
    import torch.nn.functional as F

    from pipelines.attention.regional import Region, regional
    from toolkit.runs import progress
    from toolkit.sample import generate

    opened = shelf.open(model)
    side = opened.arch.image_size
    regions = []
    for place in places:
        edit = shelf.edit(place.edit, opened) if place.edit else None
        if boxes:
            regions.append(Region(place.prompt, box=box_around(place.where), edit=edit))
        else:
            mask = F.interpolate(torch.from_numpy(place.where).float()[None, None], (side, side), mode="area")[0, 0]
            regions.append(Region(place.prompt, mask=mask, edit=edit))
    with regional(opened, regions) as hook, progress("drawing") as show:
        return generate(opened, [prompt] * len(seeds), seeds, steps=steps, hooks=[hook], progress=show)
