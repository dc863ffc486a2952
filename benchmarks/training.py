"""How long a step of training takes, beside the denoiser alone and diffusers' example scripts; and a run of ESD beside its official loop.

    python -m benchmarks.training --examples DIFFUSERS/examples [--case NAME ...] [--turns N] [--out docs/performance.md]

DIFFUSERS: a checkout of github.com/huggingface/diffusers, whose scripts are run as they are. Each measurement is a process of its own,
in turns: the denoiser's prediction and backward pass alone (with what is trained in place, but no pictures, text encoder or
optimizer), ours with its caches, ours without, the script. A step's time is that between two backward passes; the median counts.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.page import write_section
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


@dataclass(frozen=True)
class Case:
    """What is trained on which model. size: pixels. steps: that are timed, after `warmup`."""

    method: str
    model: str
    size: int
    batch: int
    steps: int
    warmup: int


CASES = {
    "textual_inversion": Case("textual_inversion", "emoji-sd", 64, 4, 25, 5),
    "dreambooth_lora": Case("dreambooth_lora", "emoji-sd", 64, 1, 25, 5),
    "textual_inversion-sd1": Case("textual_inversion", "SD1.4-shaped", 256, 1, 3, 1),
    "dreambooth_lora-sd1": Case("dreambooth_lora", "SD1.4-shaped", 256, 1, 3, 1),
}


# --- one measurement, in a process of its own ---------------------------------------------------------------------------
@contextmanager
def noting(times: list[float]) -> Iterator[None]:
    """Within the block the time of each backward pass is noted."""
    own = torch.Tensor.backward

    def backward(self: torch.Tensor, *given: Any, **options: Any) -> None:
        times.append(time.perf_counter())
        own(self, *given, **options)

    torch.Tensor.backward = backward
    try:
        yield
    finally:
        torch.Tensor.backward = own


def run_script(case: Case, script: Path, model: Path, photos: Path, out: Path) -> None:
    """The example script, to the end of the steps; what it would write or push afterwards is cut off."""
    words = ["--pretrained_model_name_or_path", str(model), "--output_dir", str(out), "--resolution", str(case.size)]
    words += ["--train_batch_size", str(case.batch), "--max_train_steps", str(case.warmup + case.steps + 1), "--seed", "0"]
    words += ["--lr_scheduler", "constant", "--lr_warmup_steps", "0", "--checkpointing_steps", "100000"]
    if case.method == "textual_inversion":
        words += ["--train_data_dir", str(photos), "--placeholder_token", TOKEN, "--initializer_token", "a", "--save_steps", "100000"]
    else:
        words += ["--instance_data_dir", str(photos), "--instance_prompt", f"a photo of sks {CLASS}", "--rank", "4"]
    sys.argv = [str(script), *words]
    runpy.run_path(str(script), run_name="__main__")


def run_ours(case: Case, model: Model, photos: Path, cache: str) -> None:
    """The same with the library."""
    method = load("method", case.method).from_config(
        {"max_train_steps": case.warmup + case.steps + 1, "train_batch_size": case.batch, "cache": cache}
    )
    method.fit(model, CustomizeTask((Subject(TOKEN, CLASS, pictures(photos)),)))


def run_floor(case: Case, model: Model) -> None:
    """The denoiser's prediction and backward pass alone."""
    shape = model.arch.latent_shape(case.size, case.size)
    latents = noise(["floor"] * case.batch, range(case.batch), shape)
    t = torch.full((case.batch,), 500)
    if case.method == "textual_inversion":
        with TokenRows(model, {TOKEN: "a"}) as rows:
            hidden = rows([f"a {TOKEN}"] * case.batch)
            leaf = type(hidden)(**{**hidden.tensors(), "hidden": hidden.hidden.detach().requires_grad_()})
            passes(case, lambda: F.mse_loss(model.arch.predict(latents, t, leaf), latents))
        return
    text = model.arch.encode([f"a photo of sks {CLASS}"] * case.batch)
    with LoraWeights(model.arch.lora_targets(), 4) as lora:
        lora.requires_grad_()
        passes(case, lambda: F.mse_loss(model.arch.predict(latents, t, text), latents))


def passes(case: Case, loss: Callable[[], torch.Tensor]) -> None:
    for _ in range(case.warmup + case.steps + 1):
        loss().backward()


def child(name: str, who: str, folder: Path, examples: Path) -> dict[str, float]:
    """Seconds of a step, and the peak of the process in MiB."""
    case, times = CASES[name], list[float]()
    model, photos = folder / case.model, folder / "photos"
    with noting(times):
        if who == "script":
            run_script(case, examples / METHODS[case.method], model, photos, folder / "out")
        elif who == "floor":
            run_floor(case, load_model(str(model)))
        else:
            run_ours(case, load_model(str(model)), photos, "memory" if who == "ours" else "no")
    each = [later - earlier for earlier, later in zip(times[case.warmup :], times[case.warmup + 1 :], strict=False)]
    return {"seconds": statistics.median(each), "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


# --- models and pictures ------------------------------------------------------------------------------------------------
def prepare(folder: Path, models: set[str]) -> None:
    """The models as diffusers folders, and pictures of a subject without captions, which the scripts do not read."""
    world = load_world()
    made = subject(world, folder / "photos", "penguin", CLASS, TOKEN, "twemoji")
    made.images[0].with_name("metadata.jsonl").unlink()
    if "emoji-sd" in models:
        load_model().save(folder / "emoji-sd")
    if "SD1.4-shaped" in models:
        sd1_shaped(CASES["dreambooth_lora-sd1"].size).save(folder / "SD1.4-shaped")


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
def row(case: Case, seconds: dict[str, float], memory: dict[str, float]) -> str:
    """One line of the table."""
    part, faster = seconds["floor"] / seconds["ours"], seconds["script"] / seconds["uncached"]
    more = memory["ours"] / memory["script"]
    cells = [f"{case.method}, {case.model}, {case.size} px, batch {case.batch}"]
    cells += [f"{seconds[who]:.3f}" for who in WHO]
    cells += [f"{part:.2f}{'' if part >= 0.9 else ' **missed**'}", f"{faster:.2f}{'' if faster >= 1 else ' **missed**'}"]
    cells.append(f"{memory['ours']:.0f} / {memory['script']:.0f}{'' if more <= 1 else ' **missed**'}")
    return f"| {' | '.join(cells)} |"


def section(rows: list[str], erasing: tuple[float, float] | None, turns: int) -> str:
    """What goes on the page."""
    lines = [
        "## Training",
        "",
        "Made by `python -m benchmarks.training --examples DIFFUSERS/examples`, in float32,",
        f"threads: {torch.get_num_threads()}. Seconds of a step, the median of {turns} turns. The denoiser alone is its prediction and",
        "backward pass with what is trained in place; its part of our step is to be 0.9 at least. The scripts are diffusers' own, which",
        "encode each picture anew in every step; without caches ours is to be no slower. Memory is the peak of the process, which is to",
        "be no higher than the script's.",
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=Path, required=True)
    parser.add_argument("--case", nargs="+", choices=[*CASES, "esd"], default=[*CASES, "esd"])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=3, metavar=("CASE", "WHO", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child[0], args.child[1], Path(args.child[2]), args.examples)))
        return
    cases = [name for name in args.case if name in CASES]
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder, {CASES[name].model for name in cases})
        for name in cases:
            found: dict[str, list[dict[str, float]]] = {who: [] for who in WHO}
            for _ in range(args.turns):
                for who, results in found.items():
                    words = ["--examples", str(args.examples), "--child", name, who, str(folder)]
                    made = subprocess.run(
                        [sys.executable, "-m", "benchmarks.training", *words],
                        check=True,
                        stdout=subprocess.PIPE,
                        stderr=None if os.environ.get("VERBOSE") else subprocess.DEVNULL,
                        text=True,
                    )
                    results.append(json.loads(made.stdout.splitlines()[-1]))
            medians = {
                key: {who: statistics.median(r[key] for r in results) for who, results in found.items()} for key in ("seconds", "memory")
            }
            rows.append(row(CASES[name], medians["seconds"], medians["memory"]))
            print(rows[-1], flush=True)
    made = section(rows, esd() if "esd" in args.case else None, args.turns)
    print(made)
    if args.out:
        write_section(args.out, made)


if __name__ == "__main__":
    main()
