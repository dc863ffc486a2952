"""How long the app takes from a click to the picture, next to the sampler alone, and how it bears eight sessions at once.

    python -m benchmarks.app [--repeats 9] [--sessions 8] [--minutes 5] [--out docs/performance.md]

Starts the app in a process of its own, as `palimpsest app` does, on the embedded model. Then, in turns: one picture asked of its API and
fetched, as a click does, and the same picture by `toolkit.sample.generate` here; the ratio is taken within each turn. Then so many
sessions ask it for pictures, for attention and for what a model is, all at once, each as soon as it was answered; an error or a missing
picture ends it. The server's resident memory is looked at every second: a quarter of the time is warm-up.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from gradio_client import Client
from PIL import Image

from benchmarks.page import write_section

SECTION = """## The app

Made by `python -m benchmarks.app`: the server in a process of its own, float32, {threads} threads; one picture of emoji-sd in {steps}
steps with guidance, asked of its API and fetched, beside the sampler alone, in turns; the medians of {repeats}.

| | seconds | |
|---|---|---|
| the sampler alone | {alone:.2f} | |
| from click to picture | {app:.2f} | {ratio:.2f} times (bar ≤ 1.15{missed}) |

{sessions} sessions at once for {minutes:g} minutes: {calls} calls, {errors} errors or lost jobs. Resident memory of the server went from
{first:.0f} MB after warm-up to {last:.0f} MB at the end ({grown:+.1%}).
"""
ASKED: dict[str, Any] = {
    "prompt": "a pistol on a red background",
    "model": "emoji-sd",
    "edits": [],
    "strengths": "{}",
    "seed": 0,
    "count": 1,
    "steps": 20,
    "guidance": 2,
}
MODULE = [sys.executable, "-m", "toolkit"]


@dataclass
class Load:
    """calls: that were answered. wrong: what went wrong, one line each. memory: the server's resident MB, once a second."""

    calls: int = 0
    wrong: list[str] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)

    @property
    def settled(self) -> tuple[float, float]:
        """Resident MB after warm-up and at the end: the medians of the second and of the last quarter."""
        quarter = max(1, len(self.memory) // 4)
        return statistics.median(self.memory[quarter : 2 * quarter]), statistics.median(self.memory[-quarter:])

    @property
    def grown(self) -> float:
        """By which part it grew in between."""
        first, last = self.settled
        return last / first - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--sessions", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--out", type=Path, help="the page whose section is written anew")
    args = parser.parse_args()
    with serving() as (address, pid):
        turns = latency(address, args.repeats)
        alone, app, ratio = (statistics.median(column) for column in zip(*turns, strict=True))
        print(f"the sampler alone {alone:.2f} s, from click to picture {app:.2f} s, {ratio:.3f} times")
        found = load(address, pid, args.sessions, 60 * args.minutes)
    first, last = found.settled
    print(f"{found.calls} calls, {len(found.wrong)} errors, {first:.0f} -> {last:.0f} MB ({found.grown:+.1%})", *found.wrong[:5], sep="\n")
    if args.out:
        given = {"threads": torch.get_num_threads(), "steps": ASKED["steps"], "repeats": args.repeats, "sessions": args.sessions}
        held = {"alone": alone, "app": app, "ratio": ratio, "missed": "" if ratio <= 1.15 else ", **missed**", "minutes": args.minutes}
        memory = {"calls": found.calls, "errors": len(found.wrong) or "no", "first": first, "last": last, "grown": found.grown}
        write_section(args.out, SECTION.format(**given, **held, **memory))
    sys.exit(bool(found.wrong))


@contextmanager
def serving() -> Iterator[tuple[str, int]]:
    """The app in a process of its own: its address and the process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen([*MODULE, "app", "--port", str(port), "--folder", folder, "--device", "cpu"])
        try:
            address = f"http://127.0.0.1:{port}"
            wait_for(address, process)
            yield address, process.pid
        finally:
            process.terminate()
            process.wait(timeout=60)


def wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    """Until the server answers."""
    while process.poll() is None:
        try:
            httpx.get(address)
        except httpx.TransportError:
            time.sleep(0.2)
        else:
            return
    raise SystemExit("the app did not start")


def latency(address: str, repeats: int) -> list[tuple[float, float, float]]:
    """(seconds of the sampler, seconds from click to picture, their ratio), turn by turn, after one for warm-up."""
    from toolkit.model import load_model
    from toolkit.sample import generate

    model, turns = load_model(), []
    with httpx.Client(base_url=address, timeout=60) as browser:
        for _ in range(repeats + 1):
            start = time.perf_counter()
            generate(model, [ASKED["prompt"]], [ASKED["seed"]], steps=ASKED["steps"], guidance=ASKED["guidance"])
            between = time.perf_counter()
            click(browser)
            alone, app = between - start, time.perf_counter() - between
            turns.append((alone, app, app / alone))
    return turns[1:]


def click(browser: httpx.Client) -> None:
    """Ask for the picture over a connection that is kept, as a browser does, follow the job to its end, and fetch what it shows."""
    event = browser.post("/gradio_api/call/compare", json={"data": list(ASKED.values())}).json()["event_id"]
    with browser.stream("GET", f"/gradio_api/call/compare/{event}") as stream:
        lines = stream.iter_lines()
        if not any(line == "event: complete" for line in lines):
            raise SystemExit("the app drew no picture")
        shown = json.loads(next(lines).removeprefix("data: "))
    url = next(one["value"][0]["url"] for one in shown if isinstance(one, dict) and isinstance(one.get("value"), list))
    Image.open(io.BytesIO(browser.get(url).content)).verify()


def load(address: str, pid: int, sessions: int, seconds: float) -> Load:
    """Ask the server for much at once, and look at its memory."""
    found, end, lock = Load(), time.monotonic() + seconds, threading.Lock()

    def ask(number: int) -> None:
        client, turn = Client(address, verbose=False), 0
        while time.monotonic() < end:
            turn += 1
            try:
                problem = _ask(client, number, turn)
            except Exception as error:
                problem = f"session {number}, call {turn}: {type(error).__name__}: {error}"
            with lock:
                found.calls += 1
                found.wrong += [problem] if problem else []

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(sessions)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        found.memory.append(resident(pid))
        time.sleep(min(1.0, seconds / 20))
    return found


def _ask(client: Client, number: int, turn: int) -> str:
    """One call of a session; gives what is wrong with its answer."""
    asked = {**ASKED, "prompt": f"a {'cat' if turn % 2 else 'dog'} on a red background", "seed": number, "count": 1 + turn % 2, "steps": 4}
    if turn % 4 == 3:
        client.predict("emoji-sd", api_name="/describe")
        return ""
    if turn % 4 == 0:
        client.predict("background", *asked.values(), api_name="/attention")
        return ""
    _status, slider, *_ = client.predict(*asked.values(), api_name="/compare")
    pictures = [Path(path) for path in slider["value"]]
    missing = [path for path in pictures if not path.is_file()]
    return "" if len(pictures) == 2 and not missing else f"session {number}, call {turn}: {len(pictures)} pictures, {len(missing)} missing"


def resident(pid: int) -> float:
    """A process's resident memory in MB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main()
