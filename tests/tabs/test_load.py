"""Eight sessions at once; `python -m benchmarks.app` does it for five minutes and writes down what it found."""

from __future__ import annotations

import os

import pytest

from benchmarks.app import load
from tabs.base import App


@pytest.mark.slow
def test_eight_sessions_at_once(server: str, app: App) -> None:
    found = load(server, os.getpid(), 8, 20.0)
    assert not found.wrong and found.calls >= 16
    assert not [job for job in app.jobs.all() if not job.over], "no job is left over"
    assert found.grown < 0.1
