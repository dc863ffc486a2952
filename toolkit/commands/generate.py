"""palimpsest generate: images from prompts, with edits attached."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from typing import Any

from toolkit.commands import add_model_arguments, check_counts, open_model
from toolkit.errors import UserError

HELP = "draw images from prompts, with edits attached"


def add_arguments(parser: ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--prompt", nargs="+", action="extend", required=True, metavar="P")
    parser.add_argument("--negative", default="", help="negative prompt")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image of each prompt (default %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (default %(default)s)")
    parser.add_argument("--guidance", type=float, help="guidance scale, 1 is off (default: what suits the model)")
    parser.add_argument("--n", type=int, default=1, help="images per prompt, with seeds S, S+1, ... (default %(default)s)")
    parser.add_argument("--size", type=int, nargs="+", metavar="PIXELS", help="side, or height and width; default: the model's own")
    parser.add_argument("--batch-size", type=int, help="images at once; default: by their size")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write into")


def run(args: Namespace) -> dict[str, Any]:
    """Writes 0000.png, ..., grid.png (a row per prompt) and prompts.json. Gives `images`, `grid`, `prompts` and the cost."""
    from toolkit.images import grid, save_png
    from toolkit.runs import check_writable, progress, timed, write_json
    from toolkit.sample import generate

    check_counts(args)
    if args.size and len(args.size) > 2:
        raise UserError(f"--size has {len(args.size)} numbers, needs one side or height and width; give one or two")
    out = check_writable(args.out)
    model = open_model(args)
    pairs = [(prompt, args.seed + i) for prompt in args.prompt for i in range(args.n)]
    prompts, seeds = zip(*pairs, strict=True)
    with timed() as cost, progress("generate") as show:
        images = generate(
            model,
            prompts,
            seeds,
            steps=args.steps,
            guidance=args.guidance,
            negative=args.negative,
            batch_size=args.batch_size,
            size=(args.size[0], args.size[-1]) if args.size else None,
            progress=show,
            amp=args.amp,
        )
    files = [str(save_png(image, out / f"{index:04d}.png")) for index, image in enumerate(images)]
    rows = [{"file": f"{index:04d}.png", "prompt": prompt, "seed": seed} for index, (prompt, seed) in enumerate(pairs)]
    return {
        "images": files,
        "grid": str(save_png(grid(images, columns=args.n if args.n > 1 else min(len(images), 8)), out / "grid.png")),
        "prompts": str(write_json(out / "prompts.json", rows)),
        **asdict(cost),
    }
