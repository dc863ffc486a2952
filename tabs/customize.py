"""Customize: an edit that teaches a model a new word from pictures, watched while it is learnt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

import gradio as gr

from eval.learning import Trying
from tabs import forms, live, looks
from tabs.base import App, Tab
from tabs.given_pictures import GivenPictures, given, numbered, store_masks
from tabs.method_form import MethodForm
from toolkit.concepts import CustomizeTask, Subject
from toolkit.errors import UserError

if TYPE_CHECKING:
    from eval.learning import Learnt
    from tabs.shelf import Shelf
    from toolkit.jobs import Job
    from toolkit.method import Method
    from toolkit.uploads import Limits

FIRST = "dreambooth_lora"
MAX_PROMPTS, MAX_IMAGES, MAX_STEPS, MAX_EVERY = 12, 8, 100, 1000
EXAMPLE = {"name": "penguin", "class_name": "bird", "token": "<pal>", "style": "twemoji"}
SMOOTHED = 0.9  # how much of the loss that is shown was shown at the step before


class Customize(Tab):
    title: ClassVar = "Customize"
    order: ClassVar = 30

    def build(self, app: App) -> None:
        from eval.commands.evaluate import knows_world

        embedded = knows_world(app.shelf.model)
        names, trying = forms.methods("customize", app.shelf.model.arch.name), Trying()
        classes = looks.pixels(app.shelf.model.arch.image_size)
        with gr.Row(elem_classes="pal-columns"):
            with gr.Column(scale=2, min_width=280):
                example = gr.Button(f"Try an example: a {EXAMPLE['name']}, which the model has never seen", size="sm", visible=embedded)
                pictures = GivenPictures(app)
                with gr.Row():
                    token = gr.Textbox("<mine>", label="New word for it", max_length=100, min_width=120)
                    class_name = gr.Textbox(label="What it is", placeholder="dog", max_length=100, min_width=120)
                with gr.Accordion("Captions (optional)", open=False):
                    captions = gr.Textbox(
                        label="One on each line, with the new word in it; empty: built-in ones", lines=5, max_length=10 * live.LONGEST
                    )
                model = forms.model_choice(app)
                method = MethodForm(app, "customize", names, FIRST if FIRST in names else names[0], describe(embedded), chosen(embedded))
                with gr.Accordion("Samples and pictures", open=False):
                    prompts = gr.Textbox(
                        "\n".join(trying.prompts),
                        label="Prompts to try it with, {} for the word; the first two also while it trains",
                        lines=4,
                        max_length=10 * live.LONGEST,
                    )
                    images = gr.Slider(1, MAX_IMAGES, trying.images, step=1, label="Pictures for each prompt")
                    steps = gr.Slider(1, MAX_STEPS, trying.steps, step=1, label="Steps of drawing them")
                    every = gr.Slider(
                        0, MAX_EVERY, trying.every, step=1, label="A sample and a checkpoint every so many steps of training; 0: none"
                    )
                goes_on = gr.Checkbox(True, label="Go on when this page is closed", info="It can be found again under Jobs.")
                learn = gr.Button("Learn it", variant="primary")
                bar = live.JobBar(app, keep=True)
                with gr.Row(visible=bool(stopped_runs(app)), equal_height=True) as again:
                    run = gr.Dropdown(stopped_runs(app), value=None, label="Runs that were stopped", scale=3, min_width=180)
                    resume = gr.Button("Go on with it", scale=1, min_width=110)
            with gr.Column(scale=3, min_width=280):
                shown: dict[str, Any] = {"format": "png", "interactive": False, "object_fit": "contain", "height": "auto"}
                results = gr.Gallery(label="It in new contexts", elem_id="learnt", columns=4, elem_classes=classes, **shown)
                note = gr.Markdown("Drop a few pictures of a thing, say what it is, and **Learn it**.", elem_classes="pal-note")
                curve = gr.LinePlot(
                    x="step",
                    y="loss",
                    label="Loss while training, smoothed",
                    height=200,
                    visible=False,
                )
                samples = gr.Gallery(
                    label="Samples while training", elem_id="samples", columns=2, visible=False, elem_classes=classes, **shown
                )
        inputs = [*pictures.inputs, token, class_name, captions, model, *method.inputs, prompts, images, steps, every, goes_on]
        seen: WeakKeyDictionary[Job, int] = WeakKeyDictionary()

        def begin(session: str, *given: Any) -> Job:
            asked, go_on = settings(app, *given)
            words = [asked["method"].name(), asked["token"]]
            keep = [words[0], asked["class_name"], asked["token"]]
            title = f"Learn {words[1]} with {words[0]}"
            return app.start(session, title, learned, keep=keep, goes_on=go_on, shelf=app.shelf, limits=app.limits, **asked)

        def go_on(session: str, name: Any, stay: Any) -> Job:
            if name not in stopped_runs(app):
                raise UserError(f"no stopped run {str(name)[:100]!r}; choose one from the list")
            return app.start(session, f"Go on with {name.partition('/')[2]}", gone_on, run=name, goes_on=bool(stay), shelf=app.shelf)

        def more(job: Job) -> dict[Any, Any]:
            changed: dict[Any, Any] = {curve: gr.LinePlot(smoothed(job), visible=True)} if job.curve else {}
            sampled = sorted((job.folder / "samples").glob("*.png")) if job.folder else []
            if len(sampled) > seen.get(job, 0):
                seen[job] = len(sampled)
                changed[samples] = gr.Gallery([(picture_of(path), f"step {int(path.stem)}") for path in sampled[-4:]], visible=True)
            return changed

        def show(job: Job) -> dict[Any, Any]:
            learnt: Learnt = job.result
            assert job.folder
            say = (
                f"Learnt in {live.duration(learnt.seconds)}; saved as `{app.workspace.name(job.folder)}`, which Compare and Compose offer."
            )
            return {**more(job), results: gr.Gallery(learnt.shown), note: say}

        def listed() -> tuple[Any, Any]:
            found = stopped_runs(app)
            return gr.Row(visible=bool(found)), gr.Dropdown(found, value=found[0] if found else None)

        outputs = [*bar.outputs, results, note, curve, samples]
        begun = learn.click(bar.event(begin, show, live.names_of(settings), more), inputs, outputs, api_name="customize", **live.STARTED)
        resumed = resume.click(bar.event(go_on, show, ["run", "goes_on"], more), [run, goes_on], outputs, api_name="resume", **live.STARTED)
        for ended in (begun.success, begun.failure, resumed.success, resumed.failure):
            ended(listed, None, [again, run], api_visibility="private", **live.QUIET)
        app.on_show(listed, [again, run])
        pictures.attend(bar, class_name, model)
        if embedded:
            filled = [pictures.photos, token, class_name, captions, method.name]
            pictures.follow(example.click(lambda: shown_example(app), None, filled, api_name="example", **live.QUIET))


def describe(embedded: bool) -> Any:
    """Says what a method does, and whose options are filled in."""
    own = " Its options are those that were chosen for the embedded model." if embedded else ""
    return lambda name: forms.about(name) + (own if chosen(embedded)(name) else "")


def chosen(embedded: bool) -> Any:
    """Options to begin with."""
    from eval.known import chosen_to_learn

    return chosen_to_learn if embedded else lambda _: {}


def settings(
    app: App,
    pictures: Any,
    masks: Any,
    token: Any,
    class_name: Any,
    captions: Any,
    model: Any,
    method: Any,
    options: Any,
    prompts: Any,
    images: Any,
    steps: Any,
    every: Any,
    goes_on: Any,
) -> tuple[dict[str, Any], bool]:
    """What was asked for, checked: the arguments of `learned`, and whether it goes on without its page."""
    paths = given(app, pictures)
    word, called = live.text(token, "the new word", longest=100), live.optional(class_name, "what it is", longest=100)
    said = tuple(filter(None, (line.strip() for line in live.lines(captions, "captions"))))
    CustomizeTask((Subject(word, called, tuple(paths), (), said),))  # which says what is wrong with them
    made = forms.configured(app, "customize", method, options)
    if not called and not getattr(made, "finds", False):
        raise UserError("what it is is empty, and the method learns what it is one of; write a word such as dog")
    tried = [line.strip() for line in live.lines(prompts, "prompts") if line.strip()]
    if len(tried) > MAX_PROMPTS:
        raise UserError(f"{len(tried)} prompts, at most {MAX_PROMPTS} are taken; write fewer")
    return {
        "pictures": paths,
        "masks": numbered(app, masks, len(paths)),
        "token": word,
        "class_name": called,
        "captions": said,
        "model": app.shelf.check_model(live.text(model, "the model")),
        "method": made,
        "trying": Trying(
            tuple(tried),
            live.whole(images, "pictures for each prompt", 1, MAX_IMAGES),
            live.whole(steps, "steps", 1, MAX_STEPS),
            live.whole(every, "steps between samples", 0, MAX_EVERY),
        ),
    }, bool(goes_on)


def learned(
    shelf: Shelf,
    limits: Limits,
    pictures: list[Path],
    masks: Mapping[int, Path],
    token: str,
    class_name: str,
    captions: tuple[str, ...],
    model: str,
    method: Method,
    trying: Trying,
    out: Path,
) -> Learnt:
    """Store what is given in the run's folder, learn it and draw it."""
    from eval.learning import learn
    from toolkit.pictures import METADATA
    from toolkit.runs import write_atomic
    from toolkit.uploads import store_images

    opened = shelf.open(model)
    images = store_images(pictures, out / "images", limits)
    stored = store_masks(dict(masks), images, out / "masks") if masks else ()
    if captions:
        rows = [{"file_name": image.name, "text": text} for image, text in zip(images, captions, strict=True)]
        write_atomic(out / "images" / METADATA, "".join(json.dumps(row) + "\n" for row in rows))
    subject = Subject(token, class_name, tuple(images), stored, captions)
    return learn(opened, method, subject, out, trying, {"model": model, "edits": []})


def gone_on(shelf: Shelf, out: Path) -> Learnt:
    """The rest of a run that was stopped."""
    from eval.learning import learn, stopped

    method, subject, trying, asked = stopped(out)
    return learn(shelf.open(asked["model"]), method, subject, out, trying, {"model": asked["model"], "edits": []})


def stopped_runs(app: App) -> list[str]:
    """The names of runs that can be gone on with, the newest first; not the one that is running."""
    from eval.learning import can_go_on

    busy = {job.folder for job in app.jobs.all() if not job.over}
    return [name for name in app.workspace.runs() if (path := app.workspace.path(name)) not in busy and can_go_on(path)]


def smoothed(job: Job) -> Any:
    """The loss curve as a table: each loss averaged with those before it."""
    import pandas

    shown, rows = job.curve[0][1], []
    for step, loss in job.curve:
        shown = SMOOTHED * shown + (1 - SMOOTHED) * loss
        rows.append((step, shown))
    return pandas.DataFrame(rows, columns=pandas.Index(["step", "loss"]))


def shown_example(app: App) -> tuple[Any, ...]:
    """The example's pictures, word, class, captions and method."""
    import tempfile

    from eval.subjects import Portrait, alone
    from toolkit.world.scenes import load_world

    with live.told(), tempfile.TemporaryDirectory() as folder:
        portrait = Portrait(EXAMPLE["name"], EXAMPLE["class_name"], EXAMPLE["token"])
        [subject] = alone(portrait, EXAMPLE["style"]).task(load_world(), Path(folder)).subjects
        return [picture_of(path) for path in subject.images], subject.token, subject.class_name, "\n".join(subject.captions), FIRST


def picture_of(path: Path) -> Any:
    """A picture of the working folder for the page."""
    from PIL import Image

    with Image.open(path) as picture:
        return picture.convert("RGB")
