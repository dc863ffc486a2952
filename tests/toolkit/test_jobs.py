"""The queue of jobs: one at a time, stopped where they are, and alive whatever they do."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from toolkit.concepts import Concept, EraseTask
from toolkit.errors import PalimpsestError, UserError
from toolkit.jobs import CURVE, Job, Jobs
from toolkit.model import Model
from toolkit.registry import load
from toolkit.runs import report
from toolkit.sample import generate


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    made = Jobs(waiting_at_most=6)
    yield made
    made.close()


@pytest.fixture
def gate(jobs: Jobs) -> Iterator[threading.Event]:
    """A job that keeps the device busy until this is set."""
    opened, begun = threading.Event(), threading.Event()

    def busy(_: Job) -> None:
        begun.set()
        while not opened.wait(0.01):
            report("busy", 1, 2)

    jobs.start("busy", busy, session="gate")
    assert begun.wait(10)
    yield opened
    opened.set()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_jobs_alone_compute_with_several_threads() -> None:
    before, found = torch.get_num_threads(), []
    made = Jobs(threads=2)
    try:
        job = made.start("count", lambda _: torch.get_num_threads())
        until(lambda: job.over)
        other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        other.start()
        other.join()
        assert (job.result, torch.get_num_threads(), found) == (2, 1, [1])
    finally:
        made.close()
        torch.set_num_threads(before)


def test_one_runs_at_a_time_and_in_order(jobs: Jobs, gate: threading.Event) -> None:
    order: list[int] = []
    made = [jobs.start(str(i), lambda _, i=i: order.append(i) or i) for i in range(4)]
    assert [job.state for job in made] == ["waiting"] * 4
    assert [jobs.position(job) for job in made] == [1, 2, 3, 4]
    gate.set()
    until(lambda: made[-1].over)
    assert order == [0, 1, 2, 3] and [job.outcome() for job in made] == [0, 1, 2, 3]
    assert [job.title for job in jobs.all()] == ["3", "2", "1", "0", "busy"]


def test_a_failure_is_one_line_and_the_next_job_runs(jobs: Jobs) -> None:
    def crash(_: Job) -> None:
        raise RuntimeError("out of\n  memory")

    def leave(_: Job) -> None:
        raise SystemExit(3)

    def refuse(_: Job) -> None:
        raise UserError("no such thing; give another")

    made = [jobs.start("x", work) for work in (crash, leave, refuse)]
    after = jobs.start("y", lambda _: 7)
    until(lambda: after.over)
    assert [job.line for job in made] == ["RuntimeError: out of memory", "ended by SystemExit", "no such thing; give another"]
    assert after.outcome() == 7
    with pytest.raises(PalimpsestError, match="out of memory"):
        made[0].outcome()


def test_stopping_one_that_waits_takes_it_out(jobs: Jobs, gate: threading.Event) -> None:
    ran: list[int] = []
    job = jobs.start("x", lambda _: ran.append(1))
    jobs.stop(job)
    jobs.stop(job)
    assert job.state == "stopped" and jobs.position(job) == 0
    gate.set()
    last = jobs.start("y", lambda _: None)
    until(lambda: last.over)
    assert not ran


def test_stopping_sampling_leaves_the_model_as_it_was(jobs: Jobs, tiny: Model) -> None:
    edit = load("method", "uce").from_config({}).fit(tiny, EraseTask((Concept("cat", anchor="dog"),)))
    weights = {name: value.clone() for name, value in tiny.arch.components()["denoiser"].state_dict().items()}

    def draw(_: Job) -> None:
        with tiny.attached(edit):
            generate(tiny, ["a cat"], [0], steps=100_000)

    job = jobs.start("draw", draw)
    until(lambda: job.done > 1)
    jobs.stop(job)
    until(lambda: job.over)
    assert job.state == "stopped" and 1 < job.done < 100_000 and not tiny.edits
    assert all(torch.equal(value, weights[name]) for name, value in tiny.arch.components()["denoiser"].state_dict().items())


def test_stopping_training_and_ending_it_early(jobs: Jobs, tiny: Model) -> None:
    cls = load("method", "few_shot")
    method = replace(cls.from_config({}), max_train_steps=100_000)
    task = cls.example_task(tiny)
    stopped = jobs.start("train", lambda _: method.fit(tiny, task))
    until(lambda: len(stopped.curve) > 2)
    jobs.stop(stopped)
    kept = jobs.start("train", lambda _: method.fit(tiny, task))
    until(lambda: len(kept.curve) > 2)
    assert stopped.state == "stopped" and "loss" in kept.values and kept.total == 100_000 and kept.left
    jobs.stop(kept, keep=True)
    until(lambda: kept.over)
    assert kept.outcome().kind() == "delta"


def test_what_a_stopped_job_held_is_let_go_of(jobs: Jobs) -> None:
    class Large:
        """Stands for tensors."""

    held: list[weakref.ref[Large]] = []

    def work(_: Job) -> None:
        large = Large()
        held.append(weakref.ref(large))
        while True:
            report("x", 1, 2)
            time.sleep(0.001)

    job = jobs.start("x", work)
    until(lambda: bool(held))
    jobs.stop(job)
    until(lambda: job.over)
    gc.collect()
    until(lambda: held[0]() is None)


def test_a_page_that_is_closed_stops_what_need_not_go_on(jobs: Jobs, gate: threading.Event) -> None:
    mine, on, other = (
        jobs.start("a", lambda _: 0, session="me"),
        jobs.start("b", lambda _: 1, session="me", goes_on=True),
        jobs.start("c", lambda _: 2),
    )
    jobs.leave("me")
    gate.set()
    until(lambda: other.over)
    assert (mine.state, on.state, other.state) == ("stopped", "done", "done")


def test_the_queue_is_limited(jobs: Jobs, gate: threading.Event) -> None:
    for _ in range(4):
        jobs.start("x", lambda _: None, session="greedy")
    with pytest.raises(UserError, match="4 jobs are waiting, 4 of them yours"):
        jobs.start("x", lambda _: None, session="greedy")
    jobs.start("y", lambda _: None, session="other")
    jobs.start("y", lambda _: None, session="other")
    with pytest.raises(UserError, match="6 jobs are waiting, 0 of them yours"):
        jobs.start("y", lambda _: None, session="third")
    with pytest.raises(UserError, match="no job 12345"):
        jobs.find(12345)


def test_training_is_told_and_not_what_is_drawn_for_its_steps() -> None:
    job = Job(1, "x", lambda _: None)
    for step in range(1, 3 * CURVE):
        job.see("draw", 1, 20, {})
        job.see("esd", step, 5000, {"loss": 1 / step})
        job.see("draw", 2, 20, {})
        assert (job.what, job.done) == ("esd", step)
    assert len(job.curve) <= CURVE and job.curve[-1][0] >= 3 * CURVE - 2
