"""What every run needs: reproducible noise, a progress bar, safe writing, and what it cost."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import json
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from toolkit.errors import UserError


def seeded(*key: str | int) -> torch.Generator:
    """A CPU generator that depends on the key alone: not on the process, the machine, or the order of calls."""
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big"))


Watcher = Callable[[str, int, int, dict[str, float]], bool]
_WATCHER: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@contextmanager
def watched(by: Watcher) -> Iterator[None]:
    """Within the block, in this thread, `by` is told of every step that is done: (what, done, total, values such as the loss).

    It returns whether training should go on. What it raises ends the work where it is.
    """
    token = _WATCHER.set(by)
    try:
        yield
    finally:
        _WATCHER.reset(token)


def report(what: str, done: int, total: int, values: dict[str, float] | None = None) -> bool:
    """Tell who watches that so many of `total` steps are done. Gives whether to go on: False asks training to end with what it has."""
    watcher = _WATCHER.get()
    return watcher is None or watcher(what, done, total, values or {})


@contextmanager
def progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, shown on a terminal only. Yields a function to call with (done, total)."""
    with tqdm(desc=title, disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
            report(title, done, total)

        yield show


def check_writable(folder: str | Path) -> Path:
    """Make the folder if it is not there and try to write into it, before any work is done. Failing is a UserError."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except FileExistsError:
        raise UserError(f"{folder} is a file, need a folder to write into; give another --out") from None
    except OSError as error:
        raise UserError(f"cannot write into {folder} ({error.strerror}); give a folder that you may write to") from None
    return folder


def cache_folder() -> Path | None:
    """Where to keep what can be computed again, or None when PALIMPSEST_CACHE is "off".

    PALIMPSEST_CACHE, else palimpsest in XDG_CACHE_HOME, else in ~/.cache. It need not exist.
    """
    given = os.environ.get("PALIMPSEST_CACHE")
    if given == "off":
        return None
    return Path(given or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "palimpsest")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file name beside `path` to write to; at the end of the block it takes the place of `path`.

    A reader sees the old file or the complete new one, never a part; when the block raises, the old one stays.
    """
    path = Path(path)
    temporary = path.with_name(f".{uuid.uuid4().hex}.{path.name}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: str | Path, data: bytes | str) -> Path:
    """Write a whole file by `replacing` it. Text is UTF-8."""
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
    return Path(path)


def write_json(path: str | Path, value: Any) -> Path:
    """Write a JSON file atomically. Paths are written as text."""
    return write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def computes_in_bf16(device: str) -> bool:
    """Whether a kind of device ("cpu", "cuda") has instructions for bfloat16, rather than emulating them."""
    return torch.cpu._is_avx512_bf16_supported() if device == "cpu" else torch.cuda.is_bf16_supported(including_emulation=False)


def limit_memory(share: float = 0.9) -> None:
    """Let this process take so much of the memory that is free now and no more, where the system can be told.

    More is then an error of whoever asked for it, and not the end of the process. For the CPU alone: drivers of accelerators map more.
    """
    try:
        import resource

        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        used = int(Path("/proc/self/statm").read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (used + int(share * free), hard))
    except (ImportError, OSError, ValueError):
        return


def is_main_process() -> bool:
    """Whether this is the process that writes and prints, of those that `accelerate launch` or torchrun started."""
    return int(os.environ.get("RANK", "0")) == 0


@dataclass(frozen=True)
class TrainingRun:
    """What a run of training leaves behind while it goes on.

    folder: where; None keeps nothing. checkpointing_steps: a checkpoint every so many steps, to go on from when the run is started
    again; 0 writes none. checkpoints_total_limit: how many of them are kept. sample_steps: images of `sample_prompts` every so many
    steps, always from the same noise; 0 draws none. log_with: trackers of accelerate, "tensorboard", "wandb" or "trackio".
    """

    folder: Path | None = None
    checkpointing_steps: int = 0
    checkpoints_total_limit: int = 1
    sample_steps: int = 0
    sample_prompts: tuple[str, ...] = ()
    log_with: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.folder is None and (self.checkpointing_steps or self.sample_steps or self.log_with):
            raise UserError("checkpoints, samples and logs are asked for, and there is no folder for them; give one")
        if bool(self.sample_steps) != bool(self.sample_prompts):
            given = f"sample_steps is {self.sample_steps}, with {len(self.sample_prompts)} sample_prompts"
            raise UserError(f"{given}; give both, or none of the two")


@dataclass
class Cost:
    """Wall-clock seconds, and the peak memory meanwhile in MiB: of the GPU when one was used, else of the whole process.

    Systems other than Linux know the process's peak only since its start.
    """

    seconds: float = 0.0
    peak_memory_mb: float = 0.0


def device_name(device: torch.device) -> str:
    """What a device is called where costs are told: "CPU", or a GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


@contextmanager
def timed() -> Iterator[Cost]:
    """Measures the block: the yielded Cost is filled in at its end."""
    cost, start = Cost(), time.perf_counter()
    on_gpu = torch.cuda.is_initialized()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        _forget_peak()
    yield cost
    cost.seconds = round(time.perf_counter() - start, 3)
    cost.peak_memory_mb = round((torch.cuda.max_memory_allocated() if on_gpu else _peak_of_process()) / 2**20, 1)


def _forget_peak() -> None:
    """Count the process's peak memory from now on, where the system can: what was freed is given back to it before."""
    if (peak := Path("/proc/self/clear_refs")).exists():
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # not every container may, not every C library can
            ctypes.CDLL(None).malloc_trim(0)
            peak.write_text("5")


def _peak_of_process() -> int:
    """The largest resident size of this process, in bytes: since it was last forgotten, or so far."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts ru_maxrss in bytes, Linux in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
