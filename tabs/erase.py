"""Erase: an edit that removes concepts, with what it removed and what it left."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import gradio as gr

from tabs import forms, live, looks
from tabs.base import App, Tab
from tabs.method_form import MethodForm
from toolkit.concepts import Concept, EraseTask
from toolkit.errors import UserError

if TYPE_CHECKING:
    from eval.trial import Pair, Trial
    from tabs.shelf import Shelf
    from toolkit.jobs import Job
    from toolkit.method import Method

FIRST = "uce"
MAX_CONCEPTS, MAX_IMAGES, MAX_STEPS = 50, 64, 100
HEADINGS = ["What", "Before", "After", "Images"]


class Erase(Tab):
    title: ClassVar = "Erase"
    order: ClassVar = 20

    def build(self, app: App) -> None:
        from eval.commands.evaluate import knows_world

        names = forms.methods("erase", app.shelf.model.arch.name)
        first = FIRST if FIRST in names else names[0]
        classes = looks.pixels(app.shelf.model.arch.image_size)
        with gr.Row(elem_classes="pal-columns"):
            with gr.Column(scale=2, min_width=280):
                concepts = gr.Textbox("pistol", label="Concepts, one on each line", lines=2, max_length=10 * live.LONGEST)
                synonyms = gr.Textbox(
                    "gun, revolver", label="Synonyms, on the line of their concept", lines=2, max_length=10 * live.LONGEST
                )
                anchors = gr.Textbox(label="Anchors: what to draw instead, likewise; empty: nothing", lines=1, max_length=10 * live.LONGEST)
                preserve = gr.Textbox("knife, dog", label="Preserve, with commas between", lines=1, max_length=10 * live.LONGEST)
                rest = gr.Checkbox(knows_world(app.shelf.model), label="Preserve everything else of the embedded world, too")
                kind = gr.Radio([("objects", "object"), ("styles", "style")], value="object", label="The concepts are")
                model = forms.model_choice(app)
                say = partial(describe, app)
                method = MethodForm(app, "erase", names, first, say, preset=("Use the options measured on the embedded model", presets))
                with gr.Accordion("Pictures and measurement", open=False):
                    images = gr.Slider(0, MAX_IMAGES, 8, step=1, label="Images for each concept; 0: measure nothing")
                    steps = gr.Slider(1, MAX_STEPS, 12, step=1, label="Steps of drawing them")
                goes_on = gr.Checkbox(True, label="Go on when this page is closed", info="It can be found again under Jobs.")
                erase = gr.Button("Erase", variant="primary")
                bar = live.JobBar(app, keep=True)
            with gr.Column(scale=3, min_width=280):
                shown: dict[str, Any] = {
                    "format": "png",
                    "columns": 4,
                    "interactive": False,
                    "elem_classes": classes,
                    "object_fit": "contain",
                    "height": "auto",
                }
                erased = gr.Gallery(label="Erased: before and after, from the same noise", **shown)
                retained = gr.Gallery(label="Retained: before and after", **shown)
                table = gr.Dataframe(headers=HEADINGS, label="Measured, with 95 % intervals", interactive=False, wrap=True, visible=False)
                note = gr.Markdown(elem_classes="pal-note")
        inputs = [concepts, synonyms, anchors, preserve, rest, kind, model, *method.inputs, images, steps, goes_on]

        def begin(session: str, *given: Any) -> Job:
            asked, go_on = settings(app, *given)
            words = [asked["method"].name(), *(concept.name for concept in asked["task"].concepts[:3])]
            title = f"Erase {', '.join(words[1:])} with {words[0]}"
            return app.start(session, title, tried, keep=words, goes_on=go_on, shelf=app.shelf, **asked)

        def show(job: Job) -> dict[Any, Any]:
            trial: Trial = job.result
            saved = app.workspace.name(job.folder) if job.folder else ""
            return {
                erased: gr.Gallery(alternating(trial.erased)),
                retained: gr.Gallery(alternating(trial.retained)),
                table: gr.Dataframe(trial.rows, visible=bool(trial.rows)),
                note: f"Fitted in {live.duration(trial.seconds)}; saved as `{saved}`, which Compare offers. {trial.unmeasured}",
            }

        outputs = [*bar.outputs, erased, retained, table, note]
        erase.click(bar.event(begin, show, live.names_of(settings)), inputs, outputs, api_name="erase", **live.STARTED)


def settings(
    app: App,
    concepts: Any,
    synonyms: Any,
    anchors: Any,
    preserve: Any,
    everything_else: Any,
    kind: Any,
    model: Any,
    method: Any,
    options: Any,
    images: Any,
    steps: Any,
    goes_on: Any,
) -> tuple[dict[str, Any], bool]:
    """What was asked for, checked: the arguments of `tried`, and whether it goes on without its page."""
    if kind not in ("object", "style"):
        raise UserError(f"concepts are {str(kind)[:50]!r}, need object or style; choose one")
    names, others, instead = (
        live.lines(value, what) for value, what in ((concepts, "concepts"), (synonyms, "synonyms"), (anchors, "anchors"))
    )
    names = [name.strip() for name in names if name.strip()]
    for lines, what in ((others, "synonyms"), (instead, "anchors")):
        if len(lines) > len(names):
            raise UserError(f"{len(lines)} lines of {what} for {len(names)} concepts; write each on the line of its concept")
    if len(names) > MAX_CONCEPTS:
        raise UserError(f"{len(names)} concepts, at most {MAX_CONCEPTS} are taken; erase fewer at once")
    others, instead = ([*lines, *[""] * (len(names) - len(lines))] for lines in (others, instead))
    found = tuple(
        Concept(name, live.words(own, "synonyms"), anchor.strip() or None, kind)
        for name, own, anchor in zip(names, others, instead, strict=True)
    )
    return {
        "model": app.shelf.check_model(live.text(model, "the model")),
        "method": forms.configured(app, "erase", method, options),
        "task": EraseTask(found, live.words(preserve, "what to preserve")),
        "everything_else": bool(everything_else),
        "images": live.whole(images, "images", 0, MAX_IMAGES),
        "steps": live.whole(steps, "steps", 1, MAX_STEPS),
    }, bool(goes_on)


def tried(shelf: Shelf, model: str, method: Method, task: EraseTask, out: Path, **more: Any) -> Trial:
    """Fit, draw and measure. more: what else `eval.trial.erase` is told."""
    from eval.trial import erase

    return erase(shelf.open(model), method, task, out, origin={"model": model, "edits": []}, **more)


def alternating(pairs: list[Pair]) -> list[tuple[Any, str]]:
    """Before and after side by side, with the prompt."""
    return [(image, f"{side}: {pair.prompt}") for pair in pairs for side, image in (("before", pair.before), ("after", pair.after))]


# --- what is said about a method --------------------------------------------------------------------------------------
def presets(method: str) -> dict[str, Any]:
    """The options that a method was measured with on the embedded model, where they are not its defaults."""
    from eval.known import known

    measured = known(method)
    return measured.options if measured else {}


def describe(app: App, method: str) -> str:
    """What a method does, how long it takes and how good it was; Markdown."""
    from eval.bench_results import short
    from eval.known import known

    said, measured = [forms.about(method)], known(method)
    if measured:
        said.append(
            f"Measured on the embedded model, on {measured.tasks} objects one at a time: {short(measured.left)} of the images still show"
            f" what was erased, asked by name; of everything else {short(measured.kept)} is right as before."
            f" Fitting took {live.duration(measured.seconds)} on one core, with options of its own."
        )
    if seconds := taken(app, method):
        said.append(f"It took {live.duration(seconds)} here the last time.")
    elif not measured:
        said.append("How long it takes here is not known yet; the line below the button will say when it has begun.")
    return " ".join(said)


def taken(app: App, method: str) -> float | None:
    """Seconds that fitting took in the newest run of a method in the working folder."""
    for name in app.workspace.runs():
        if f"-{method.replace('_', '-')}-" in name:
            with suppress(UserError, ValueError, KeyError, TypeError):  # not all runs say so
                return float(app.workspace.said(f"{name}/result.json")["seconds"])
    return None
