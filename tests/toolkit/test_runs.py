from __future__ import annotations

import json
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from toolkit.errors import UserError
from toolkit.images import grid, save_png, to_pil
from toolkit.runs import check_writable, progress, replacing, seeded, timed, write_atomic, write_json


def test_seeded_depends_on_the_whole_key_and_nothing_else() -> None:
    def draw(*key: str | int) -> float:
        return torch.randn(1, generator=seeded(*key)).item()

    torch.manual_seed(0)
    first = draw("a cat", 1)
    torch.manual_seed(7)
    assert draw("a cat", 1) == first
    assert len({first, draw("a cat", 2), draw("a dog", 1), draw("a cat", "1"), draw("a cat1"), draw("a cat")}) == 6


def test_seeded_is_the_same_on_every_machine() -> None:
    assert seeded("a cat", 1).initial_seed() == 10857346126717601648


def test_replacing_keeps_the_old_file_when_the_block_fails(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    write_json(target, {"n": 1, "where": tmp_path})
    assert json.loads(target.read_text()) == {"n": 1, "where": str(tmp_path)}
    with pytest.raises(RuntimeError), replacing(target) as temporary:
        temporary.write_text("half of")
        raise RuntimeError
    assert json.loads(target.read_text())["n"] == 1
    assert list(tmp_path.iterdir()) == [target], "no temporary file may stay"
    write_atomic(target, b"new")
    assert target.read_bytes() == b"new"


def test_written_files_have_ordinary_permissions(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(write_atomic(tmp_path / "atomic", "x").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_check_writable_makes_the_folder_or_says_why_not(tmp_path: Path) -> None:
    assert check_writable(tmp_path / "a" / "b").is_dir()
    assert not list((tmp_path / "a" / "b").iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file, need a folder"):
        check_writable(tmp_path / "file")
    for impossible in (tmp_path / "file" / "below", Path("/proc/palimpsest")):
        with pytest.raises(UserError, match=f"cannot write into {impossible}") as told:
            check_writable(impossible)
        assert "\n" not in str(told.value)


def test_timed_measures_the_block() -> None:
    with timed() as cost:
        time.sleep(0.05)
    assert 0.05 <= cost.seconds < 5
    assert 50 < cost.peak_memory_mb < 10**6, "a process with torch has hundreds of MiB, not thousands of GiB"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets a process's peak when asked to")
def test_an_earlier_peak_is_forgotten() -> None:
    with timed() as large:
        torch.ones(2**26)
    with timed() as small:
        torch.ones(2**20)
    assert large.peak_memory_mb - small.peak_memory_mb > 200, "256 MiB less 4"


def test_progress_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("title") as show:
        show(1, 3)
        show(3, 3)
    assert capsys.readouterr() == ("", "")


def test_images_keep_their_pixels(tmp_path: Path) -> None:
    pixels = torch.zeros(3, 3, 4, 5)
    pixels[0, 0] = 1.0
    pixels[1, 1] = 0.5
    red, green, black = to_pil(pixels)
    assert (red.size, red.getpixel((4, 3)), green.getpixel((0, 0))) == ((5, 4), (255, 0, 0), (0, 128, 0))
    sheet = grid([red, green, black], columns=2, gap=1)
    assert sheet.size == (11, 9)
    assert [sheet.getpixel(xy) for xy in ((0, 0), (5, 0), (6, 0), (0, 5), (6, 5))] == [
        (255, 0, 0),
        (255, 255, 255),
        (0, 128, 0),
        (0, 0, 0),
        (255, 255, 255),
    ]
    save_png(sheet, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as again:
        assert again.format == "PNG" and again.tobytes() == sheet.tobytes()


LIMITED = """
import numpy as np
from toolkit.runs import limit_memory
np.ones(2**20)
limit_memory(share=0.05)
free = int(next(line for line in open("/proc/meminfo") if line.startswith("MemAvailable")).split()[1]) * 1024
try:
    np.empty(free // 8)
except MemoryError:
    print("refused", np.ones(2**20).sum())
"""


def test_memory_beyond_the_limit_is_an_error_of_who_asks_for_it() -> None:
    """In a process of its own, which goes on afterwards; asked for is all that is free, and never touched."""
    if sys.platform != "linux":
        pytest.skip("the limit is one of Linux")
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=True)
    assert done.stdout == "refused 1048576.0\n"
