"""The page: every tab in its place."""

from __future__ import annotations

import gradio as gr

from tabs.base import App
from tabs.live import QUIET, session
from toolkit import registry

CACHED = 6 * 3600  # seconds after which what was on its way to a browser is deleted


def build(app: App) -> gr.Blocks:
    """The page: a tab for every file in tabs/ that defines one."""
    tabs = sorted((registry.load("tab", name)() for name in registry.names("tab")), key=lambda tab: tab.order)
    with gr.Blocks(title="Palimpsest", analytics_enabled=False, delete_cache=(CACHED, CACHED)) as page:
        gr.HTML("<h1>Palimpsest</h1><p>Write concepts into a model, erase them, and see what else changed.</p>", elem_classes="pal-head")
        with gr.Tabs():
            for tab in tabs:
                app.building = tab.title
                with gr.Tab(tab.title) as shown:
                    tab.build(app)
                for refresh, outputs in app.refreshing.pop(tab.title, ()):
                    gr.on([shown.select, page.load], refresh, None, outputs, api_visibility="private", **QUIET)

        def leave(request: gr.Request) -> None:
            app.jobs.leave(session(request))

        page.unload(leave)
    return page
