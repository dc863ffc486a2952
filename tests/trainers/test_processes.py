"""Several processes, several parts of a batch, and a process that is killed give what one undisturbed process gives."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.trainers.line import Samples, settings, weights
from toolkit.arch.sd import SD
from toolkit.errors import UserError
from toolkit.io.files import load_edit
from toolkit.model import Model
from toolkit.runs import TrainingRun
from trainers.loop import train

PROGRAM = ("-m", "tests.trainers.line")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("result-*.json"))]


def test_parts_one_after_the_other_are_one_batch(tmp_path: Path) -> None:
    whole, parts = Samples(8), Samples(2)
    losses = train(whole, settings(10), quiet=True)
    assert train(parts, settings(10, gradient_accumulation_steps=4), quiet=True) == pytest.approx(losses, rel=1e-5)
    assert weights(parts) == pytest.approx(weights(whole), rel=1e-5)


def test_two_processes_are_one_with_twice_the_batch(tmp_path: Path) -> None:
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    subprocess.run([sys.executable, *launch, *PROGRAM, str(tmp_path), "4", "12"], check=True, timeout=300, env=ENVIRONMENT)
    first, second = results(tmp_path)
    one = Samples(8)
    losses = train(one, settings(12, ema_decay=0.9), quiet=True)
    assert first["losses"] == second["losses"] == pytest.approx(losses, rel=1e-5) and first["weights"] == second["weights"]
    assert first["weights"] == pytest.approx(weights(one), rel=1e-4)
    assert first["drawn"] != second["drawn"]
    assert [path.name for path in tmp_path.glob("checkpoint*")] == ["checkpoint-10"]


def test_the_command_runs_in_two_processes(tmp_path: Path) -> None:
    Model(SD.tiny()).save(tmp_path / "tiny")
    described = ["-m", "toolkit", "erase", "--model", str(tmp_path / "tiny"), "--method", "esd", "--concept", "cat", "--json", "--set"]
    described += ["trajectories=2", "sampling_steps=3", "max_train_steps=4", "learning_rate=0.001"]
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *described, "train_batch_size=1"]
    for launched, name in ((two, "two"), ([*described, "train_batch_size=2"], "one")):
        command = [sys.executable, *launched, "--out", str(tmp_path / name)]
        done = subprocess.run(command, check=True, timeout=300, env=ENVIRONMENT, capture_output=True, text=True)
        assert len([line for line in done.stdout.splitlines() if line.startswith("{")]) == 1
    edits = [load_edit(tmp_path / name / "edit.safetensors") for name in ("one", "two")]
    for site in edits[0].sites():
        one, other = (edit.delta(site) for edit in edits)
        assert (one - other).norm() <= 0.02 * one.norm() > 0  # Adam turns rounding of small gradients into steps


def test_a_killed_run_goes_on_bit_exactly(tmp_path: Path) -> None:
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    for folder in (killed, straight):
        folder.mkdir()
    command = [sys.executable, *PROGRAM, str(killed), "2", "60", "0.02"]
    process = subprocess.Popen(command, env=ENVIRONMENT)
    deadline = time.monotonic() + 120
    while not list(killed.glob("checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.13)  # somewhere between two checkpoints, or within one
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not results(killed)
    subprocess.run(command, check=True, timeout=120, env=ENVIRONMENT)
    subprocess.run([*command[:3], str(straight), *command[4:]], check=True, timeout=120, env=ENVIRONMENT)
    (resumed,), (whole,) = results(killed), results(straight)
    assert 0 < len(resumed["losses"]) < 60 and resumed["losses"] == whole["losses"][-len(resumed["losses"]) :]
    assert (resumed["weights"], resumed["drawn"]) == (whole["weights"], whole["drawn"])


def test_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    train(Samples(2), settings(20), TrainingRun(tmp_path, 3, checkpoints_total_limit=2), quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-15", "checkpoint-18"]


def test_what_cannot_be_logged_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown tracker that is installed 'tensorbord'"):
        train(Samples(2), settings(1), TrainingRun(tmp_path, log_with=("tensorbord",)), quiet=True)
    with pytest.raises(UserError, match="there is no folder for them"):
        TrainingRun(checkpointing_steps=5)
    with pytest.raises(UserError, match="give both"):
        TrainingRun(tmp_path, sample_steps=5)
