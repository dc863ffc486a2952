"""Which method, what is said about it, and a form of its options, made anew when another is chosen."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gradio as gr

from tabs import forms, live
from tabs.base import App
from toolkit import registry

Presets = Callable[[str], Mapping[str, Any]]


def nothing(_: str) -> Mapping[str, Any]:
    """No options besides the defaults."""
    return {}


class MethodForm:
    """To be made where it shall stand.

    kind: of the methods. names: those to choose among; "" stands for none. say: what is said about one, Markdown. chosen: options to
    begin with, where they are not the defaults. preset: a button's words, and the options that it fills in; without options for a method it
    is not there. Its `inputs` are what an event is given: the name, and the options as JSON.
    """

    def __init__(
        self,
        app: App,
        kind: str,
        names: Sequence[str | tuple[str, str]],
        first: str,
        say: Callable[[str], str],
        chosen: Presets = nothing,
        label: str = "Method",
        preset: tuple[str, Presets] = ("", nothing),
    ) -> None:
        self.app, self.kind, self.say, self.chosen = app, kind, say, chosen
        words, self._preset = preset
        self.name = gr.Dropdown(list(names), value=first, label=label)
        self.about = gr.Markdown(say(first), elem_classes="pal-note")
        self.options = forms.collected("options")
        self._start = gr.State((first, dict(chosen(first))))
        with gr.Accordion("Options of the method", open=False, visible=bool(first)) as self._box:
            fill = gr.Button(words, size="sm", visible=bool(first and self._preset(first)))
            self._form()
        self.options.value = json.dumps(self._start.value[1])
        outputs = [self.about, self.options, self._start, self._box, fill]
        self.name.change(self._choose, self.name, outputs, api_visibility="private", **live.QUIET)
        fill.click(self._fill, self.name, [self.options, self._start], api_visibility="private", **live.QUIET)

    @property
    def inputs(self) -> list[Any]:
        return [self.name, self.options]

    def _choose(self, name: Any) -> tuple[Any, ...]:
        with live.told():
            if name:
                forms.configured(self.app, self.kind, name, "{}")
            options = dict(self.chosen(name)) if name else {}
            fill = gr.Button(visible=bool(name and self._preset(name)))
            return self.say(name), json.dumps(options), (name, options), gr.Accordion(visible=bool(name)), fill

    def _fill(self, name: Any) -> tuple[str, tuple[str, dict[str, Any]]]:
        with live.told():
            forms.configured(self.app, self.kind, name, "{}")
            options = dict(self._preset(name))
            return json.dumps(options), (name, options)

    def _form(self) -> None:
        @gr.render(self._start, **live.RENDERED)
        def form(chosen: tuple[str, dict[str, Any]]) -> None:
            name, changed = chosen
            if name:
                forms.options(registry.load("method", name), changed, self.options)
