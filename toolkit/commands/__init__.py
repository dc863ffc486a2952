"""What the commands of every room share: the options for a model and its edits, settings, and the files of a result.

A command is a module with `HELP` (one line), `add_arguments(parser)` and `run(args) -> dict`; the dict is what `--json`
prints. Its heavy imports are inside `run`, so that `--help` and a mistake in the options answer at once.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit import registry
from toolkit.errors import UserError, unknown

if TYPE_CHECKING:
    from toolkit.concepts import Task
    from toolkit.edits.base import Edit
    from toolkit.method import Method
    from toolkit.model import Model
    from toolkit.runs import TrainingRun

MODEL_HELP = "diffusers folder, .safetensors checkpoint, hub id, or emoji-sd (default)"


def add_model_arguments(parser: ArgumentParser) -> None:
    """`--model` and `--edit`, for `open_model`."""
    parser.add_argument("--model", default="emoji-sd", help=MODEL_HELP)
    parser.add_argument("--edit", nargs="+", action="extend", default=[], metavar="FILE[@SCALE]", help="edits to attach, in order")


def add_fit_arguments(parser: ArgumentParser) -> None:
    """The options of every command that fits an edit, for `fit_and_save`."""
    add_model_arguments(parser)
    parser.add_argument("--method", required=True, metavar="NAME", help="see: palimpsest methods")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="K=V", help="options of the method")
    parser.add_argument("--export", metavar="FORMAT", help="also write the edit in this format, see: palimpsest export --help")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write into")


def add_training_arguments(parser: ArgumentParser) -> None:
    """The options of a run of training, for `fit_and_save`."""
    training = parser.add_argument_group("for methods that train", "The same command goes on from the newest checkpoint in DIR.")
    training.add_argument("--checkpointing-steps", type=int, default=0, metavar="K", help="write a checkpoint every K steps")
    training.add_argument("--checkpoints-total-limit", type=int, default=1, metavar="N", help="how many are kept (default %(default)s)")
    training.add_argument("--sample-steps", type=int, default=0, metavar="K", help="draw the sample prompts every K steps")
    training.add_argument("--sample-prompts", nargs="+", action="extend", default=[], metavar="P", help="see --sample-steps")
    training.add_argument("--log-with", nargs="+", default=[], metavar="TRACKER", help="tensorboard, wandb or trackio")


def open_model(args: Namespace, *, lazily: bool = False) -> Model:
    """The model that `--model`, `--device`, `--dtype`, `--attention`, `--offload` and `--strict` ask for, with every `--edit` attached.

    lazily: see `load_model`. A model that is offloaded is loaded as a whole.
    """
    import torch

    from toolkit.attention_backend import use_attention
    from toolkit.model import load_model

    own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # of this process, when several were launched
    device = args.device or (own if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r} cannot be used ({str(error).splitlines()[0]}); give --device cpu") from None
    if args.offload and torch.device(device).type == "cpu":
        raise UserError("--offload moves parts between the CPU and an accelerator, and the device is cpu; leave it out")
    place = "cpu" if args.offload else device
    lazily = lazily and not args.offload
    load = functools.partial(load_model, args.model, device=place, dtype=args.dtype, strict=args.strict, lazily=lazily)
    base = functools.cache(load)  # loaded last, unless an edit needs it: a mistake in a file is told before
    edits = [open_edit(written, base) for written in args.edit]
    model = base()
    use_attention(model.arch, args.attention, device)  # not by `load_model`: offloaded parts are on the CPU yet
    for edit, scale in edits:
        model.attach(edit, scale)
    if args.offload:
        model.arch.pipe.enable_model_cpu_offload(device=device)
    return model


def open_edit(written: str, base: Callable[[], Model] | None = None) -> tuple[Edit, float]:
    """The edit and scale of FILE[@SCALE]; FILE may be the folder that a command wrote, or another tool's file.

    base: gives the model that the edit is for; called only when the file does not say all by itself.
    """
    from toolkit.io.files import load_edit

    name, number, scale = written, "", 1.0
    if not Path(written).exists() and "@" in written:
        name, _, number = written.rpartition("@")
        try:
            scale = float(number)
        except ValueError:
            raise UserError(f"edit {written!r} has the scale {number!r}, needs a number; write FILE@0.5") from None
    edit = load_edit(name, base)
    if scale != 1.0 and (rigid := [part.kind() for part, _ in edit.parts() if not part.scalable]):
        raise UserError(f"edit {written!r} holds a {rigid[0]} edit, which cannot be scaled; leave @{number} out")
    return edit, scale


def named_options(settings: list[str], names: Iterable[str], what: str) -> dict[str, dict[str, str]]:
    """Name -> its options of `--set NAME.OPTION=VALUE`. One for none of the names is a UserError. what: they are, such as "attack"."""
    options: dict[str, dict[str, str]] = {name: {} for name in names}
    for key, value in pairs(settings, "--set").items():
        name, _, option = key.partition(".")
        if name not in options or not option:
            form = f"{what.upper()}.OPTION=VALUE"
            raise UserError(f"--set {key}={value} is for none of the {what}s {', '.join(options)}; write {form} with one of them")
        options[name][option] = value
    return options


def open_method(kind: str, name: str, settings: list[str], *, keep_world: bool = False) -> Method:
    """The method called `name` with its `--set` options; it must be of this kind ("erase", "merge"). keep_world: see `keeping_world`."""
    method = registry.load("method", name)
    if method.kind != kind:
        raise UserError(f"{name} is a method to {method.kind}, not to {kind}; give one of: {', '.join(_methods_of(kind))}")
    options: dict[str, Any] = {**pairs(settings, "--set")}
    if keep_world:
        from toolkit.world.kept import keeping_world

        options = keeping_world(method, options)
    return method.from_config(options)


def pairs(written: list[str], option: str) -> dict[str, str]:
    """K=V words as a dict."""
    for word in written:
        if word.find("=") < 1:
            raise UserError(f"{option} {word!r} is not of the form K=V; write for example {option} name=value")
    return dict(word.split("=", 1) for word in written)


def per_name(written: list[str], names: list[str], option: str) -> dict[str, str]:
    """Values given per name. `NAME=VALUE` words go to that name; plain words go to the only name there is."""
    given: dict[str, str] = {}
    for word in written:
        name, equals, value = word.partition("=")
        if not equals:
            if len(names) > 1:
                raise UserError(f"{option} {word!r} is for one of {', '.join(names)}, which is not said; write {option} {names[0]}={word}")
            name, value = names[0], word
        if name not in names:
            raise unknown(f"concept in {option}", name, names)
        given[name] = f"{given[name]},{value}" if name in given else value
    return given


def check_counts(args: Namespace) -> None:
    """Whether `--n`, `--steps` and `--batch-size` are at least 1 where given."""
    for option in ("n", "steps", "batch_size"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')} is {value}, needs at least 1; give a larger number")


def check_format(name: str) -> None:
    """Whether there is an export format of this name, before any work is done."""
    from toolkit.io.export import FORMATS

    if name not in FORMATS:
        raise unknown("export format", name, FORMATS)


def fit_and_save(args: Namespace, method: Method, task: Task, out: Path) -> dict[str, Any]:
    """Fit the method to the model and write what it gives, as `save_fitted` does; of several processes the main one writes."""
    from toolkit.method import fit
    from toolkit.runs import is_main_process, timed

    run = training_run(args, method, out)
    model = open_for(args, method)
    with timed() as cost:
        edit = fit(method, model, task, run)
    if not is_main_process():
        return {}
    return save_fitted(args, method, model, edit, out, dataclasses.asdict(task), dataclasses.asdict(cost))


def training_run(args: Namespace, method: Method, out: Path) -> TrainingRun:
    """What is to be left behind while a method trains. An option that would be ignored is a UserError."""
    from toolkit.method import TrainedMethod
    from toolkit.runs import TrainingRun

    given = {"checkpointing-steps": args.checkpointing_steps, "sample-steps": args.sample_steps, "log-with": args.log_with}
    if not isinstance(method, TrainedMethod):
        for option, value in given.items():
            if value:
                raise UserError(f"--{option} is for methods that train, and {args.method} does not; leave it out")
    for option, value in {**given, "checkpoints-total-limit": args.checkpoints_total_limit - 1}.items():
        if isinstance(value, int) and value < 0:
            raise UserError(f"--{option} is too small; give at least {1 if 'limit' in option else 0}")
    return TrainingRun(
        out,
        args.checkpointing_steps,
        args.checkpoints_total_limit,
        args.sample_steps,
        tuple(args.sample_prompts),
        tuple(args.log_with),
    )


def open_for(args: Namespace, method: Method) -> Model:
    """`open_model` for a method that must work on its architecture; whether there is such an `--export` is told before.

    Of a model on the disk only as much is loaded as the method needs.
    """
    if args.export:
        check_format(args.export)
    model = open_model(args, lazily=method.needs() == "text")
    if model.arch.name not in method.architectures:
        known = ", ".join(method.architectures)
        raise UserError(f"{args.method} does not work on {model.arch.name} models, only on {known}; give another --method or --model")
    return model


def save_fitted(
    args: Namespace, method: Method, model: Model, edit: Edit, out: Path, task: dict[str, Any], measured: dict[str, Any]
) -> dict[str, Any]:
    """Write edit.safetensors, config.json (with `task`, what was asked) and result.json (with `measured`) into `out`.

    With `--export FORMAT`, also the folder FORMAT in it; checkpoint.safetensors for a model in one file.
    """
    config = {"method": args.method, "config": method.config(), "model": args.model, "edits": args.edit, "task": task}
    result = save_result(out, edit, config, measured)
    if args.export:
        from toolkit.io.export import export

        files = _stream_whole(args, model, edit, out) if args.export == "checkpoint" else None
        if args.export == "checkpoint" and not files and model.arch.unread:
            model = open_model(args)  # it is saved from memory, which takes all of it
        result["export"] = [str(file) for file in files or export(edit, args.export, out / args.export, model)]
    return result


def _stream_whole(args: Namespace, model: Model, edit: Edit, out: Path) -> list[Path] | None:
    """The checkpoint with the attached edits and then this one merged in, in `out`."""
    from toolkit.edits.chain import Chain
    from toolkit.io.stream import streamable

    edits, scales = zip(*model.edits, (edit, 1.0), strict=True)
    whole = Chain.of(edits, scales)
    is_file = Path(args.model).is_file() and streamable(whole)
    return streamed(args, whole, out / ("checkpoint.safetensors" if is_file else "checkpoint"))


def streamed(args: Namespace, edit: Edit, path: Path) -> list[Path] | None:
    """The checkpoint of `--model` with the edit merged in, copied to `path`; None when that takes a loaded model.

    It does when the model is on a hub, when a file shall become a folder, and when new words go into a folder's tokenizer.
    """
    from toolkit.io.stream import streamable, write_checkpoint
    from toolkit.model import EMBEDDED

    source = EMBEDDED if args.model == "emoji-sd" else Path(args.model)
    if not source.exists() or not (path.suffix == ".safetensors" or (source.is_dir() and streamable(edit))):
        return None
    return [write_checkpoint(source, edit, path, strict=args.strict)]


def save_result(out: Path, edit: Edit, config: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """Write the edit, what made it, and what it cost. Returns what result.json holds."""
    from toolkit.io.files import FILE_NAME, save_edit
    from toolkit.runs import write_json

    path = save_edit(edit, out / FILE_NAME)
    result = {"edit": str(path), **{key: config[key] for key in ("method", "config") if key in config}, **measured}
    result["edit_bytes"] = path.stat().st_size
    write_json(out / "config.json", config)
    write_json(out / "result.json", result)
    return result


def _methods_of(kind: str) -> list[str]:
    return [name for name in registry.names("method") if registry.load("method", name).kind == kind]
