"""The page: every tab in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr
from gradio_client.utils import is_http_url_like

from tabs.base import App
from tabs.live import QUIET, refusal, session, told
from toolkit import registry
from toolkit.errors import UserError

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
    page.preprocess_data = _uploaded(page.preprocess_data)
    return page


def _uploaded(preprocess: Callable[..., Any]) -> Callable[..., Any]:
    """The page's own reading of what an event is given, but that no address among it is fetched: files are uploaded, or there are none."""

    async def read(event: Any, inputs: list[Any], *more: Any, **named: Any) -> Any:
        with told():
            left: list[Any] = [inputs]
            while left:
                value = left.pop()
                if isinstance(value, dict) and is_http_url_like(str(value.get("path", ""))):
                    raise UserError("an address is given, and files are taken by upload alone; upload it")
                left += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        try:
            return await preprocess(event, inputs, *more, **named)
        except gr.Error as error:  # of a component, which repeats all that it was given
            raise refusal(str(error.message)) from None

    return read
