"""palimpsest export: an edit in the formats that other people's tools load."""

from __future__ import annotations

import functools
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from toolkit.commands import MODEL_HELP, check_format, open_edit, open_model, streamed

HELP = "write an edit as a LoRA, an embedding, plain deltas or a checkpoint"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("edit_file", metavar="EDIT", help="FILE[@SCALE]")
    parser.add_argument("--format", required=True, metavar="FORMAT", help="diffusers-lora, kohya-lora, embedding, delta or checkpoint")
    parser.add_argument("--model", default="emoji-sd", help=MODEL_HELP)
    parser.add_argument("--out", required=True, metavar="PATH", help="folder, or .safetensors file, to write")
    parser.set_defaults(edit=[])


def run(args: Namespace) -> dict[str, Any]:
    """Gives `format` and the `files` that were written; for a checkpoint, its folder or file.

    A checkpoint of a model that is on the disk is copied with the edit merged in, and keeps its form and its types.
    """
    from toolkit.edits.chain import Chain
    from toolkit.io.export import export
    from toolkit.runs import check_writable

    check_format(args.format)
    base = functools.cache(lambda: open_model(args))
    edit, scale = open_edit(args.edit_file, base)
    path = Path(args.out)
    check_writable(path.parent if path.suffix == ".safetensors" or args.format == "checkpoint" else path)
    edit = edit if scale == 1.0 else Chain.of([edit], [scale])
    same_types = args.dtype == "float32"  # by default a checkpoint keeps the types that it is stored in
    files = streamed(args, edit, path) if args.format == "checkpoint" and same_types else None
    if files is None:
        files = export(edit, args.format, path, None if args.format == "embedding" else base())
    return {"format": args.format, "files": [str(file) for file in files]}
