"""palimpsest evaluate: what a model with its edits draws, with intervals."""

from __future__ import annotations

import csv
import io
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit import registry
from toolkit.commands import add_model_arguments, check_counts, named_options, open_model, pairs
from toolkit.errors import UserError, unknown

if TYPE_CHECKING:
    from torch import Tensor

    from eval.metrics.base import Metric
    from eval.rates import Painter
    from eval.suites import Suite
    from toolkit.model import Model

HELP = "measure what is erased, retained and learnt, with intervals"
ON_WORLD, ON_PROMPTS = ("kid", "clip_t"), ("clip_t",)  # metrics besides the rates, and of prompts
CHUNK = 256  # images held in memory at once when prompts are measured
PROMPT_COLUMNS, SEED_COLUMNS = ("prompt", "text"), ("seed", "evaluation_seed", "sd_seed")


def add_arguments(parser: ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--base", metavar="M", help="the model to compare with; default: --model without its edits")
    parser.add_argument("--erased", nargs="+", action="extend", default=[], metavar="C", help="objects, synonyms, weapon, or styles")
    parser.add_argument("--anchor", metavar="A", help="the object that should be drawn instead of what is erased")
    parser.add_argument("--learned", nargs="+", action="extend", default=[], metavar="TOKEN=CLASS", help="a token and its object")
    parser.add_argument("--prompts", metavar="FILE", help="measure the metrics on these: .txt (one a line) or .csv (column prompt)")
    parser.add_argument(
        "--metrics", nargs="+", metavar="NAME", help=f"see: palimpsest metrics (default: {' '.join(ON_WORLD)}, or {ON_PROMPTS[0]})"
    )
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="METRIC.K=V", help="options of the metrics")
    parser.add_argument(
        "--clip", metavar="SOURCE", help="another CLIP for every metric that has one: hf-hub:OWNER/NAME or local-dir:FOLDER"
    )
    parser.add_argument("--n", type=int, help="images per erased or learnt concept (default 64), of the rest 8 N in all; or per prompt (1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (default %(default)s)")
    parser.add_argument("--guidance", type=float, help="guidance scale, 1 is off (default: what suits the model)")
    parser.add_argument("--batch-size", type=int, help="images at once; default: by their size")
    parser.add_argument("--out", metavar="DIR", help="write before/after pictures and report.json into this folder")


def run(args: Namespace) -> dict[str, Any]:
    """Gives `metrics`, `per_concept`, what was measured (`model`, `edits`, `n`, `seed`, `seconds`) and, with --out, `files`."""
    from toolkit.runs import check_writable, timed, write_json

    check_counts(args)
    if args.prompts and (args.erased or args.learned):
        raise UserError("--prompts measures metrics only, and --erased or --learned was given too; run evaluate once for each")
    asked = read_prompts(args.prompts) if args.prompts else []
    args.n = args.n or (1 if asked else 64)
    out = check_writable(args.out) if args.out else None
    model = open_model(args)
    with timed() as cost:
        result = on_prompts(args, model, asked) if asked else on_world(args, model, out)
    summary = {"model": args.model, "edits": args.edit, "n": args.n, "seed": args.seed, "seconds": cost.seconds}
    result = {**result, **summary}
    if out:
        write_json(out / "report.json", result)
    return result


# --- the embedded world ---------------------------------------------------------------------------------------------
def on_world(args: Namespace, model: Model, out: Path | None) -> dict[str, Any]:
    """Rates on the embedded world; pictures into `out`."""
    from eval.pictures import save_sheet
    from eval.prompts import find, resolve
    from toolkit.world.scenes import load_world

    if not knows_world(model):
        alone = f"{args.model} does not draw the embedded world, so only metrics of given prompts can be measured"
        raise UserError(f"{alone}; give --prompts FILE and --clip SOURCE")
    world = load_world()
    targets = [resolve(world, word) for word in dict.fromkeys(args.erased)]
    anchor = find(world, args.anchor) if args.anchor else None
    if args.anchor and anchor is None:
        raise unknown("object for --anchor", args.anchor, world.things)
    learned = pairs(args.learned, "--learned")
    suite = make_suite(args, model)
    files = []
    if targets and not suite.edited:
        warnings.warn("no edit is attached, so before and after are the same model; give --edit, or --base for a checkpoint", stacklevel=2)
    if targets:
        before, after = suite.erased(targets, anchor.name if anchor else None)
        if out:
            files.append(save_sheet(out / "erased.png", before, after))
    for token, name in learned.items():
        shown = suite.learned(token, name)
        if out:
            files.append(save_sheet(out / f"learned-{name.replace(' ', '-')}.png", shown))
    if targets or not learned or suite.edited:
        before, after = suite.kept(targets)
        if out:
            files.append(save_sheet(out / "retained.png", *((before, after) if suite.edited else (after,))))
    return {"metrics": suite.report.metrics, "per_concept": suite.report.per_concept, **({"files": files} if out else {})}


def knows_world(model: Model) -> bool:
    """Whether a model is the embedded one or made from it: its tokenizer has all words of the embedded one's."""
    from toolkit.model import EMBEDDED

    vocabulary = next(iter(model.arch.tokenizers().values())).get_vocab()
    return embedded_vocabulary(EMBEDDED).items() <= vocabulary.items()


def embedded_vocabulary(folder: Path) -> dict[str, int]:
    """The words of the embedded model's tokenizer and their ids."""
    from transformers import CLIPTokenizer

    if not (folder / "tokenizer").is_dir():
        raise UserError(f"no embedded model in {folder}; install the project with its assets")
    return CLIPTokenizer.from_pretrained(folder / "tokenizer").get_vocab()


def make_suite(args: Namespace, model: Model) -> Suite:
    """The suite for the command's options."""
    from eval.suites import Suite
    from toolkit.world.scenes import load_world

    names = args.metrics or ON_WORLD
    metrics = open_metrics(args, model, [name for name in names if name != "kid"])  # oracle-KID is a part of the suite
    suite = Suite(load_world(), painter(args), model, comparison(args, model), args.n, args.seed, tuple(metrics), "kid" in names)
    if not suite.edited:
        check_references(metrics)
    return suite


def comparison(args: Namespace, model: Model) -> Model:
    """The model to compare with: --base, or the model without its edits."""
    from toolkit.model import load_model

    if args.base:
        return load_model(args.base, device=str(model.arch.device), dtype=args.dtype, attention=args.attention)
    return model.reference() if model.edits else model


def painter(args: Namespace) -> Painter:
    """The command's sampler and oracle."""
    from eval.rates import Painter
    from toolkit.world.oracle import load_oracle

    guidance = Painter.guidance if args.guidance is None else args.guidance
    return Painter(load_oracle(), args.steps, guidance, args.batch_size)


# --- metrics ----------------------------------------------------------------------------------------------------------
def open_metrics(args: Namespace, model: Model, names: Sequence[str]) -> list[Metric]:
    """The metrics with their options. What they measure with is loaded now, so that a mistake is told before anything is drawn."""
    from eval.metrics.clip import ClipMetric

    options = named_options(args.set, names, "metric")
    kinds = {name: registry.load("metric", name) for name in options}
    through_clip = [name for name, kind in kinds.items() if issubclass(kind, ClipMetric)]
    if args.clip and not through_clip:
        raise UserError(f"--clip is given, and none of the metrics ({', '.join(names)}) looks through a CLIP; leave it out")
    for name in through_clip:
        options[name] = {**({"clip": args.clip} if args.clip else {}), **options[name]}
    metrics = [kind.from_config(options[name]) for name, kind in kinds.items()]
    for metric in metrics:
        if isinstance(metric, ClipMetric):
            check_clip(metric.clip, model)
        metric.measured_by()
    return metrics


def check_clip(clip: str | None, model: Model) -> None:
    """Whether the CLIP of this name, None for the embedded world's own, knows what the model draws."""
    if not clip and not knows_world(model):
        raise UserError(f"{model.source} does not draw the embedded world, which the own CLIP knows only; give --clip SOURCE too")


def check_references(metrics: Sequence[Metric]) -> None:
    """Whether these can do without images of another model."""
    for metric in metrics:
        if metric.needs_references:
            folder = f", or --set {metric.name()}.folder=DIR" if hasattr(metric, "folder") else ""
            raise UserError(f"{metric.name()} compares with the unedited model, and no edit is attached; give --edit or --base{folder}")


# --- any model --------------------------------------------------------------------------------------------------------
def on_prompts(args: Namespace, model: Model, asked: list[tuple[str, int | None]]) -> dict[str, Any]:
    """The metrics of the prompts, with and without the edits, n images each with the seeds given or S, S+1, ..."""
    metrics, base = open_metrics(args, model, args.metrics or ON_PROMPTS), comparison(args, model)
    edited = base is not model
    if not edited:
        check_references(metrics)
    before = [metric.fresh() for metric in metrics if edited and not metric.needs_references]
    each = [(text, args.seed + i if seed is None else seed) for text, seed in asked for i in range(args.n if seed is None else 1)]
    for start in range(0, len(each), CHUNK):
        part, title = each[start : start + CHUNK], f"{start}/{len(each)}"
        texts, seeds = zip(*part, strict=True)
        images = drawn(args, model, part, title)
        references = drawn(args, base, part, f"{title} before") if edited else None
        for metric in metrics:
            metric.update(images, texts, seeds, references)
        for metric in before:
            assert references is not None
            metric.update(references, texts, seeds)
    measured = {metric.name(): metric for metric in metrics} | {f"{metric.name()}_before": metric for metric in before}
    return {"metrics": {name: metric.compute().as_json() for name, metric in measured.items()}, "per_concept": {}}


def drawn(args: Namespace, model: Model, asked: Sequence[tuple[str, int]], title: str) -> Tensor:
    """The images of prompts and seeds, as the command's options say."""
    from toolkit.runs import progress
    from toolkit.sample import sample

    texts, seeds = zip(*asked, strict=True)
    with progress(title) as show:
        return sample(model, texts, seeds, steps=args.steps, guidance=args.guidance, batch_size=args.batch_size, progress=show)


def read_prompts(path: str) -> list[tuple[str, int | None]]:
    """Prompts and their seeds (None when the file gives none) of a .txt or .csv file."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"no file {path!r}; give a .txt with one prompt a line, or a .csv with a column prompt")
    text = file.read_text(encoding="utf-8-sig")
    if file.suffix.lower() != ".csv":
        rows: list[tuple[str, int | None]] = [(line.strip(), None) for line in text.splitlines() if line.strip()]
    else:
        table = csv.DictReader(io.StringIO(text, newline=""))
        columns = table.fieldnames or []
        prompt = next((name for name in PROMPT_COLUMNS if name in columns), None)
        seed = next((name for name in SEED_COLUMNS if name in columns), None)
        if prompt is None:
            raise UserError(f"{path!r} has the columns {', '.join(columns)}; one must be called prompt")
        try:
            rows = [(row[prompt].strip(), int(float(row[seed])) if seed and row[seed] else None) for row in table]
        except ValueError as error:
            raise UserError(f"{path!r} has a seed that is no number ({error}); give whole numbers in column {seed}") from None
    if not rows:
        raise UserError(f"no prompt in {path!r}; write one a line")
    return rows
