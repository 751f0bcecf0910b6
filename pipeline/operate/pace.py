"""How fast this machine reads and embeds pairs: measured on a few of them, before a run."""

import io
import math
import time
from itertools import cycle, islice
from typing import Any, NamedTuple

import numpy as np
import torch

from ecif.towers import Towers
from ecif.towers.precision import computed_in, prepare
from pipeline import storage
from pipeline.corpus.captions import find_pairs
from pipeline.corpus.images import Resize
from pipeline.corpus.pairs import Pair, ReadingRules, read_pair
from pipeline.corpus.tar import Contents, read_groups
from pipeline.run_folder.dataset import Dataset
from pipeline.sections import Embed
from pipeline.workers.cluster import device
from pipeline.workers.model import as_tokens

HEAD = 16 << 20  # bytes of a shard that pairs are read from
PAIRS = 64
BATCH = {"cpu": 4, "cuda": 256}


class Pace(NamedTuple):
    """Rates of this machine."""

    device: str  # "cpu" or "cuda"
    reading: float  # pairs/s that one core reads, decodes and tokenizes
    model: float  # pairs/s that the model embeds on a GPU, or on one core

    def said(self) -> str:
        """One line for the user."""
        if self.device == "cpu":
            return f"a core here reads {_number(self.reading)} pairs/s and embeds {_number(self.model)}"
        cores = math.ceil(self.model / self.reading)
        rates = f"the GPU here embeds {_number(self.model)} pairs/s and a core reads {_number(self.reading)}"
        return f"{rates}: {cores} cores keep one such GPU busy"


def _number(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def measure(model: Towers, corpus: Dataset, limits: Embed) -> Pace | None:
    """Rates on the first pairs of the corpus; None if the beginning of its first shard has none that can be read.

    The model is left as it computes: in the precision and on the device of a run here.
    """
    pairs, seconds = _read(corpus, model.preprocess, limits)
    if not pairs:
        return None
    started = time.perf_counter()
    as_tokens(model.tokenizer, [pair.caption for pair in pairs])
    seconds += time.perf_counter() - started
    to = device()
    return Pace(to.type, len(pairs) / seconds, _embedded_a_second(model, pairs, limits, to))


def _read(corpus: Dataset, preprocess: dict[str, Any], limits: Embed) -> tuple[list[Pair], float]:
    """Pairs that were read, and the seconds that it took. What comes first is not counted: it imports and builds."""
    shard = corpus.shards[0]
    file = io.BytesIO(storage.read_start(shard.source.url, HEAD))
    rules = ReadingRules(shard.name, corpus.reading, limits, Resize(preprocess, limits.resize))
    groups = find_pairs(file, read_groups(file, Contents(), corpus.reading.key), corpus.reading, limits)
    for group in islice(groups, 1):
        read_pair(file, group, rules)
    started = time.perf_counter()
    read = [read_pair(file, group, rules) for group in islice(groups, PAIRS)]
    return [pair for pair in read if isinstance(pair, Pair)], time.perf_counter() - started


def _embedded_a_second(model: Towers, pairs: list[Pair], limits: Embed, to: torch.device) -> float:
    precision = prepare(model, limits.precision, to)
    some = list(islice(cycle(pairs), BATCH[to.type]))
    pixels = torch.from_numpy(np.stack([pair.pixels for pair in some])).permute(0, 3, 1, 2).contiguous().to(to)
    tokens = torch.from_numpy(as_tokens(model.tokenizer, [pair.caption for pair in some])).long().to(to)

    def seconds() -> float:
        started = time.perf_counter()
        images, texts = model.image_features(pixels), model.token_features(tokens)
        (images[0, 0] + texts[0, 0]).item()  # waits for a GPU
        return time.perf_counter() - started

    with computed_in(precision, to):
        seconds()
        return len(some) / min(seconds() for _ in range(3))
