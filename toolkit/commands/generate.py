"""palimpsest generate: images from prompts, with edits attached."""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from toolkit.commands import add_model_arguments, check_counts, open_model
from toolkit.errors import UserError

if TYPE_CHECKING:
    from toolkit.model import Model

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
    parser.add_argument("--heat-map", nargs="+", action="extend", default=[], metavar="WORD", help="also draw where words are attended to")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write into")


def run(args: Namespace) -> dict[str, Any]:
    """Writes 0000.png, ..., grid.png (a row per prompt) and prompts.json. Gives `images`, `grid`, `prompts` and the cost.

    With `--heat-map WORD` also 0000-WORD.png, ... for the prompts that say the word, and gives `heat_maps`.
    """
    from contextlib import nullcontext

    from toolkit.heat_maps import heat_maps
    from toolkit.images import grid, overlay, save_png
    from toolkit.runs import check_writable, progress, timed, write_json
    from toolkit.sample import generate

    check_counts(args)
    if args.size and len(args.size) > 2:
        raise UserError(f"--size has {len(args.size)} numbers, needs one side or height and width; give one or two")
    out = check_writable(args.out)
    model = open_model(args)
    pairs = [(prompt, args.seed + i) for prompt in args.prompt for i in range(args.n)]
    prompts, seeds = zip(*pairs, strict=True)
    with timed() as cost, progress("generate") as show, heat_maps(model, args.heat_map) if args.heat_map else nullcontext() as maps:
        shown = heat_map_files(model, args.heat_map, args.prompt)
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
            hooks=[maps] if maps else [],
        )
    files = [str(save_png(image, out / f"{index:04d}.png")) for index, image in enumerate(images)]
    rows = [{"file": f"{index:04d}.png", "prompt": prompt, "seed": seed} for index, (prompt, seed) in enumerate(pairs)]
    heats = [
        str(save_png(overlay(image, maps.of(word, index)), out / f"{index:04d}-{name}.png"))
        for index, (image, (prompt, _)) in enumerate(zip(images, pairs, strict=True))
        for word, name in shown[prompt].items()
        if maps
    ]
    return {
        "images": files,
        **({"heat_maps": heats} if maps else {}),
        "grid": str(save_png(grid(images, columns=args.n if args.n > 1 else min(len(images), 8)), out / "grid.png")),
        "prompts": str(write_json(out / "prompts.json", rows)),
        **asdict(cost),
    }


def heat_map_files(model: Model, words: list[str], prompts: list[str]) -> dict[str, dict[str, str]]:
    """Prompt -> those of the words that it says -> what their files are called. A word that no prompt says is a UserError."""
    from toolkit.attention import token_places

    names = {word: re.sub(r"[^\w-]+", "_", word).strip("_") or "word" for word in words}
    if len(set(names.values())) < len(names):
        raise UserError(f"--heat-map {', '.join(words)} would have the same file names; draw them one by one")
    says = {word: token_places(model.arch, prompts, [word] * len(prompts)).any(1).tolist() for word in names}
    for word, found in says.items():
        if not any(found):
            raise UserError(f"--heat-map {word!r} is in none of the prompts; give a word that one of them says")
    return {prompt: {word: name for word, name in names.items() if says[word][row]} for row, prompt in enumerate(prompts)}
