"""Checkpoints: what a model is, and the model or its edits as files for other tools."""

from __future__ import annotations

import functools
import html
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import gradio as gr

from tabs import forms, live
from tabs.base import App, Tab
from toolkit.errors import PalimpsestError, UserError

if TYPE_CHECKING:
    from tabs.shelf import Shelf
    from toolkit.edits.base import Edit
    from toolkit.io.describe import CheckpointFacts
    from toolkit.jobs import Job

WHOLE = "checkpoint"  # the only format that there is without an edit
FOR = {
    "diffusers-lora": "diffusers-lora: load_lora_weights",
    "kohya-lora": "kohya-lora: ComfyUI, A1111, Kohya's scripts",
    "embedding": "embedding: new words, for load_textual_inversion, ComfyUI, A1111",
    "delta": "delta: plain tensors of what changes",
    WHOLE: "checkpoint: the model with the edits merged into it",
}
HEADINGS = ["What", "Is"]
EDITS = ["Saved edit", "Made by", "Size", "Fitted on this model"]


class Checkpoints(Tab):
    title: ClassVar = "Checkpoints"
    order: ClassVar = 60

    def build(self, app: App) -> None:
        folder = "a diffusers folder or a .safetensors file in the folder models"
        with gr.Row(elem_classes="pal-columns"):
            with gr.Column(scale=2, min_width=280):
                model = forms.model_choice(app)
                gr.Markdown(
                    f"The embedded model, {folder}{', or a hub id' if app.shelf.allow_hub else ''}. Only safetensors are read.",
                    elem_classes="pal-note",
                )
                look = gr.Button("Look at it", variant="primary")
                edits = forms.edits_choice(app, "Edits to export, in order")
                strengths = forms.collected("strengths")
                forms.strengths(app, edits, strengths)
                format = gr.Radio(fitting([WHOLE]), value=WHOLE, label="Export as", elem_classes="pal-list")
                export = gr.Button("Export", variant="primary")
                bar = live.JobBar(app)
                note = gr.HTML(elem_classes="pal-note", visible=False)
                download = gr.DownloadButton("Download", visible=False)
            with gr.Column(scale=3, min_width=280):
                facts = gr.Dataframe(headers=HEADINGS, label="What it is", interactive=False, wrap=True)
                fitted = gr.Dataframe(headers=EDITS, label="Saved edits", interactive=False, wrap=True)

        def begin(session: str, model: Any) -> Job:
            name = app.shelf.check_model(live.text(model, "the model"))
            return app.start(session, f"Look at {name}"[:200], described, shelf=app.shelf, model=name)

        def show(job: Job) -> dict[Any, Any]:
            found: CheckpointFacts = job.result
            return {facts: rows(found), fitted: saved(app, found.fingerprint)}

        def write(session: str, *given: Any) -> Job:
            asked = settings(app, *given)
            title = f"Export {', '.join(asked['strengths']) or asked['model']} as {asked['format']}"
            return app.start(session, title[:200], exported, keep=("export", asked["format"]), shelf=app.shelf, **asked)

        def offer(job: Job) -> dict[Any, Any]:
            found: Exported = job.result
            label = f"Download {found.file.name} ({size(found.file.stat().st_size)})"
            value = app.workspace.published(app.workspace.name(found.file))
            return {
                download: gr.DownloadButton(label, value=value, visible=True),
                note: gr.HTML(paragraphs(found.said), visible=bool(found.said)),
            }

        def fit(names: Any, value: str) -> gr.Radio:
            with live.told():
                found = formats_of(app, forms.chosen(app, names))
                return gr.Radio(fitting(found), value=value if value in found else found[0])

        look.click(bar.event(begin, show, ["model"]), model, [*bar.outputs, facts, fitted], api_name="describe", **live.STARTED)
        names = live.names_of(settings)
        export.click(
            bar.event(write, offer, names),
            [model, edits, strengths, format],
            [*bar.outputs, note, download],
            api_name="export",
            **live.STARTED,
        )
        edits.change(fit, [edits, format], format, api_visibility="private", **live.QUIET)


def settings(app: App, model: Any, edits: Any, strengths: Any, format: Any) -> dict[str, Any]:
    """What was asked for, checked: the arguments of `exported`."""
    given = forms.strengths_of(app, edits, strengths)
    fit = formats_of(app, list(given))
    if format not in fit:
        raise UserError(f"no format {str(format)[:50]!r} for {', '.join(given) or 'a model without edits'}; choose one of {', '.join(fit)}")
    return {"model": app.shelf.check_model(live.text(model, "the model")), "strengths": given, "format": format}


def paragraphs(lines: Sequence[str]) -> str:
    """Lines of text as HTML."""
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines)


# --- what it is -------------------------------------------------------------------------------------------------------
def described(shelf: Shelf, model: str) -> CheckpointFacts:
    """What a model is; nothing is loaded of one on the disk."""
    from toolkit.io import describe

    place = shelf.place(model)
    return describe.on_disk(place) if place else describe.in_memory(shelf.open(model))


def rows(found: CheckpointFacts) -> list[list[str]]:
    """The table of what a model is."""
    parts = [[f"Parameters of {name}", f"{count:,}"] for name, count in found.components.items()]
    inside = [f"{one.get('edit')} at {one.get('strength')}" for one in found.merged]
    told = {
        "Stored as": found.form,
        "Architecture": found.architecture,
        "Predicts": found.predicts,
        "Size": size(found.bytes),
        "Numbers": ", ".join(f"{count:,} {dtype}" for dtype, count in found.dtypes.items()),
        "Weights": found.fingerprint["weights"],
        "Edits inside": ", ".join(inside) or "none that it tells of",
        "Pickles, never read": ", ".join(found.pickles),
    }
    return [*([what, value] for what, value in told.items() if value), *parts]


def saved(app: App, fingerprint: Mapping[str, str]) -> list[list[str]]:
    """The table of saved edits, and whether each was fitted on the model with this fingerprint."""
    from toolkit.fingerprint import same_base
    from toolkit.io.describe import fitted_on

    table = []
    for name in app.workspace.edits():
        file = app.workspace.edit_file(name)
        try:
            method, base = fitted_on(file)
            fits = ("yes" if same_base(base, fingerprint) else "no") if base else "it does not say"
        except PalimpsestError:
            method, fits = "", "it is damaged"
        table.append([name, method, size(file.stat().st_size), fits])
    return table


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.1f} GB" if count >= 2**30 else f"{count / 2**20:.1f} MB" if count >= 2**20 else f"{count / 2**10:.1f} KB"


# --- export -----------------------------------------------------------------------------------------------------------
def fitting(formats: list[str]) -> list[tuple[str, str]]:
    """Formats with what they are for."""
    return [(FOR.get(format, format), format) for format in formats]


def formats_of(app: App, names: list[str]) -> list[str]:
    """The formats that these edits can be written in together."""
    from toolkit.edits.chain import Chain
    from toolkit.io.export import formats

    if not names:
        return [WHOLE]
    found = formats(Chain.of([app.shelf.edit(name, app.shelf.model) for name in names]))
    if not found:
        raise UserError(f"no other tool reads {' and '.join(names)}; leave some out, or attach them when sampling")
    return found


@dataclass(frozen=True)
class Exported:
    """file: what was written, one file. said: what there is to know about it."""

    file: Path
    said: tuple[str, ...]


def exported(shelf: Shelf, model: str, strengths: Mapping[str, float], format: str, out: Path) -> Exported:
    """Write the model, or the edits, in a format into `out`."""
    from toolkit.edits.chain import Chain
    from toolkit.io.describe import MERGED
    from toolkit.io.export import export
    from toolkit.io.pack import pack
    from toolkit.io.stream import write_checkpoint
    from toolkit.runs import write_json

    opened = functools.cache(lambda: shelf.open(model))
    edits = [shelf.edit(name, opened) for name in strengths]
    whole = Chain.of(edits, list(strengths.values())) if edits else None
    stem = (model if format == WHOLE else next(iter(strengths))).rstrip("/").rpartition("/")[2].removesuffix(".safetensors")
    target, file = out / f"{stem}-{format}", out / f"{stem}-{format}.safetensors"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        if whole is None:
            written = [opened().save(target)]
        elif format == WHOLE and (place := streams_to(shelf, model, whole)):
            written = [write_checkpoint(place, whole, file if place.is_file() else target)]
        else:
            written = export(whole, format, target, None if format == "embedding" else opened())
    write_json(out / "config.json", {"export": format, "model": model, "edits": dict(strengths)})
    if format == WHOLE and target.is_dir():
        inside = [{"edit": name, "strength": strengths[name], **_made(edit)} for name, edit in zip(strengths, edits, strict=True)]
        write_json(target / MERGED, inside)
    if len(written) == 1 and written[0].is_file():
        written[0].rename(file)
    else:
        file = pack(target, out / f"{stem}-{format}.zip")
    if target.is_dir():
        shutil.rmtree(target)
    return Exported(file, tuple(dict.fromkeys(str(one.message) for one in said)))


def streams_to(shelf: Shelf, model: str, whole: Edit) -> Path | None:
    """Where the checkpoint is that the edits can be written into without loading it: one on the disk, in the types that it has."""
    from toolkit.io.stream import streamable

    return shelf.place(model) if streamable(whole) and shelf.options.get("dtype", "float32") == "float32" else None


def _made(edit: Edit) -> dict[str, Any]:
    return {"kind": edit.kind(), "method": edit.info.method, "config": dict(edit.info.config)}
