"""The embedded model's tokenizer: CLIP's byte-pair encoding with a vocabulary learnt on the world's words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from toolkit.world.captions import caption
from toolkit.world.scenes import load_world
from trainers.world.vae import training_scene

WORDS = Path(__file__).parent / "words.txt"  # the words of the packs' emoji names
VOCABULARY = 3072
END = "</w>"  # marks the end of a word


def corpus(captions: int = 20_000) -> list[str]:
    """Captions of the training set, every synonym, and the packs' names (so that new subjects have words too)."""
    world, rng = load_world(), np.random.default_rng(3)
    texts = [caption(world, training_scene(world, rng), rng) for _ in range(captions)]
    for thing in world.things.values():
        texts += [thing.name, *thing.synonyms] * 20
    return texts + WORDS.read_text().split() * 4


def build_tokenizer() -> CLIPTokenizer:
    """Byte alphabet (with and without the end-of-word mark), merges, BOS, EOT: EOT has the highest id, as in CLIP."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix=END))
    learner.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    settings: dict[str, Any] = {"initial_alphabet": alphabet, "end_of_word_suffix": END, "show_progress": False}
    learner.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=VOCABULARY - 258, **settings))
    merges: Any = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    letters = alphabet + [letter + END for letter in alphabet]
    pieces = list(dict.fromkeys([*letters, *(left + right for left, right in merges), "<|startoftext|>", "<|endoftext|>"]))
    return CLIPTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, merges=merges, model_max_length=77)
