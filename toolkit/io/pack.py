"""A folder as one file that a browser can fetch."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

from toolkit.runs import progress, replacing

CHUNK = 2**24  # bytes between two looks at whether to go on


def pack(folder: Path, file: Path) -> Path:
    """Put what a folder holds into a .zip file, and remove the folder. Weights do not shrink, so nothing is compressed."""
    held = sorted(path for path in folder.rglob("*") if path.is_file())
    total, done = sum(path.stat().st_size for path in held), 0
    with replacing(file) as temporary, zipfile.ZipFile(temporary, "w") as archive, progress("packing") as show:
        for path in held:
            with path.open("rb") as read, archive.open(path.relative_to(folder).as_posix(), "w", force_zip64=True) as write:
                while data := read.read(CHUNK):
                    write.write(data)
                    done += len(data)
                    show(done, total)
    shutil.rmtree(folder)
    return file
