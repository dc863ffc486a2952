"""Compare: a prompt drawn without and with edits, from the same noise."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import gradio as gr

from tabs import forms, live, looks
from tabs.base import App, Tab
from toolkit.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from tabs.shelf import Shelf
    from toolkit.jobs import Job

MAX_STEPS, MAX_PICTURES = 100, 16
WORD = re.compile(r"<[^<>\s]+>|[\w'-]+")
Pictures = list["Image.Image"]


class Compare(Tab):
    title: ClassVar = "Compare"
    order: ClassVar = 10

    def build(self, app: App) -> None:
        first = looks.pixels(app.shelf.model.arch.image_size)
        with gr.Row(elem_classes="pal-columns"):
            with gr.Column(scale=2, min_width=280):
                prompt = gr.Textbox("a pistol on a red background", label="Prompt", max_length=live.LONGEST, lines=2)
                model = forms.model_choice(app)
                edits = forms.edits_choice(app, "Edits, in order", value=list(app.shelf.given))
                strengths = forms.collected("strengths")
                forms.strengths(app, edits, strengths)
                with gr.Row():
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=100)
                    count = gr.Slider(1, MAX_PICTURES, 1, step=1, label="Pictures", min_width=160)
                with gr.Accordion("Sampling", open=False):
                    steps = gr.Slider(1, MAX_STEPS, 20, step=1, label="Steps")
                    guidance = gr.Slider(1, 15, app.shelf.model.guidance, label="Guidance scale")
                draw = gr.Button("Draw", variant="primary")
                bar = live.JobBar(app)
            with gr.Column(scale=3, min_width=280):
                slider = gr.ImageSlider(label="without | with", format="png", elem_classes=["pal-slider", *first], interactive=False)
                with gr.Row():
                    shown: dict[str, Any] = {
                        "format": "png",
                        "columns": 4,
                        "interactive": False,
                        "allow_preview": False,
                        "elem_classes": first,
                        "min_width": 130,
                    }
                    before = gr.Gallery(label="Without edits", elem_id="without-edits", **shown)
                    after = gr.Gallery(label="With edits", elem_id="with-edits", **shown)
                words = gr.Radio([], label="Where is a word attended to? Choose one to see", visible=False)
                word = gr.Textbox(label="word", visible="hidden")
                heat = gr.Gallery(
                    label="Attention, without and with edits",
                    visible=False,
                    interactive=False,
                    format="png",
                    columns=2,
                    fit_columns=False,
                    elem_classes=first,
                )
        inputs = [prompt, model, edits, strengths, seed, count, steps, guidance]

        def compare(session: str, *given: Any) -> Job:
            asked = settings(app, *given)
            return app.start(session, f"Compare: {asked['prompt'][:60]}", compared, shelf=app.shelf, **asked)

        def show(job: Job) -> dict[Any, Any]:
            prompt, side, without, edited = job.result
            classes, columns = looks.pixels(side), min(len(without), 4)
            return {
                slider: gr.ImageSlider((without[0], edited[0]), elem_classes=["pal-slider", *classes]),
                before: gr.Gallery(without, columns=columns, elem_classes=classes),
                after: gr.Gallery(edited, columns=columns, elem_classes=classes),
                words: gr.Radio(said(prompt), value=None, visible=True),
                heat: gr.Gallery(visible=False),
            }

        def attend(session: str, word: Any, *given: Any) -> Job:
            word, asked = live.text(word, "the word", longest=100), settings(app, *given)
            return app.start(session, f"Attention: {word}", heat_maps_of, shelf=app.shelf, word=word, **asked)

        def show_heat(job: Job) -> dict[Any, Any]:
            side, maps = job.result
            pictures = list(zip(maps, ("without edits", "with edits"), strict=False))
            return {heat: gr.Gallery(pictures, visible=True, elem_classes=looks.pixels(side))}

        def pick(event: gr.SelectData, without: Any, edited: Any) -> Any:
            return tuple(side[event.index][0] for side in (without, edited))

        names, outputs = live.names_of(settings), [*bar.outputs, slider, before, after, words, heat]
        gr.on([draw.click, prompt.submit], bar.event(compare, show, names), inputs, outputs, api_name="compare", **live.STARTED)
        attended = bar.event(attend, show_heat, ["word", *names])
        chosen = words.input(None, words, word, js="word => word", api_visibility="private", **live.QUIET)
        chosen.then(attended, [word, *inputs], [*bar.outputs, heat], api_name="attention", **live.STARTED)
        for gallery in (before, after):
            gallery.select(pick, [before, after], slider, api_visibility="private", **live.QUIET)


def settings(
    app: App, prompt: Any, model: Any, edits: Any, strengths: Any, seed: Any, count: Any, steps: Any, guidance: Any
) -> dict[str, Any]:
    """What was asked for, checked: the arguments of `compared`."""
    first = live.whole(seed, "seed", 0, 2**31)
    return {
        "prompt": live.text(prompt, "the prompt"),
        "model": app.shelf.check_model(live.text(model, "the model")),
        "strengths": forms.strengths_of(app, edits, strengths),
        "seeds": list(range(first, first + live.whole(count, "number of pictures", 1, MAX_PICTURES))),
        "steps": live.whole(steps, "steps", 1, MAX_STEPS),
        "guidance": live.number(guidance, "guidance scale", 1, 30),
    }


def compared(
    shelf: Shelf, prompt: str, model: str, strengths: Mapping[str, float], seeds: Sequence[int], steps: int, guidance: float
) -> tuple[str, int, Pictures, Pictures]:
    """The prompt, the side of the pictures, and those without and with the edits, from the same noise; without edits they are the same."""
    from toolkit.runs import progress
    from toolkit.sample import generate

    opened = shelf.open(model)
    prompts = [prompt] * len(seeds)
    with progress("without edits") as show:
        before = generate(opened, prompts, seeds, steps=steps, guidance=guidance, progress=show)
    if not strengths:
        return prompt, opened.arch.image_size, before, before
    with shelf.edited(opened, strengths), progress("with edits") as show:
        return prompt, opened.arch.image_size, before, generate(opened, prompts, seeds, steps=steps, guidance=guidance, progress=show)


def heat_maps_of(
    shelf: Shelf, word: str, prompt: str, model: str, strengths: Mapping[str, float], seeds: Sequence[int], steps: int, guidance: float
) -> tuple[int, Pictures]:
    """Where a word is attended to in the picture of the first seed, without and with the edits."""
    from toolkit.attention import token_places
    from toolkit.heat_maps import heat_maps
    from toolkit.images import overlay
    from toolkit.sample import generate

    def draw() -> Image.Image:
        if not token_places(opened.arch, [prompt], [word]).any():
            raise UserError(f"{word!r} is not in the prompt; choose a word that it says")
        with heat_maps(opened, [word]) as maps:
            [image] = generate(opened, [prompt], seeds[:1], steps=steps, guidance=guidance, hooks=[maps])
        return overlay(image, maps.of(word))

    opened = shelf.open(model)
    found = []
    if strengths:
        with shelf.edited(opened, strengths):
            found = [draw()]
    return opened.arch.image_size, [draw(), *found]


def said(prompt: str) -> list[str]:
    """The words of a prompt, each once."""
    return list(dict.fromkeys(WORD.findall(prompt)))[:40]
