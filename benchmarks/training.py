"""How long a step of training takes, beside the denoiser alone and diffusers' example scripts; and a run of ESD beside its official loop.

    python -m benchmarks.training --examples DIFFUSERS/examples [--device cuda] [--case NAME ...] [--turns N] [--out docs/performance.md]

DIFFUSERS: a checkout of github.com/huggingface/diffusers, whose scripts are run as they are. Each measurement is a process of its own,
in turns: the denoiser's prediction and backward pass alone (with what is trained in place, but no pictures, text encoder or
optimizer), ours with its caches, ours without, the script. On a CPU a step's time is that between two backward passes, and the median
counts. A GPU works while Python goes on: there it is the time of all steps, from one moment when the GPU has done all that it was asked
for to another, by their number. A measurement ends with the last step; what a script would write or push afterwards is cut off.

A process that fails says why in one line, its row says "not measured", and the others go on; VERBOSE=1 shows all that processes say.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import resource
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.page import in_turns, write_section
from eval.subjects import subject
from toolkit.arch.sd import SD, tiny_tokenizer
from toolkit.concepts import Concept, CustomizeTask, EraseTask, Subject
from toolkit.model import Model, load_model
from toolkit.pictures import pictures
from toolkit.prompt_search import TokenRows
from toolkit.registry import load
from toolkit.sample import noise
from toolkit.world.scenes import load_world
from trainers.erase.esd import ESD
from trainers.parameters import parameter_names
from trainers.weights import LoraWeights

CONFIGS = Path(sys.modules["toolkit.arch.sd"].__file__ or "").parent / "configs" / "sd1"
TOKEN, CLASS = "<toy>", "bird"
METHODS = {"textual_inversion": "textual_inversion/textual_inversion.py", "dreambooth_lora": "dreambooth/train_dreambooth_lora.py"}
WHO = {"floor": "the denoiser alone", "ours": "ours", "uncached": "ours, `cache=no`", "script": "diffusers' script"}
COPIES = 4  # of the five pictures: an epoch of a script does not end with a smaller batch
PATIENCE = 300  # seconds for a process on a GPU, which may be lent for minutes only
TRACKERS = ("dvclive", "aim", "swanlab", "comet_ml")  # one that is not installed is passed over by accelerate, and nothing is logged
NOT, MISSED = "not measured", " **missed**"
Who = dict[str, float | None]


@dataclass(frozen=True)
class Case:
    """What is trained on which model.

    size: pixels. steps: that are timed, after `warmup`. device: by whose name it is asked for. precision: "no" or "bf16", the
    `mixed_precision` of all; in "bf16" the script rounds what it does not train. attention: sdpa or xformers, of all. weights: the
    `dtype` in which ours are loaded. usual: whether it is measured when no cases are named.
    """

    method: str
    model: str
    size: int
    batch: int
    steps: int
    warmup: int
    device: str = "cpu"
    precision: str = "no"
    attention: str = "sdpa"
    weights: str = "float32"
    usual: bool = True

    @property
    def folder(self) -> str:
        """Where its model is; one with random weights is made for a size."""
        return f"{self.model}-{self.size}"

    @property
    def label(self) -> str:
        """What a row is called."""
        words = [self.method, self.model, f"{self.size} px", f"batch {self.batch}"]
        words += [f"precision {self.precision}"] if self.device == "cuda" else []
        words += ["bfloat16 weights"] if self.weights == "bfloat16" else []
        return ", ".join(words + ([self.attention] if self.attention != "sdpa" else []))


CASES = {
    "textual_inversion": Case("textual_inversion", "emoji-sd", 64, 4, 25, 5),
    "dreambooth_lora": Case("dreambooth_lora", "emoji-sd", 64, 1, 25, 5),
    "textual_inversion-sd1": Case("textual_inversion", "SD1.4-shaped", 256, 1, 3, 1),
    "dreambooth_lora-sd1": Case("dreambooth_lora", "SD1.4-shaped", 256, 1, 3, 1),
    "textual_inversion-gpu": Case("textual_inversion", "SD1.4-shaped", 512, 4, 25, 8, "cuda", "bf16"),
    "dreambooth_lora-gpu": Case("dreambooth_lora", "SD1.4-shaped", 512, 4, 25, 8, "cuda", "bf16"),
    "dreambooth_lora-gpu-xformers": Case("dreambooth_lora", "SD1.4-shaped", 512, 4, 25, 8, "cuda", "bf16", "xformers"),
    # What is not trained is rounded, as the scripts do.
    "textual_inversion-gpu-rounded": Case("textual_inversion", "SD1.4-shaped", 512, 4, 25, 8, "cuda", "bf16", "sdpa", "bfloat16", False),
    "dreambooth_lora-gpu-rounded": Case("dreambooth_lora", "SD1.4-shaped", 512, 4, 25, 8, "cuda", "bf16", "sdpa", "bfloat16", False),
}


# --- one measurement, in a process of its own ---------------------------------------------------------------------------
class Measured(Exception):
    """All steps are done that are timed."""


@contextmanager
def timing(case: Case, device: str) -> Iterator[dict[str, float]]:
    """Ends the block at the backward pass after the last timed step. Gives seconds of a step, and the peak of the process in MiB."""
    own, times, found, last = torch.Tensor.backward, list[float](), dict[str, float](), case.warmup + case.steps

    def backward(self: torch.Tensor, *given: Any, **options: Any) -> None:
        if device == "cuda" and len(times) in (case.warmup, last):
            torch.cuda.synchronize()
        times.append(time.perf_counter())
        if len(times) > last:
            raise Measured
        own(self, *given, **options)

    torch.Tensor.backward = backward
    try:
        yield found
    except Measured:
        timed = times[case.warmup :]
        if device == "cuda":
            found["seconds"] = (timed[-1] - timed[0]) / case.steps
            found["memory"] = torch.cuda.max_memory_allocated() / 2**20
        else:
            found["seconds"] = statistics.median(later - earlier for earlier, later in pairwise(timed))
            found["memory"] = peak()
    finally:
        torch.Tensor.backward = own


def peak() -> float:
    """The largest resident size of this process, in MiB. What getrusage says is its parent's at least, which made a large model."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.findall(r"VmHWM:\s+(\d+)", status.read_text())[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_script(case: Case, script: Path, model: Path, photos: Path, out: Path) -> None:
    """The example script."""
    words = ["--pretrained_model_name_or_path", str(model), "--output_dir", str(out), "--resolution", str(case.size)]
    words += ["--train_batch_size", str(case.batch), "--max_train_steps", str(case.warmup + case.steps + 1), "--seed", "0"]
    words += ["--lr_scheduler", "constant", "--lr_warmup_steps", "0", "--checkpointing_steps", "100000"]
    if case.method == "textual_inversion":
        words += ["--train_data_dir", str(photos), "--placeholder_token", TOKEN, "--initializer_token", "a", "--save_steps", "100000"]
    else:
        words += ["--instance_data_dir", str(photos), "--instance_prompt", f"a photo of sks {CLASS}", "--rank", "4"]
    words += ["--mixed_precision", "bf16"] if case.precision == "bf16" else []
    words += ["--enable_xformers_memory_efficient_attention"] if case.attention == "xformers" else []
    absent = [name for name in TRACKERS if importlib.util.find_spec(name) is None]
    words += ["--report_to", absent[0]] if absent else []
    sys.argv = [str(script), *words]
    runpy.run_path(str(script), run_name="__main__")


def run_ours(case: Case, model: Model, photos: Path, cache: str) -> None:
    """The same with the library."""
    options = {"max_train_steps": case.warmup + case.steps + 1, "train_batch_size": case.batch, "mixed_precision": case.precision}
    method = load("method", case.method).from_config({**options, "cache": cache})
    method.fit(model, CustomizeTask((Subject(TOKEN, CLASS, pictures(photos)),)))


def run_floor(case: Case, model: Model) -> None:
    """The denoiser's prediction and backward pass alone."""
    shape, device = model.arch.latent_shape(case.size, case.size), model.arch.device
    latents = noise(["floor"] * case.batch, range(case.batch), shape).to(device)
    t = torch.full((case.batch,), 500, device=device)
    if case.method == "textual_inversion":
        with TokenRows(model, {TOKEN: "a"}) as rows:
            hidden = rows([f"a {TOKEN}"] * case.batch)
            leaf = type(hidden)(**{**hidden.tensors(), "hidden": hidden.hidden.detach().requires_grad_()})
            passes(case, device, lambda: F.mse_loss(model.arch.predict(latents, t, leaf), latents))
        return
    text = model.arch.encode([f"a photo of sks {CLASS}"] * case.batch)
    with LoraWeights(model.arch.lora_targets(), 4) as lora:
        lora.requires_grad_()
        passes(case, device, lambda: F.mse_loss(model.arch.predict(latents, t, text), latents))


def passes(case: Case, device: torch.device, loss: Callable[[], torch.Tensor]) -> None:
    for _ in range(case.warmup + case.steps + 1):
        with torch.autocast(device.type, torch.bfloat16, enabled=case.precision == "bf16"):
            value = loss()
        value.backward()


def child(name: str, who: str, folder: Path, device: str, examples: Path) -> dict[str, float]:
    """Seconds of a step, and the peak of the process in MiB."""
    case = CASES[name]
    source, photos = folder / case.folder, folder / "photos"
    with timing(case, device) as found:
        if who == "script":
            run_script(case, examples / METHODS[case.method], source, photos, folder / "out")
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="xformers cannot be used for the denoiser")  # else the row would be another's
                model = load_model(str(source), device=device, dtype=case.weights, attention=case.attention)
            if who == "floor":
                run_floor(case, model)
            else:
                run_ours(case, model, photos, "memory" if who == "ours" else "no")
    return found


# --- models and pictures ------------------------------------------------------------------------------------------------
def prepare(folder: Path, cases: Sequence[Case]) -> None:
    """The models as diffusers folders, and pictures of a subject without captions, which the scripts do not read."""
    made = subject(load_world(), folder / "photos", "penguin", CLASS, TOKEN, "twemoji")
    made.images[0].with_name("metadata.jsonl").unlink()
    for path in made.images:
        for copy in range(1, COPIES):
            shutil.copy(path, path.with_stem(f"{path.stem}-{copy}"))
    for case in {case.folder: case for case in cases}.values():
        if case.model == "emoji-sd":
            load_model().save(folder / case.folder)
        else:
            sd1_shaped(case.size).save(folder / case.folder)


def sd1_shaped(size: int) -> SD:
    """Stable Diffusion 1 with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet: Any = UNet2DConditionModel.load_config(CONFIGS / "unet")
        vae: Any = AutoencoderKL.load_config(CONFIGS / "vae")
        parts: dict[str, Any] = {
            "unet": UNet2DConditionModel.from_config({**unet, "sample_size": size // 8}),
            "vae": AutoencoderKL.from_config(vae),
            "text_encoder": CLIPTextModel(CLIPTextConfig.from_pretrained(CONFIGS / "text_encoder")),
            "scheduler": DDIMScheduler.from_pretrained(CONFIGS / "scheduler"),
            "tokenizer": tiny_tokenizer(),
            "safety_checker": None,
            "feature_extractor": None,
        }
    return SD(StableDiffusionPipeline(**parts, requires_safety_checker=False))


# --- ESD ----------------------------------------------------------------------------------------------------------------
def esd(steps: int = 8) -> tuple[float, float]:
    """Seconds of a run of 200 steps with the defaults: ours, and the official loop's, of which `steps` are timed.

    The official loop: for every step a new drawing with guidance up to a random one of its 50 steps, the frozen model's predictions
    there with the prompt and without, and a step on the prediction of a copy that trains.
    """
    task, method = EraseTask((Concept("dog"),), templates=("{}",)), ESD()
    began = time.perf_counter()
    method.fit(load_model(), task)
    ours = time.perf_counter() - began
    frozen, tuned = load_model(), load_model()
    trained = [tuned.arch.parameter(name).requires_grad_() for name in parameter_names(tuned.arch, method.parameters)]
    optimizer = torch.optim.Adam(trained, lr=method.learning_rate)
    prompt, blank = (frozen.arch.encode([text]) for text in ("dog", ""))
    shape = frozen.arch.latent_shape(frozen.arch.image_size, frozen.arch.image_size)
    both = type(prompt).cat([prompt, blank])
    ends = torch.linspace(0, method.sampling_steps - 1, steps).round().long().tolist()  # evenly, instead of by chance
    began = time.perf_counter()
    for end in ends:
        scheduler = frozen.arch.scheduler(method.sampling_steps, shape)
        latents = noise(["dog"], [end], shape)
        with torch.no_grad():
            for t in scheduler.timesteps[:end]:
                ours_t = t.expand(2)
                said, silent = frozen.arch.predict(latents.repeat(2, 1, 1, 1), ours_t, both).chunk(2)
                latents = scheduler.step(silent + method.guidance * (said - silent), t, latents).prev_sample
            t = scheduler.timesteps[end].expand(1)
            said, silent = frozen.arch.predict(latents, t, prompt), frozen.arch.predict(latents, t, blank)
        loss = F.mse_loss(tuned.arch.predict(latents, t, prompt), silent - method.eta * (said - silent))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return ours, (time.perf_counter() - began) / steps * method.max_train_steps


# --- the page -----------------------------------------------------------------------------------------------------------
def row(case: Case, seconds: Who, memory: Who) -> str:
    """One line of the table. None is what was not measured."""

    def missed(over: float | None, under: float | None, good: Callable[[float], bool]) -> str:
        return NOT if over is None or under is None else f"{over / under:.2f}{'' if good(over / under) else MISSED}"

    mib = ["-" if memory[who] is None else f"{memory[who]:.0f}" for who in ("ours", "script")]
    ours, theirs = memory["ours"], memory["script"]
    cells = [case.label, *(NOT if seconds[who] is None else f"{seconds[who]:.3f}" for who in WHO)]
    cells.append(missed(seconds["floor"], seconds["ours"], lambda part: part >= 0.9))
    cells.append(missed(seconds["script"], seconds["uncached"], lambda faster: faster >= 1))
    cells.append(f"{' / '.join(mib)}{MISSED if ours and theirs and ours > theirs else ''}")
    return f"| {' | '.join(cells)} |"


def section(rows: list[str], erasing: tuple[float, float] | None, turns: int, device: str) -> str:
    """What goes on the page."""
    if device == "cuda":
        lines = [
            "## Training on a GPU",
            "",
            f"Made by `python -m benchmarks.training --examples DIFFUSERS/examples --device cuda` on one {torch.cuda.get_device_name()},",
            f"PyTorch {torch.__version__}. Seconds of a step: the mean of all timed ones, the GPU having done its work before the first",
            f"and after the last, {in_turns(turns)}. The denoiser alone is its prediction",
            "and backward pass with what is trained in place, in our precision; its part of our step is to be 0.9 at least. In precision",
            "bf16 ours computes under autocast, with weights in float32 unless a row says otherwise; the scripts round what is not",
            "trained, and in textual inversion run the denoiser without autocast. They encode each picture anew in every step; without",
            "caches ours is to be no slower. Memory is the peak of what PyTorch allocated on the GPU, which is to be no higher than",
            "the script's.",
        ]
    else:
        lines = [
            "## Training",
            "",
            "Made by `python -m benchmarks.training --examples DIFFUSERS/examples`, in float32,",
            f"threads: {torch.get_num_threads()}. Seconds of a step, {in_turns(turns)}. The denoiser alone is its prediction",
            "and backward pass with what is trained in place; its part of our step is to be 0.9 at least. The scripts are diffusers' own,",
            "which encode each picture anew in every step; without caches ours is to be no slower. Memory is the peak of the process,",
            "which is to be no higher than the script's.",
        ]
    lines += [
        "",
        f"| what | {' | '.join(WHO.values())} | its part of ours | script / ours, `cache=no` | MiB, ours / script |",
        f"|{'---|' * (len(WHO) + 4)}",
        *rows,
    ]
    if erasing:
        ours, official = erasing
        times = official / ours
        lines += [
            "",
            f"A run of `esd` with its defaults on emoji-sd, drawings included, takes {ours:.0f} s. A loop that is written as the official",
            f"one takes {official:.0f} s, {times:.1f} times as long (bar 3{'' if times >= 3 else ', **missed**'}): it draws anew for",
            "every step.",
        ]
    return "\n".join(lines) + "\n"


# --- running ------------------------------------------------------------------------------------------------------------
def measured(name: str, who: str, folder: Path, device: str, examples: Path) -> dict[str, float] | None:
    """What the child says; None when it failed, which is told on stderr."""
    words = ["--examples", str(examples), "--device", device, "--child", name, who, str(folder)]
    hidden = {} if device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}  # the scripts take a GPU where they see one
    try:
        made = subprocess.run(
            [sys.executable, "-m", "benchmarks.training", *words],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PATIENCE if device == "cuda" else None,
            env={**os.environ, **hidden, "HF_HUB_OFFLINE": "1"},
        )
    except subprocess.TimeoutExpired:
        print(f"{name}, {who}: not done in {PATIENCE} s", file=sys.stderr, flush=True)
        return None
    if os.environ.get("VERBOSE"):
        print(made.stderr, file=sys.stderr, flush=True)
    try:
        found: dict[str, float] = json.loads(made.stdout.splitlines()[-1])
        return {key: float(found[key]) for key in ("seconds", "memory")}
    except (IndexError, ValueError, KeyError, TypeError):
        said = [line for line in made.stderr.splitlines() if line.strip()] or ["nothing"]
        errors = [line for line in said if re.match(r"[\w.]+(Error|Exception|Warning|Interrupt|Exit)\b", line)]
        print(f"{name}, {who}: exit {made.returncode}, {(errors or said)[-1]}", file=sys.stderr, flush=True)
        return None


def middle(results: list[dict[str, float]], key: str) -> float | None:
    return statistics.median(result[key] for result in results) if results else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="its cases are measured by default")
    parser.add_argument("--case", nargs="+", choices=[*CASES, "esd"], help="instead of all of the device")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=3, metavar=("CASE", "WHO", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        name, who, folder = args.child
        print(json.dumps(child(name, who, Path(folder), args.device, args.examples)))
        return
    usual = [name for name, case in CASES.items() if case.device == args.device and case.usual]
    chosen = args.case or (usual if args.device == "cuda" else [*usual, "esd"])
    cases, rows = {name: CASES[name] for name in chosen if name in CASES}, list[str]()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder, list(cases.values()))
        for name, case in cases.items():
            found: dict[str, list[dict[str, float]]] = {who: [] for who in WHO}
            for turn in range(args.turns):
                for who, results in found.items():
                    if turn and not results:
                        continue  # it has failed before
                    if result := measured(name, who, folder, args.device, args.examples):
                        results.append(result)
                        print(f"{name}, {who}: {result['seconds']:.4f} s, {result['memory']:.0f} MiB", file=sys.stderr, flush=True)
            seconds, memory = ({who: middle(results, key) for who, results in found.items()} for key in ("seconds", "memory"))
            rows.append(row(case, seconds, memory))
            print(rows[-1], flush=True)
            if args.out:  # at once: what comes after may be cut off
                write_section(args.out, section(rows, None, args.turns, args.device))
    made = section(rows, esd() if "esd" in chosen else None, args.turns, args.device)
    print(made)
    if args.out:
        write_section(args.out, made)


if __name__ == "__main__":
    main()
