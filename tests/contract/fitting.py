"""Every method fitted to its example task, on a tiny random instance of an architecture that it declares.

On the CPU, or where the environment's PALIMPSEST_TEST_DEVICE says, such as cuda.
"""

import dataclasses
import os
from typing import Any

from toolkit import registry
from toolkit.edits.base import Edit
from toolkit.method import Method
from toolkit.model import Model

METHODS: dict[str, type[Method]] = {name: registry.load("method", name) for name in registry.names("method")}
CASES = [(name, family) for name, method in METHODS.items() for family in method.architectures]
DEVICE = os.environ.get("PALIMPSEST_TEST_DEVICE", "cpu")
# what a method may call an option that a test has to keep small
DRAWING = {"num_class_images": 2, "class_image_steps": 2}  # of methods that draw pictures of the class unless told otherwise
QUICK = {"max_train_steps": 2, "trajectories": 2, "sampling_steps": 3, "attack_steps": 2, "words_steps": 1, "clip": "metric-clip"}


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A method fitted to its example task, and what the model was before and after."""

    method: Method
    model: Model
    task: Any
    edit: Edit
    before: dict[str, object]
    after: dict[str, object]


def quick(method: type[Method]) -> Method:
    """The method with its defaults, but few steps."""
    fields = {field.name for field in dataclasses.fields(method)}
    known = {name: value for name, value in QUICK.items() if name in fields}
    return method(**known, **(DRAWING if getattr(method, "prior", "none") == "images" else {}))


def tiny_of(family: str, seed: int = 0) -> Model:
    return Model(registry.load("arch", family).tiny(seed=seed)).to(DEVICE)


def snapshot(model: Model) -> dict[str, object]:
    """Every tensor of the model (a copy), whether it trains, and the tokenizers' words."""
    parts = model.arch.components().items()
    tensors = {f"{part}.{name}": value.clone() for part, module in parts for name, value in module.state_dict().items()}
    trains = {f"{part}.{name} trains": p.requires_grad for part, module in parts for name, p in module.named_parameters()}
    modes = {f"{part} is in training mode": module.training for part, module in parts}
    words = {f"{part} words": tokenizer.get_vocab() for part, tokenizer in model.arch.tokenizers().items()}
    return {**tensors, **trains, **modes, **words}
