"""Made-up texts for the source of the user's own text, and what came of them."""

import json
import random
from pathlib import Path

import numpy as np

from pgl.data.shards import read_shard
from pgl.data.sources import Text

WORDS = ["time", "and", "tide", "wait", "for", "no", "man", "but", "may", "or", "the", "of", "men"]


def story(seed: int, words: int = 60) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(words))


def source(folder: Path, **settings) -> Text:
    settings = {"vocab_size": 290, "val_fraction": 0.2, **settings}
    return Text([str(folder)], cache_dir=str(folder.parent / "cache"), **settings)


def documents_of(shards) -> list[list[int]]:
    tokens = np.concatenate([read_shard(path) for path in shards])
    starts = np.flatnonzero(tokens == 1)
    return [part.tolist() for part in np.split(tokens, starts[1:])]


def manifest_of(corpus) -> dict:
    return json.loads((corpus.tokenizer_path.parent / "manifest.json").read_text())
