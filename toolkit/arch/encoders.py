"""Text encoders as diffusers pipelines hold them: their words, new words, and their files. The same for every family."""

from __future__ import annotations

import copy
import re
from abc import ABC
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from toolkit.arch.base import Architecture
from toolkit.errors import UserError
from toolkit.io.files import replacing_folder

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
CLIP_PREFIX = "text_model."  # part of the names in checkpoints; transformers >= 5.6 leaves it out of some module names


class Encoders(Architecture, ABC):
    """A pipeline with the parts text_encoder and tokenizer, text_encoder_2 and tokenizer_2, ..., some of which may be missing."""

    denoiser: ClassVar[str]  # the denoiser's name in the pipeline

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        pipe.set_progress_bar_config(disable=True)
        for module in self.components().values():
            module.eval().requires_grad_(False)

    @classmethod
    def load_text(cls, source: str, configs: Path, *, dtype: torch.dtype) -> Self:
        hollow = cls.hollow(configs).pipe
        left = {part: nn.Module.to(getattr(hollow, part), dtype) for part in (cls.denoiser, "vae")}  # diffusers' own warns of nothing
        return cls.load(source, dtype=dtype, **left)

    def save(self, folder: Path) -> Path:
        with replacing_folder(folder, marker="model_index.json") as temporary:
            self.pipe.save_pretrained(temporary)
            for name, embedding in self.token_embeddings().items():
                encoder = self._encoders()[name]
                config = copy.deepcopy(encoder.config)
                config.vocab_size = embedding.num_embeddings  # the words of attached tokens are rows too
                config.save_pretrained(temporary / name)
                if _is_clip(encoder):
                    weights = temporary / name / "model.safetensors"
                    save_file({_prefixed(key): value for key, value in load_file(weights).items()}, weights, {"format": "pt"})
        return folder

    # --- parts --------------------------------------------------------------------------------------------------
    def components(self) -> dict[str, nn.Module]:
        encoders = {name: getattr(self.pipe, name, None) for name in TEXT_ENCODERS}
        present = {name: encoder for name, encoder in encoders.items() if encoder is not None}
        return {"denoiser": getattr(self.pipe, self.denoiser), **present, "vae": self.pipe.vae}

    def denoiser_linears(self, *endings: str) -> dict[str, nn.Linear]:
        """Site -> linear layer, for the denoiser's layers whose names end so."""
        modules = self.components()["denoiser"].named_modules()
        return {f"denoiser.{name}": module for name, module in modules if name.endswith(endings) and isinstance(module, nn.Linear)}

    def token_embeddings(self) -> dict[str, nn.Embedding]:
        return {name: encoder.get_input_embeddings() for name, encoder in self._encoders().items()}

    def set_token_embedding(self, component: str, module: nn.Module) -> None:
        self._encoders()[component].set_input_embeddings(module)

    def tokenizers(self) -> dict[str, Any]:
        return {name: getattr(self.pipe, _tokenizer(name)) for name in self._encoders()}

    def set_tokenizer(self, component: str, tokenizer: Any) -> None:
        setattr(self.pipe, _tokenizer(component), tokenizer)

    def _encoders(self) -> dict[str, Any]:
        return {name: module for name, module in self.components().items() if name in TEXT_ENCODERS}

    # --- text ---------------------------------------------------------------------------------------------------
    def tokenize(self, prompts: Sequence[str], component: str, longest: int | None = None, *, cut: bool = False) -> tuple[Tensor, Tensor]:
        """Token ids [n, L] for a text encoder, where inputs go, and the number of tokens up to and including EOT [n].

        longest: L, None is as many as the encoder has positions. A longer prompt is a UserError, or cut off with cut=True.
        """
        tokenizer, encoder = self.tokenizers()[component], self._encoders()[component]
        room: int = longest or encoder.config.max_position_embeddings
        words = _spelled(prompts, tokenizer)
        tokens = tokenizer(words, padding="max_length", max_length=room, truncation=cut, verbose=False)
        special = tokenizer.num_special_tokens_to_add()
        for prompt, ids in zip(prompts, tokens.input_ids, strict=True):
            if len(ids) > room:
                raise UserError(f"prompt {prompt!r} has {len(ids) - special} tokens, {room - special} fit; shorten it")
        device = self.device  # not the encoder's: one that is offloaded is elsewhere before its first use
        return torch.tensor(tokens.input_ids, device=device), torch.tensor(tokens.attention_mask, device=device).sum(1)

    # --- other people's formats ---------------------------------------------------------------------------------
    def diffusers_lora_key(self, site: str) -> str:
        component, _, path = site.partition(".")
        if component == "denoiser":
            return f"{self.denoiser}.{path}"
        if component in TEXT_ENCODERS and _is_clip(self.components()[component]):
            return f"{component}.{_prefixed(path)}"
        return site


def _tokenizer(component: str) -> str:
    """The name of a text encoder's tokenizer in the pipeline."""
    return component.replace("text_encoder", "tokenizer")


def _is_clip(encoder: Any) -> bool:
    return encoder.config.model_type == "clip_text_model"


def _prefixed(key: str) -> str:
    """A CLIP text encoder's parameter name as it is in checkpoints."""
    return key if key.startswith((CLIP_PREFIX, "text_projection")) else CLIP_PREFIX + key


def _spelled(prompts: Sequence[str], tokenizer: Any) -> list[str]:
    """Prompts in which new words are spelled as the tokenizer knows them: in lower case, one of several vectors as several words."""
    new = [re.escape(token.content) for token in tokenizer.added_tokens_decoder.values() if not token.special]
    if not new:
        return list(prompts)
    known = re.compile("|".join(new), re.IGNORECASE)
    lower = [known.sub(lambda found: found[0].lower(), prompt) for prompt in prompts]
    return [*TextualInversionLoaderMixin().maybe_convert_prompt(lower, tokenizer)]
