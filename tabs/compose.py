"""Compose: one edit out of several, and pictures whose regions have prompts and edits of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import gradio as gr

from tabs import forms, library, live, looks
from tabs.base import App, Tab
from tabs.method_form import MethodForm
from tabs.regions import Regions
from toolkit.concepts import Concept
from toolkit.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from tabs.shelf import Shelf
    from toolkit.jobs import Job
    from toolkit.method import Method

IN_ORDER = ""  # no method: the edits one after another
MAX_EDITS, MAX_PROMPTS, MAX_STEPS = 16, 12, 100
CHAIN = "The edits one after another. Low-rank edits that are neighbours add up to one, exactly."


class Compose(Tab):
    title: ClassVar = "Compose"
    order: ClassVar = 40

    def build(self, app: App) -> None:
        with gr.Tabs():
            with gr.Tab("One edit out of several"):
                self._compose(app)
            with gr.Tab("Regions of a picture"):
                Regions(app)

    def _compose(self, app: App) -> None:
        classes = looks.pixels(app.shelf.model.arch.image_size)
        with gr.Row(elem_classes="pal-columns"):
            with gr.Column(scale=2, min_width=280):
                edits = forms.edits_choice(app, "Edits, in the order in which they are applied", max_choices=MAX_EDITS)
                strengths = forms.collected("strengths")
                forms.strengths(app, edits, strengths)
                earlier = gr.Button("Move the last one to the front", size="sm", visible=False)
                conflicts = gr.Markdown("Choose two or more, here or in the library.", elem_classes="pal-note")
                model = forms.model_choice(app)
                names = [("apply them in this order", IN_ORDER), *((name, name) for name in self._merging(app))]
                method = MethodForm(app, "merge", names, IN_ORDER, lambda name: forms.about(name) if name else CHAIN, label="How")
                concepts = gr.Textbox(
                    label="What each edit is about, one on each line; empty: its new words",
                    visible=False,
                    lines=2,
                    max_length=10 * live.LONGEST,
                )
                with gr.Accordion("Pictures", open=True):
                    prompts = gr.Textbox(
                        "a pistol on a red background\na cat and a dog",
                        label="Prompts to draw with it, one on each line",
                        lines=2,
                        max_length=10 * live.LONGEST,
                    )
                    steps = gr.Slider(1, MAX_STEPS, 12, step=1, label="Steps of drawing them")
                compose = gr.Button("Compose and save", variant="primary")
                bar = live.JobBar(app)
            with gr.Column(scale=3, min_width=280):
                shown: dict[str, Any] = {"format": "png", "interactive": False, "object_fit": "contain", "height": "auto"}
                shelf = gr.Gallery(
                    label="Library: choose edits",
                    elem_id="library",
                    columns=3,
                    allow_preview=False,
                    elem_classes=[*classes, "pal-library"],
                    **shown,
                )
                empty = gr.Markdown(elem_classes="pal-note")
                results = gr.Gallery(
                    label="Drawn without and with the composed edit", elem_id="composed", columns=4, elem_classes=classes, **shown
                )
                note = gr.Markdown(elem_classes="pal-note")
        inputs = [edits, strengths, model, *method.inputs, concepts, prompts, steps]

        def listed() -> tuple[Any, Any]:
            found = library.saved(app)
            hint = "" if found else "No edits are saved yet. Erase and Customize make some."
            return gr.Gallery([(one.picture, one.caption) for one in found], selected_index=None), hint

        def pick(event: gr.SelectData, chosen: Any) -> list[str]:
            with live.told():
                found, names = [one.name for one in library.saved(app)], forms.chosen(app, chosen)
                if not isinstance(event.index, int) or not 0 <= event.index < len(found):
                    raise UserError("the library has changed; look at it again")
                name = found[event.index]
                return [other for other in names if other != name] if name in names else [*names, name]

        def about(chosen: Any) -> tuple[Any, Any]:
            with live.told():
                names = forms.chosen(app, chosen)
                return report(app, names), gr.Button(visible=len(names) > 1)

        def front(chosen: Any) -> list[str]:
            with live.told():
                names = forms.chosen(app, chosen)
                return [*names[-1:], *names[:-1]]

        def begin(session: str, *given: Any) -> Job:
            asked = settings(app, *given)
            title = f"Compose {', '.join(name.partition('/')[2] for name in asked['strengths'])}"
            return app.start(session, title[:200], composed, keep=("compose", str(len(asked["strengths"]))), shelf=app.shelf, **asked)

        def show(job: Job) -> dict[Any, Any]:
            assert job.folder
            pictures, _ = listed()
            say = f"Saved as `{app.workspace.name(job.folder)}`, which Compare and Checkpoints offer."
            return {results: gr.Gallery(job.result), note: say, shelf: pictures}

        outputs = [*bar.outputs, results, note, shelf]
        compose.click(bar.event(begin, show, live.names_of(settings)), inputs, outputs, api_name="compose", **live.STARTED)
        shelf.select(pick, edits, edits, api_visibility="private", **live.QUIET)
        edits.change(about, edits, [conflicts, earlier], api_visibility="private", **live.QUIET)
        earlier.click(front, edits, edits, api_visibility="private", **live.QUIET)
        method.name.change(lambda name: gr.Textbox(visible=bool(name)), method.name, concepts, api_visibility="private", **live.QUIET)
        app.on_show(listed, [shelf, empty])

    @staticmethod
    def _merging(app: App) -> list[str]:
        return forms.methods("merge", app.shelf.model.arch.name)


def report(app: App, names: Sequence[str]) -> str:
    """Conflicts between edits, as the command tells them; Markdown."""
    from toolkit.commands.compose import problems

    if len(names) < 2:
        return "Choose two or more, here or in the library."
    found = problems([f"`{name}`" for name in names], [app.shelf.edit(name, app.shelf.model) for name in names])
    said = [f"{name} {problem}" for name, problem in found]
    return "\n".join(f"- ⚠ {line}" for line in said) or "No conflicts between them."


def settings(
    app: App, edits: Any, strengths: Any, model: Any, method: Any, options: Any, concepts: Any, prompts: Any, steps: Any
) -> dict[str, Any]:
    """What was asked for, checked: the arguments of `composed`."""
    given = forms.strengths_of(app, edits, strengths)
    if not 2 <= len(given) <= MAX_EDITS:
        raise UserError(f"{len(given)} edits are chosen, composing takes from 2 to {MAX_EDITS}; choose so many")
    for name, strength in given.items():
        if strength != 1 and not app.shelf.scalable(name):
            raise UserError(f"{name} cannot be scaled, and its strength is {strength:g}; give it 1")
    about = tuple(Concept(line.strip()) for line in live.lines(concepts, "what the edits are about") if line.strip())
    if about and not method:
        raise UserError("what edits are about is for a method that merges, and none is chosen; choose one, or empty it")
    if about and len(about) != len(given):
        raise UserError(f"{len(about)} lines say what {len(given)} edits are about; write one for each, or none")
    tried = [line.strip() for line in live.lines(prompts, "prompts") if line.strip()]
    if len(tried) > MAX_PROMPTS:
        raise UserError(f"{len(tried)} prompts, at most {MAX_PROMPTS} are taken; write fewer")
    return {
        "strengths": given,
        "model": app.shelf.check_model(live.text(model, "the model")),
        "method": forms.configured(app, "merge", method, options) if method else None,
        "about": about,
        "prompts": tried,
        "steps": live.whole(steps, "steps", 1, MAX_STEPS),
    }


def composed(
    shelf: Shelf,
    strengths: Mapping[str, float],
    model: str,
    method: Method | None,
    about: tuple[Concept, ...],
    prompts: Sequence[str],
    steps: int,
    out: Path,
) -> list[tuple[Image.Image, str]]:
    """Make one edit, write it into `out`, and draw the prompts without and with it."""
    from dataclasses import asdict

    from toolkit.commands import save_result
    from toolkit.commands.compose import compose
    from toolkit.concepts import MergeTask
    from toolkit.edits.chain import Chain
    from toolkit.images import grid, save_png
    from toolkit.runs import progress, timed
    from toolkit.sample import generate

    opened = shelf.open(model)
    pairs = [(shelf.edit(name, opened), strength) for name, strength in strengths.items()]
    with timed() as cost:
        if method:
            task = MergeTask(tuple(edit if scale == 1 else Chain.of([edit], [scale]) for edit, scale in pairs), about)
            edit = method.fit(opened, task)
        else:
            edit = compose(pairs)
    seeds, pictures = [0] * len(prompts), []
    with progress("drawing without it") as show:
        before = generate(opened, prompts, seeds, steps=steps, progress=show) if prompts else []
    with opened.attached(edit), progress("drawing with it") as show:
        after = generate(opened, prompts, seeds, steps=steps, progress=show) if prompts else []
    for prompt, *images in zip(prompts, before, after, strict=True):
        pictures += [(image, f"{side}: {prompt}") for side, image in zip(("without", "with"), images, strict=True)]
    fitted = {"method": method.name(), "config": method.config()} if method else {}
    config = {**fitted, "model": model, "edits": [f"{name}@{scale:g}" for name, scale in strengths.items()]}
    save_result(out, edit, {**config, "concepts": [asdict(one) for one in about]}, {"kind": edit.kind(), **asdict(cost)})
    if after:
        save_png(grid([*after, *before], len(after)), out / "composed.png")
    return pictures
