"""What a tab is, and what the app gives to it. Knows no Gradio."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from tabs.shelf import Shelf
from toolkit.jobs import Job, Jobs
from toolkit.uploads import Limits
from toolkit.workspace import Workspace


@dataclass
class App:
    """What is the same for all tabs and browsers.

    shelf: the models and edits that may be used. jobs: the queue of the device. workspace: the only place that is read and written.
    limits: of pictures that are given. refreshing: what `on_show` was told, by tab, for whoever puts the page together.
    """

    shelf: Shelf
    jobs: Jobs
    workspace: Workspace
    limits: Limits = field(default_factory=Limits)
    refreshing: dict[str, list[tuple[Callable[[], Any], Sequence[Any]]]] = field(default_factory=dict)
    building: str = ""

    @classmethod
    def of(cls, args: Namespace, threads: int | None = None) -> App:
        """The one that the command's options ask for; the model and its edits are loaded. threads: see `Jobs`."""
        workspace = Workspace(Path(args.folder))
        jobs = Jobs(threads=threads)  # before the model is loaded, which would make a team
        return cls(Shelf.of(args, workspace), jobs, workspace)

    def start(
        self,
        session: str,
        title: str,
        work: Callable[..., Any],
        *,
        keep: Sequence[str] = (),
        run: str = "",
        goes_on: bool = False,
        **given: Any,
    ) -> Job:
        """Put work(**given) into the queue. session: of the browser that asks, see `live.session`.

        keep: words that name a run of the working folder, which work is then given as `out`; of a job that does not get to its end
        the run stays if it holds a checkpoint to go on from. run: the name of one that is gone on with, instead of a new one.
        goes_on: also when the browser is closed.
        """
        work = partial(work, **given)
        kept = partial(self._kept, work, keep, run) if keep or run else lambda _: work()
        return self.jobs.start(title, kept, session=session, goes_on=goes_on)

    def _kept(self, work: Callable[..., Any], keep: Sequence[str], run: str, job: Job) -> Any:
        out = job.folder = self.workspace.path(run) if run else self.workspace.new_run(*keep)
        try:
            return work(out=out)
        except BaseException:
            if not run and not any(out.glob("checkpoint-*")):
                shutil.rmtree(out)
                job.folder = None
            raise

    def on_show(self, refresh: Callable[[], Any], outputs: Sequence[Any]) -> None:
        """Have the tab that is being built call refresh() for these outputs whenever it is shown, e.g. for a list of edits."""
        self.refreshing.setdefault(self.building, []).append((refresh, outputs))


class Tab(ABC):
    """A tab of the app. One subclass per file in tabs/, found by file.

    title: on the tab. order: from left to right.
    """

    title: ClassVar[str]
    order: ClassVar[int]

    @abstractmethod
    def build(self, app: App) -> None:
        """Make the components, and say what their events do. Called within the tab, once for the page of all browsers."""
