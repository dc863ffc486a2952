"""How processes share what is to be measured: a part for each machine, and a claim on each cell that several could take."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from filelock import FileLock, Timeout

from toolkit.errors import UserError

Item = TypeVar("Item")
CLAIMS = "claims"
PAUSE = 0.5  # seconds before looking again for what others had claimed
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class Part:
    """The i-th of n parts of a list, counted from 1."""

    i: int = 1
    n: int = 1

    @classmethod
    def read(cls, written: str) -> Part:
        """Of "i/n"; anything else is a UserError."""
        i, _, n = written.partition("/")
        if not (i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
            raise UserError(f"--shard {written!r} is not one of 1/n, 2/n, ..., n/n; write for example --shard 1/4")
        return cls(int(i), int(n))

    def of(self, items: Sequence[Item]) -> list[Item]:
        """Every n-th, so that parts are alike in what they hold."""
        return list(items[self.i - 1 :: self.n])

    def first(self, items: Sequence[Item]) -> list[Item]:
        """All of them, from this part's place on: several processes then seldom reach for the same one."""
        start = len(items) * (self.i - 1) // self.n
        return [*items[start:], *items[:start]]


def leave_group() -> Part:
    """Which of the processes that `accelerate launch` started this one is.

    From now on it is on its own: a method that trains would otherwise wait for the others to train the same.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if torch.cuda.is_available() and size > 1:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    for name in LAUNCHED:
        os.environ.pop(name, None)
    return Part(rank + 1, size)


@contextmanager
def claimed(file: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process alone works on a file within the block; wait: it will, once the others are done.

    The system holds the claim and takes it from a process that dies, however it does.
    """
    folder = file.parent / CLAIMS
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{file.name}.lock")
    try:
        lock.acquire(blocking=wait)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def share(items: Sequence[Item], file: Callable[[Item], Path], missing: Callable[[Item], bool], work: Callable[[Item], None]) -> None:
    """Work on every item that is missing and that no other process works on; at the end none is missing.

    What another process has claimed is waited for, and taken over when that one died. file: which claim an item has.
    """
    left = [item for item in items if missing(item)]
    while left:
        others = []
        for item in left:
            with claimed(file(item)) as mine:
                if not mine:
                    others.append(item)
                elif missing(item):  # another process, or another section, may have been there meanwhile
                    work(item)
        left = [item for item in others if missing(item)]
        if left:
            time.sleep(PAUSE)
