"""Train the embedded model, one stage a command: `python -m trainers.world.build STAGE [--work DIR] [--steps N]`.

Stages, in order: vae, clip (the text encoder and its tokenizer), unet, oracle, metric_clip, ship (copies the results into
toolkit/world/assets). Every stage resumes from its newest checkpoint in the work folder, and a stage whose result is there
already trains it further. To train what ships further, copy the folders of toolkit/world/assets/emoji-sd into the work folder.
"""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path

STAGES = ("vae", "clip", "unet", "oracle", "metric_clip", "ship")


def main() -> None:
    """Run one stage. Each stage's module has `run(work, steps)`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--work", type=Path, default=Path("build/world"), help="folder for checkpoints and results")
    parser.add_argument("--steps", type=int, help="training steps; default: what the shipped weights were trained with")
    args = parser.parse_args()
    start = time.time()
    importlib.import_module(f"trainers.world.{args.stage}").run(args.work, args.steps)
    print(f"{args.stage}: {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
