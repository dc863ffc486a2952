from pathlib import Path

import pytest
import torch

from toolkit.cache import cached


def test_what_is_read_again_is_laid_out_as_it_was_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions round by the layout of what they are given, and a run that reads the cache is to go on as the one that wrote it."""
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path))
    made = torch.rand(1, 4, 8, 8).to(memory_format=torch.channels_last)
    first, again = (cached("room", "key", lambda: {"x": made})["x"] for _ in range(2))
    assert torch.equal(first, made) and torch.equal(again, made) and first.stride() == again.stride()
