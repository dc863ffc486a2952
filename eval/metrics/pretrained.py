"""Models of transformers that measure, by a folder or a hub id."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import transformers

from eval.metrics.base import accelerator
from eval.rates import version
from toolkit.errors import UserError


@lru_cache(maxsize=2)
def load_pretrained(model_class: str | type, processor_class: str, source: str) -> tuple[Any, Any]:
    """A model of this class (of transformers, when it is a name) and its processor, ready to measure. Failing is a UserError."""
    kind: Any = getattr(transformers, model_class) if isinstance(model_class, str) else model_class
    try:
        model: Any = kind.from_pretrained(source)
        processor: Any = getattr(transformers, processor_class).from_pretrained(source)
    except Exception as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"cannot load {source!r} as {kind.__name__} ({first}); give the model a hub id, or a folder that holds it"
        ) from error
    return model.to(accelerator()).eval().requires_grad_(False), processor


def measured_by_pretrained(source: str, model: Any, processor: Any) -> dict[str, Any]:
    """What a value says of such a model."""
    images = getattr(processor, "image_processor", processor).to_dict()
    kept = ("size", "crop_size", "resample", "image_mean", "image_std", "do_center_crop")
    preprocessing = ", ".join(f"{name} {images[name]}" for name in kept if images.get(name) is not None)
    library = f"transformers {transformers.__version__}"
    return {"model": source, "version": version(model), "library": library, "preprocessing": preprocessing}
