"""Jobs: long work, one at a time on the device, that can be watched, stopped and found again.

A job runs in one thread of its own. It is told of by `toolkit.runs.report`, which the sampler and the training loop call after every
step; there it is also stopped, by an exception that unwinds the work, so that edits are detached and memory is let go of.
"""

from __future__ import annotations

import gc
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from toolkit.errors import PalimpsestError, UserError
from toolkit.runs import watched

State = Literal["waiting", "running", "done", "stopped", "failed"]
KEPT = 20  # finished jobs that are remembered with what they gave
CURVE = 400  # points of a loss curve


class Stopped(BaseException):
    """Unwinds a job that was stopped. No Exception, so that nothing on the way takes it for a failure."""


@dataclass(eq=False)
class Job:
    """One piece of work.

    title: for people. session: who asked. goes_on: it goes on when they leave. folder: what it writes into, if anything.
    what, done, total, values: the last step that was reported. curve: (step, loss) of training. line: what went wrong, in one line.
    """

    number: int
    title: str
    work: Callable[[Job], Any] = field(repr=False)
    session: str = ""
    goes_on: bool = False
    folder: Path | None = None
    state: State = "waiting"
    what: str = ""
    done: int = 0
    total: int = 0
    values: dict[str, float] = field(default_factory=dict)
    curve: list[tuple[int, float]] = field(default_factory=list)
    line: str = ""
    result: Any = field(default=None, repr=False)
    asked: float = field(default_factory=time.time)
    began: float = 0.0
    ended: float = 0.0
    _seen: dict[str, tuple[float, int, int]] = field(default_factory=dict, repr=False)  # what -> since when, from which step, the last one
    _stop: bool = False
    _enough: bool = False

    @property
    def over(self) -> bool:
        """Whether it is finished, in whatever way."""
        return self.state in ("done", "stopped", "failed")

    @property
    def seconds(self) -> float:
        """How long it has been running, or ran."""
        return (self.ended or time.time()) - self.began if self.began else 0.0

    @property
    def left(self) -> float | None:
        """Seconds until what is being done now is done, by how long its steps took so far; None before there are two."""
        at, first, last = self._seen.get(self.what, (0.0, 0, 0))
        return (time.time() - at) / (last - first) * (self.total - last) if last > first and not self.over else None

    def outcome(self) -> Any:
        """What it gave. A job that failed or was stopped is a PalimpsestError."""
        if self.state != "done":
            raise PalimpsestError(self.line or f"{self.title} is {self.state}")
        return self.result

    def see(self, what: str, done: int, total: int, values: dict[str, float]) -> bool:
        """The watcher of its thread. What is drawn for a step of training is not told: the training is."""
        if self._stop:
            raise Stopped
        at, first, last = self._seen.get(what, (time.time(), done, done))
        self._seen[what] = (at, first, done) if done >= last else (time.time(), done, done)
        if "loss" in values or "loss" not in self.values or self.done >= self.total:
            self.what, self.done, self.total, self.values = what, done, total, values
        if "loss" in values:
            self.curve.append((done, values["loss"]))
            if len(self.curve) > CURVE:
                self.curve = self.curve[::2]
        return not self._enough


class Jobs:
    """A queue and the one thread that works through it.

    waiting_at_most: jobs in the queue, of_one: those of one session. More are a UserError. threads: that jobs compute with on the CPU, and
    everything else in this process then with one: OpenMP keeps a team for each thread that computes with several, and when all of them
    together are more than the cores, its workers sleep between operations, which takes a small model nearly twice as long. None changes
    nothing.
    """

    def __init__(self, *, waiting_at_most: int = 32, of_one: int = 4, threads: int | None = None) -> None:
        self.waiting_at_most, self.of_one = waiting_at_most, of_one
        self._threads, self._ready = threads, threading.Event()
        self._numbers = itertools.count(1)
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._over: deque[Job] = deque(maxlen=KEPT)
        self._change = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="jobs", daemon=True)
        self._thread.start()
        if threads is not None:
            self._ready.wait()
            torch.set_num_threads(1)

    def start(self, title: str, work: Callable[[Job], Any], **more: Any) -> Job:
        """Put a job into the queue. work: is given the job. more: `session`, `goes_on` of the job."""
        with self._change:
            job = Job(next(self._numbers), title, work, **more)
            own = sum(other.session == job.session for other in self._waiting)
            if len(self._waiting) >= self.waiting_at_most or own >= self.of_one:
                raise UserError(f"{len(self._waiting)} jobs are waiting, {own} of them yours; wait until one is done, or stop one")
            self._waiting.append(job)
            self._change.notify_all()
            return job

    def all(self) -> list[Job]:
        """The running job, those that wait, then the finished ones, the last one first."""
        with self._change:
            return [*([self._running] if self._running else []), *self._waiting, *reversed(self._over)]

    def find(self, number: int) -> Job:
        """The job of this number; none that is remembered is a UserError."""
        for job in self.all():
            if job.number == number:
                return job
        raise UserError(f"no job {number}; look at the list of jobs")

    def position(self, job: Job) -> int:
        """How many jobs come before a waiting one; 0 for any other."""
        with self._change:
            return (self._waiting.index(job) + (self._running is not None)) if job in self._waiting else 0

    def stop(self, job: Job, *, keep: bool = False) -> None:
        """Stop a job: at once when it waits, after its present step when it runs. keep: training ends there, and the work goes on
        with what it has so far. Nothing for a job that is over."""
        with self._change:
            if job in self._waiting:
                self._waiting.remove(job)
                self._finish(job, "stopped", "stopped before it began")
            elif not job.over and keep:
                job._enough = True
            elif not job.over:
                job._stop = True

    def leave(self, session: str) -> None:
        """Stop what a session asked for and does not want to go on without it."""
        for job in self.all():
            if job.session == session and not job.goes_on:
                self.stop(job)

    def close(self) -> None:
        """Stop everything, and the thread."""
        self._closed = True
        for job in self.all():
            self.stop(job)
        with self._change:
            self._change.notify_all()
        self._thread.join(timeout=60)

    # --- the thread -------------------------------------------------------------------------------------------------
    def _work(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
            torch.get_num_threads()  # from here on it is this thread's own number
        self._ready.set()
        while True:
            with self._change:
                self._change.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                job = self._running = self._waiting.popleft()
                job.state, job.began = "running", time.time()
            self._run(job)
            del job

    def _run(self, job: Job) -> None:
        state, line = "done", ""
        try:
            with watched(job.see):
                job.see("", 0, 0, {})
                job.result = job.work(job)
        except Stopped:
            state, line = "stopped", "stopped"
        except PalimpsestError as error:
            state, line = "failed", str(error)
        except Exception as error:
            state, line = "failed", f"{type(error).__name__}: {error}"
        except BaseException as error:  # a SystemExit of some library is no reason for the server to go
            state, line = "failed", f"ended by {type(error).__name__}"
        with self._change:
            self._running = None
            self._finish(job, state, " ".join(line.split())[:500])
        if state != "done":
            gc.collect()  # what the exception's frames held
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()

    def _finish(self, job: Job, state: State, line: str) -> None:
        job.state, job.line, job.ended = state, line, time.time()
        job.work = _nothing  # and all that it held
        self._over.append(job)
        self._change.notify_all()


def _nothing(_: Job) -> None:
    """The work of a job that is over."""
