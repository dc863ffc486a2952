"""Attack and audit: can what was erased be brought back? With a page for whoever signs off a checkpoint."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import gradio as gr

from tabs import forms, live, looks
from tabs.base import App, Tab
from toolkit import registry
from toolkit.errors import UserError

if TYPE_CHECKING:
    from eval.attacked import Attacked
    from eval.auditor import Auditor
    from tabs.shelf import Shelf
    from toolkit.jobs import Job

FIRST = ("paraphrase", "closed_form_preimage")
MAX_IMAGES, MAX_STEPS, MAX_CONCEPTS = 64, 100, 10
PROMPTS = ["Attack", "Prompt"]
NOTE = (
    "As many are drawn before and after by name and by synonyms, and under each attack one or more times as many, with a control twice. "
    "An attack that searches takes minutes on a CPU. Few images give wide intervals."
)


class AttackAndAudit(Tab):
    title: ClassVar = "Attack and audit"
    order: ClassVar = 50

    def build(self, app: App) -> None:
        from eval.attacked import HEADINGS, PAGE

        classes = looks.pixels(app.shelf.model.arch.image_size)
        with gr.Row(elem_classes="pal-columns"):
            with gr.Column(scale=2, min_width=280):
                edit = forms.current(
                    gr.Dropdown(saved(app), value=None, label="Saved edit", info="What Erase made, or an edit put into the folder edits.")
                )
                concepts = gr.Textbox(label="What it erased, with commas between", max_length=live.LONGEST)
                model = forms.model_choice(app)
                attacks = gr.CheckboxGroup(choices(), value=list(FIRST), label="Attacks, and what they need", elem_classes="pal-list")
                about = gr.Markdown(describe(FIRST), elem_classes="pal-note")
                options = forms.collected("options")
                with gr.Accordion("Options of the attacks", open=False):
                    self._options(attacks, options)
                with gr.Accordion("Pictures and measurement", open=False):
                    images = gr.Slider(1, MAX_IMAGES, 8, step=1, label="Images for each concept, and under each attack")
                    steps = gr.Slider(1, MAX_STEPS, 12, step=1, label="Steps of drawing them")
                    seed = gr.Number(0, label="First seed", precision=0, minimum=0)
                    gr.Markdown(NOTE, elem_classes="pal-note")
                rest = gr.Checkbox(
                    False, label="Also see what else changed", info="Eight images of other things for each, before and after."
                )
                goes_on = gr.Checkbox(True, label="Go on when this page is closed", info="It can be found again under Jobs.")
                start = gr.Button("Attack", variant="primary")
                bar = live.JobBar(app)
            with gr.Column(scale=3, min_width=280):
                said = gr.HTML("<p>Rates, prompts and pictures of what is tried come here.</p>", elem_classes="pal-note")
                headings = [heading.capitalize() for heading in HEADINGS]
                table = gr.Dataframe(
                    headers=headings,
                    label="How often it is drawn, with 95 % intervals",
                    column_widths=["13%", "23%", "15%", "17%", "15%", "17%"],
                    wrap=True,
                    interactive=False,
                )
                pictures = gr.Gallery(
                    label="Before, after, and under each attack",
                    format="png",
                    columns=4,
                    object_fit="contain",
                    height="auto",
                    interactive=False,
                    elem_classes=classes,
                )
                with gr.Accordion("Prompts that were found or tried", open=False):
                    prompts = gr.Dataframe(headers=PROMPTS, label="Prompts", wrap=True, interactive=False)
                download = gr.DownloadButton("Download the audit page", visible=False)
                page = gr.HTML(visible=False, elem_classes="pal-page")
        inputs = [edit, concepts, model, attacks, options, images, steps, seed, rest, goes_on]

        def begin(session: str, *given: Any) -> Job:
            asked, go_on = settings(app, *given)
            title = f"Attack {', '.join(asked['concepts'][:3]) or 'an edit'} with {', '.join(asked['auditor'].attacks) or 'nothing'}"
            words = ["audit", asked["name"].rpartition("/")[2]]
            return app.start(session, title[:200], attacked, keep=words, goes_on=go_on, shelf=app.shelf, **asked)

        def show(job: Job) -> dict[Any, Any]:
            found: Attacked = job.result
            told = {
                said: f"<p>{html.escape(found.audit.summary())}</p>",
                table: gr.Dataframe(found.rows),
                pictures: gr.Gallery(found.pictures),
                prompts: gr.Dataframe(found.prompts),
                page: gr.HTML(framed(found.audit.page()), visible=True),
            }
            if job.folder:
                told[download] = gr.DownloadButton(value=app.workspace.published(f"{app.workspace.name(job.folder)}/{PAGE}"), visible=True)
            return told

        def choose(name: Any) -> str:
            with live.told():
                return ", ".join(erased_by(app, chosen(app, name)))

        def explain(names: Any) -> str:
            with live.told():
                return describe(tried(names))

        app.on_show(lambda: gr.Dropdown(choices=saved(app)), [edit])
        outputs = [*bar.outputs, said, table, pictures, prompts, page, download]
        start.click(bar.event(begin, show, live.names_of(settings)), inputs, outputs, api_name="attack", **live.STARTED)
        edit.input(choose, edit, concepts, api_visibility="private", **live.QUIET)
        attacks.change(explain, attacks, about, api_visibility="private", **live.QUIET)

    @staticmethod
    def _options(attacks: gr.CheckboxGroup, options: gr.Textbox) -> None:
        """The forms of the chosen attacks."""
        forms.forget(attacks, options)

        @forms.rendered(attacks, options)
        def form(names: list[str] | None, given: str) -> None:
            with live.told():
                changed = forms.read(given, "options")
                for name in tried(names):
                    gr.Markdown(f"**{name}**")
                    own = {key.removeprefix(f"{name}."): value for key, value in changed.items()}
                    forms.options(registry.load("attack", name), own, options, f"{name}.")


def settings(
    app: App,
    edit: Any,
    concepts: Any,
    model: Any,
    attacks: Any,
    options: Any,
    images: Any,
    steps: Any,
    seed: Any,
    everything_else: Any,
    goes_on: Any,
) -> tuple[dict[str, Any], bool]:
    """What was asked for, checked: the arguments of `attacked`, and whether it goes on without its page."""
    from eval.auditor import Auditor

    names, given = tried(attacks), forms.read(options, "options")
    own: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key, value in given.items():
        name, _, option = key.partition(".")
        if name not in own:
            raise UserError(f"an option of {name[:100]!r} is given, which is not among the attacks; choose it, or leave the option out")
        own[name][option] = value
    words = live.words(concepts, "what was erased")
    if len(words) > MAX_CONCEPTS:
        raise UserError(f"{len(words)} concepts, at most {MAX_CONCEPTS} are taken; attack fewer at once")
    auditor = Auditor(
        {name: forms.configured(app, "", name, json.dumps(own[name]), "attack") for name in names},
        n=live.whole(images, "images", 1, MAX_IMAGES),
        seed=live.whole(seed, "seed", 0, 2**31),
        steps=live.whole(steps, "steps", 1, MAX_STEPS),
        erased_only=not everything_else,
    )
    return {
        "name": chosen(app, edit),
        "file": edit_file(app, chosen(app, edit)),
        "concepts": words,
        "model": app.shelf.check_model(live.text(model, "the model")),
        "auditor": auditor,
    }, bool(goes_on)


def attacked(shelf: Shelf, name: str, model: str, file: Path, concepts: Sequence[str], auditor: Auditor, out: Path) -> Attacked:
    """Attack and audit."""
    from eval.attacked import audit

    opened = shelf.open(model)
    return audit(auditor, opened, shelf.edit(name, opened), file, name, concepts, out)


# --- edits ------------------------------------------------------------------------------------------------------------
def saved(app: App) -> list[tuple[str, str]]:
    """The edits that are files of the working folder, by their labels."""
    return [(name.partition("/")[2], name) for name in app.workspace.edits()]


def chosen(app: App, name: Any) -> str:
    """The name of a saved edit."""
    if name not in app.workspace.edits():
        raise UserError(f"no saved edit {str(name or '')[:100]!r}; choose one from the list")
    return name


def edit_file(app: App, name: str) -> Path:
    """Its file; neither that nor the config.json beside it is a link out of the folder."""
    file = app.workspace.edit_file(name)
    app.workspace.path(app.workspace.name(file.with_name("config.json")))
    return file


def erased_by(app: App, name: str) -> list[str]:
    """The concepts that an edit says it erases, in the config.json beside it."""
    from eval.report_edit import told

    return [str(concept["name"]) for concept in told(edit_file(app, name)).get("concepts", ())]


# --- attacks ----------------------------------------------------------------------------------------------------------
def choices() -> list[tuple[str, str]]:
    """The attacks with what they need, the quickest first."""
    names = sorted(registry.names("attack"), key=lambda name: (name not in FIRST, name))
    return [(f"{name} ({registry.load('attack', name).label})", name) for name in names]


def tried(names: Any) -> list[str]:
    """Names of attacks, each once."""
    if not isinstance(names, list | tuple | None) or len(names or ()) > 100:
        raise UserError("the attacks are no list of names; choose from the list")
    known = registry.names("attack")
    for name in names or ():
        if name not in known:
            raise UserError(f"no attack {str(name)[:100]!r}; choose one from the list")
    return list(dict.fromkeys(names or ()))


def describe(names: Sequence[str]) -> str:
    """What the chosen attacks do, one line each; Markdown."""
    lines = [f"- {forms.does(name, 'attack')}{forms.paper(name, 'attack')}" for name in names]
    return "\n".join(lines) or "Nothing is tried: the page says what the edit is and what is drawn by name."


def framed(page: str) -> str:
    """A page within the page, which can reach nothing of it."""
    return f'<iframe sandbox="allow-scripts" title="Audit page" srcdoc="{html.escape(page, quote=True)}"></iframe>'
