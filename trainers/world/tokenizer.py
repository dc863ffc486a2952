"""The embedded model's tokenizer: CLIP's byte-pair encoding with a vocabulary learnt on the world's words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from toolkit.world.captions import caption
from toolkit.world.scenes import load_world
from trainers.world.vae import training_scene

WORDS = Path(__file__).parent / "words.txt"  # the words of the packs' emoji names
VOCABULARY = 3072


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
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    learner.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(vocab_size=VOCABULARY - 258, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False),  # pyright: ignore
    )
    learnt = [(token, index) for token, index in learner.get_vocab().items() if len(token.removesuffix("</w>")) > 1]
    merges = _merges(learner)
    pieces = alphabet + [letter + "</w>" for letter in alphabet]
    seen = set(pieces)
    kept = []
    for left, right in merges:
        if left in seen and right in seen:
            kept.append((left, right))
            if left + right not in seen:
                seen.add(left + right)
                pieces.append(left + right)
    assert len(kept) >= len(learnt) // 2
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, merges=kept, model_max_length=77)


def _merges(learner: Tokenizer) -> list[tuple[str, str]]:
    import json

    return [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in json.loads(learner.to_str())["model"]["merges"]]
