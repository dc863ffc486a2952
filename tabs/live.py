"""Events that start jobs: how far they are, in the page, and every mistake as one line.

A tab has a `JobBar` and makes of two functions what its button does: one that checks what was given and starts the job, and one that
says what to show of its result. What is given comes from a browser or from whoever calls the API, so the first trusts nothing: the
functions at the end of this file say what is wrong in one line.
"""

from __future__ import annotations

import asyncio
import html
import inspect
import math
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import gradio as gr

from tabs.base import App
from toolkit.errors import PalimpsestError, UserError
from toolkit.jobs import Job

LOOK, TELL = 0.03, 1.0  # seconds between looks at a job, and between what the page is told
LONGEST = 500  # characters of a text that is one line, and of a list of them ten times as many


STARTED: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden"}
"""How events of a `JobBar` are wired: the only queue is the app's own."""
QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
"""How small events are that do nothing on the device."""
RENDERED: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": 1, "concurrency_id": "forms"}
"""How forms are made anew: one at a time, since Gradio's list of components is not safe to be added to by several."""


@contextmanager
def told() -> Iterator[None]:
    """Whatever goes wrong in an event is one line in the page, and the server stays up."""
    try:
        yield
    except gr.Error:
        raise
    except PalimpsestError as error:
        raise refusal(str(error)) from None
    except Exception as error:
        raise refusal(f"{type(error).__name__}: {error}") from None


def refusal(line: str) -> gr.Error:
    """One line as Gradio's error; it is text, whatever stands in it."""
    return gr.Error(html.escape(" ".join(line.split())[:LONGEST], quote=False), title="Not done", print_exception=False)


def names_of(check: Callable[..., Any]) -> list[str]:
    """What a function that checks what is given calls it: the names of its parameters after the first, which is the app."""
    return list(inspect.signature(check).parameters)[1:]


def session(request: gr.Request) -> str:
    """What tells one browser's page from another's."""
    return request.session_hash or ""


class JobBar:
    """A line that says how far the tab's job is, and the button that stops it; to be made where it shall stand.

    keep: with another button that ends training early and keeps what it has. outputs: to be among the outputs of its events.
    """

    def __init__(self, app: App, *, keep: bool = False) -> None:
        self.app, self.keep = app, keep
        with gr.Row(equal_height=True, elem_classes="pal-bar"):
            self.line = gr.HTML(told_as("", "Ready."), elem_classes="pal-line", scale=4)
            self.enough = gr.Button("Stop and keep", size="sm", visible=False, min_width=80, scale=1)
            self.stop = gr.Button("Stop", variant="stop", size="sm", visible=False, min_width=80, scale=1)
        self.number = gr.State(0)
        self.stop.click(lambda number: self._stop(number), self.number, None, queue=False, api_visibility="private")
        self.enough.click(lambda number: self._stop(number, keep=True), self.number, None, queue=False, api_visibility="private")

    @property
    def outputs(self) -> list[Any]:
        return [self.line, self.enough, self.stop, self.number]

    def _stop(self, number: int, *, keep: bool = False) -> None:
        with told():
            self.app.jobs.stop(self.app.jobs.find(number), keep=keep)

    def event(
        self,
        start: Callable[..., Job],
        show: Callable[[Job], dict[Any, Any]],
        names: Sequence[str],
        more: Callable[[Job], dict[Any, Any]] | None = None,
    ) -> Callable[..., Any]:
        """What a button does: start(session, *given), then follow the job, then show(job), which is done.

        show: component -> value or update. more: the same while it runs, of what the job has reported, e.g. a loss curve. names: what
        the API calls what is given.
        """

        async def run(request: gr.Request, *given: Any) -> AsyncIterator[dict[Any, Any]]:
            with told():
                job = start(session(request), *given)
                async for news in self._follow(job, more):
                    yield news
                job.outcome()
                yield {**self._last(job), **show(job)}

        request = inspect.Parameter("request", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=gr.Request)
        rest = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        run.__signature__ = inspect.Signature([request, *rest])  # type: ignore[attr-defined]
        return run

    async def _follow(self, job: Job, more: Callable[[Job], dict[Any, Any]] | None) -> AsyncIterator[dict[Any, Any]]:
        told_at, before = -math.inf, ""
        clock = asyncio.get_running_loop().time
        while not job.over:
            if clock() - told_at >= TELL and (line := progress_of(self.app, job)) != before:
                told_at, before = clock(), line
                running = job.state == "running"
                yield {
                    self.line: line,
                    self.stop: gr.Button(visible=True),
                    self.enough: gr.Button(visible=self.keep and running and bool(job.curve)),
                    self.number: job.number,
                    **(more(job) if more else {}),
                }
            await asyncio.sleep(LOOK)
        if job.state != "done":  # else it is told with what it gave
            yield self._last(job)

    def _last(self, job: Job) -> dict[Any, Any]:
        """How a job ended."""
        words = {"done": f"Done in {duration(job.seconds)}.", "stopped": "Stopped.", "failed": f"Failed: {job.line}"}[job.state]
        return {self.line: told_as(job.state, words), self.stop: gr.Button(visible=False), self.enough: gr.Button(visible=False)}


def progress_of(app: App, job: Job) -> str:
    """A job's line, with a bar when it says how far it is."""
    if job.state == "waiting":
        ahead = app.jobs.position(job)
        return told_as("waiting", f"Waiting: {ahead} job{'s' * (ahead != 1)} before this one.")
    if not job.total:
        return told_as("running", f"{job.what or 'Working'} … {duration(job.seconds)}")
    words = [f"{job.what}: {job.done} of {job.total}"]
    if "loss" in job.values:
        words.append(f"loss {job.values['loss']:.4f}")
    words.append(f"about {duration(job.left)} left" if job.left is not None else duration(job.seconds))
    return told_as("running", ", ".join(words), job.done / job.total)


def told_as(state: str, words: str, share: float | None = None) -> str:
    """The line as HTML."""
    bar = f'<progress max="1" value="{share:.3f}" aria-label="progress"></progress>' if share is not None else ""
    return f'<div role="status" aria-live="polite" data-state="{state}"><span>{html.escape(words)}</span>{bar}</div>'


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# --- what is given ----------------------------------------------------------------------------------------------------
def text(value: Any, what: str, *, longest: int = LONGEST) -> str:
    """A line of text. Anything else, none, or too much is a UserError."""
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{what} is empty; write something there")
    return optional(value, what, longest=longest)


def optional(value: Any, what: str, *, longest: int = LONGEST) -> str:
    """The same, or ""."""
    if not isinstance(value, str | None):
        raise UserError(f"{what} is no text; write text there")
    value = (value or "").strip()
    if len(value) > longest:
        raise UserError(f"{what} has {len(value)} characters, at most {longest} are taken; shorten it")
    return value


def lines(value: Any, what: str) -> list[str]:
    """Lines of text without empty ones at the end; no text is none."""
    return optional(value, what, longest=10 * LONGEST).splitlines()


def words(value: Any, what: str) -> tuple[str, ...]:
    """What commas and ends of lines separate."""
    return tuple(filter(None, (word.strip() for line in lines(value, what) for word in line.split(","))))


def number(value: Any, what: str, low: float, high: float) -> float:
    """A number in a range."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:  # which NaN is not
        raise UserError(f"{what} is {str(value)[:50]}, needs a number from {low:g} to {high:g}; give such a number")
    return float(value)


def whole(value: Any, what: str, low: int, high: int) -> int:
    """A whole number in a range."""
    given = number(value, what, low, high)
    if not given.is_integer():
        raise UserError(f"{what} is {given:g}, needs a whole number; give one")
    return int(given)
