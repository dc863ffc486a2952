"""Jobs: what runs, what waits, and what was done, whoever's page started it."""

from __future__ import annotations

import time
from typing import Any, ClassVar

import gradio as gr

from tabs import live
from tabs.base import App, Tab
from toolkit.errors import UserError
from toolkit.jobs import Job

HEADINGS = ["Job", "What", "State", "How far", "Since", "Kept as"]
FILES = (".safetensors", ".zip", ".html")  # that can be fetched
EVERY = 3.0  # seconds between looks at the list


class Activity(Tab):
    title: ClassVar = "Jobs"
    order: ClassVar = 90

    def build(self, app: App) -> None:
        gr.Markdown("One job runs at a time. Those that were told to go on are found here again when a page was closed.")
        table = gr.Dataframe(rows(app), headers=HEADINGS, label="Jobs", interactive=False, wrap=True)
        with gr.Row(equal_height=True):
            number = gr.Number(None, label="Number of a job", precision=0, minimum=1)
            stop = gr.Button("Stop this job", variant="stop")
        run = gr.Dropdown(choices(app), value=None, label="Look at what was kept", interactive=True)
        pictures = gr.Gallery(
            label="Pictures: before above, after below", columns=2, format="png", object_fit="contain", interactive=False, visible=False
        )
        measured = gr.Dataframe(label="Measured", interactive=False, wrap=True, visible=False)
        files = gr.File(label="Files", file_count="multiple", interactive=False, visible=False)
        config = gr.JSON(label="How it was made", visible=False)

        def stopped(job: Any) -> list[list[str]]:
            with live.told():
                app.jobs.stop(app.jobs.find(live.whole(job, "number of the job", 1, 10**9)))
                return rows(app)

        def look(name: Any) -> tuple[Any, ...]:
            with live.told():
                kept = opened(app, name)
                return (
                    gr.Gallery(kept["pictures"], visible=bool(kept["pictures"])),
                    gr.Dataframe(kept["rows"], headers=kept["headings"], visible=bool(kept["rows"])),
                    gr.File([str(app.workspace.published(file)) for file in kept["files"]] or None, visible=bool(kept["files"])),
                    gr.JSON(kept["config"], visible=True),
                )

        app.on_show(lambda: (rows(app), gr.Dropdown(choices=choices(app))), [table, run])
        gr.Timer(EVERY).tick(lambda: rows(app), None, table, api_visibility="private", **live.QUIET)
        stop.click(stopped, number, table, api_name="stop", **live.QUIET)
        run.input(look, run, [pictures, measured, files, config], api_name="look", **live.QUIET)


def rows(app: App) -> list[list[str]]:
    """The table of jobs."""
    return [
        [str(job.number), job.title, job.state, far(app, job), time.strftime("%H:%M:%S", time.localtime(job.asked)), kept_as(app, job)]
        for job in app.jobs.all()
    ]


def far(app: App, job: Job) -> str:
    """How far a job is, or how it ended."""
    if job.state == "waiting":
        return f"{app.jobs.position(job)} before it"
    if job.state == "running":
        return f"{job.what} {job.done}/{job.total}" if job.total else live.duration(job.seconds)
    return job.line or live.duration(job.seconds)


def kept_as(app: App, job: Job) -> str:
    return app.workspace.name(job.folder) if job.folder else ""


def choices(app: App) -> list[tuple[str, str]]:
    """Runs by their labels."""
    return [(name.partition("/")[2], name) for name in app.workspace.runs()]


def opened(app: App, name: Any) -> dict[str, Any]:
    """What a run has kept: pictures, a table, files, and what made it."""
    from PIL import Image

    if name not in app.workspace.runs():
        raise UserError(f"no run {str(name)[:100]!r}; choose one from the list")
    folder = app.workspace.path(name)
    held = {file: app.workspace.said(f"{name}/{file}.json") for file in ("report", "config")}
    pictures = []
    for path in sorted(folder.glob("*.png")):
        with Image.open(app.workspace.path(f"{name}/{path.name}")) as image:
            pictures.append((image.convert("RGB"), path.stem))
    return {
        "pictures": pictures,
        "rows": held["report"].get("rows", []),
        "headings": [str(heading).capitalize() for heading in held["report"].get("headings", [])],
        "files": [f"{name}/{path.name}" for path in sorted(folder.iterdir()) if path.suffix in FILES],
        "config": held["config"],
    }
