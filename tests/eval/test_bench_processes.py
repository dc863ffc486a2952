"""Processes that share a folder, machines that take parts, and a process that is killed: always the same results, nothing twice."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from eval.bench_work import LAUNCHED, Part, claimed, leave_group, share
from tests.eval.bench_process import EXPERIMENT, stand_ins
from toolkit import cli
from toolkit.errors import UserError

PROGRAM = ("-m", "tests.eval.bench_process")
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PALIMPSEST_CACHE": "off"}
COSTS = ("seconds", "peak_memory_mb")


def results(folder: Path) -> dict[str, Any]:
    """What the files say, without what it cost. What the unedited model drew is noted in the order in which it was asked for."""
    found = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    return {name: {key: value for key, value in held.items() if key not in COSTS} for name, held in found.items()}


def edited(found: dict[str, Any]) -> dict[str, Any]:
    """The results of edits, without what the unedited model drew: each machine notes only what it needs of that."""
    return {name: held for name, held in found.items() if not name.startswith("unedited")}


def words(folder: Path, name: str, *more: str) -> list[str]:
    """The command's arguments."""
    (folder / "e.toml").write_text(EXPERIMENT)
    return [str(folder / "e.toml"), "--out", str(folder / name), *more]


@pytest.fixture(scope="module")
def here() -> Iterator[Callable[..., None]]:
    """Runs the command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in stand_ins():
            patch.setattr(module, name, value)
        yield lambda *given: assert_done(cli.main(["bench", *given]))


def assert_done(code: int) -> None:
    assert code == 0


@pytest.fixture(scope="module")
def straight(here: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one undisturbed process measures."""
    folder = tmp_path_factory.mktemp("straight")
    here(*words(folder, "out"))
    measured = results(folder / "out")
    for held in measured.values():
        if "drift" in held:  # rounded; how images were batched decides on which side of a digit a value falls
            held["drift"] = pytest.approx(held["drift"], abs=2e-6)
    return measured


def test_two_processes_measure_what_one_does_and_nothing_twice(straight: dict[str, Any], tmp_path: Path) -> None:
    launched = [sys.executable, *TWO, *PROGRAM, *words(tmp_path, "two")]
    done = subprocess.run(launched, check=True, timeout=300, env=ENVIRONMENT, capture_output=True, text=True)
    (said,) = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    measured = re.findall(r"animals, (\S+): \d+ s", done.stderr)
    assert sorted(measured) == ["esd-cat", "esd-dog", "uce-cat", "uce-dog"] and said["of"] == 4 and said["measured"] < 4
    assert len(straight) == 4 + 4 + 1 and results(tmp_path / "two") == straight
    assert len(said["results"]) == 8, "the first process waits for what the other one has claimed"


def test_parts_of_machines_are_the_whole(straight: dict[str, Any], here: Callable[..., None], tmp_path: Path) -> None:
    for i in (2, 1):
        here(*words(tmp_path, f"machine-{i}", "--shard", f"{i}/2"))
    parts = [results(tmp_path / f"machine-{i}") for i in (1, 2)]
    apart = [edited(part) for part in parts]
    assert not apart[0].keys() & apart[1].keys() and apart[0] | apart[1] == edited(straight)


def test_a_killed_run_goes_on(straight: dict[str, Any], here: Callable[..., None], tmp_path: Path) -> None:
    given, out = words(tmp_path, "killed"), tmp_path / "killed"
    process = subprocess.Popen([sys.executable, *PROGRAM, *given], env=ENVIRONMENT)
    deadline = time.monotonic() + 120
    while not list(out.glob("uce-dog.*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.1)  # somewhere within the cell
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and 0 < len(results(out)) < len(straight)
    files = {path: path.stat().st_mtime_ns for path in out.glob("*-*.*.json")}
    here(*given)
    assert results(out) == straight
    complete = [path for path in files if path.stat().st_mtime_ns == files[path]]
    assert len(complete) >= len(files) - 1, "at most the file of the cell that was interrupted is written again"


# --- parts and claims -------------------------------------------------------------------------------------------------
def test_parts_are_every_nth() -> None:
    assert [Part.read(f"{i}/3").of(range(8)) for i in (1, 2, 3)] == [[0, 3, 6], [1, 4, 7], [2, 5]]
    assert Part(2, 2).first(range(5)) == [2, 3, 4, 0, 1] and Part().first(range(3)) == [0, 1, 2]
    for written in ("0/2", "3/2", "1", "a/b", "1/0"):
        with pytest.raises(UserError, match="is not one of 1/n"):
            Part.read(written)


def test_a_launched_process_is_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(LAUNCHED, ("1", "1", "2", "2"), strict=True):
        monkeypatch.setenv(name, value)
    assert leave_group() == Part(2, 2)
    assert not [name for name in LAUNCHED if name in os.environ] and leave_group() == Part(1, 1)


def test_a_claim_is_anothers_until_it_is_left(tmp_path: Path) -> None:
    file = tmp_path / "cell.json"
    with claimed(file) as mine, claimed(file) as again, claimed(tmp_path / "other.json") as other:
        assert (mine, again, other) == (True, False, True)
    with claimed(file) as mine:
        assert mine


def test_a_claim_of_a_process_that_died_is_taken(tmp_path: Path) -> None:
    code = (
        f"import os, pathlib; from eval.bench_work import claimed\nwith claimed(pathlib.Path({str(tmp_path / 'cell.json')!r})): os._exit(1)"
    )
    assert subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT).returncode == 1
    assert list((tmp_path / "claims").iterdir())
    with claimed(tmp_path / "cell.json") as mine:
        assert mine


def test_what_others_do_is_waited_for_and_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.bench_work.PAUSE", 0.01)
    done: list[str] = []
    files = {name: tmp_path / name for name in "abcd"}
    start = threading.Barrier(2)

    def worker() -> None:
        def work(name: str) -> None:
            time.sleep(0.02)
            done.append(name)

        start.wait()
        share("abcd", files.__getitem__, lambda name: name not in done, work)
        assert sorted(done) == list("abcd")

    _both(worker)
    assert sorted(done) == list("abcd")


def _both(worker: Callable[[], None]) -> None:
    threads = [threading.Thread(target=worker) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
