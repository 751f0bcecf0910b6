"""Shards of drawn photos with captions, as many as one asks for: colours and words tell what a photo shows."""

import hashlib
import io
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from tests.support.tars import write_tar

CONCEPTS, WORDS = 2000, 800
PAIRS = 2000  # of a shard
SHORTER = 256  # pixels of a photo's shorter side, as img2dataset writes them: 20 kB a photo


def write_shards(folder: Path, pairs: int, seed: int) -> None:
    """Write shards of PAIRS pairs, on all CPUs."""
    starts = range(0, pairs, PAIRS)
    with ProcessPoolExecutor() as pool:
        list(pool.map(partial(_shard, folder, seed, pairs), starts))


def _shard(folder: Path, seed: int, pairs: int, start: int) -> None:
    numbers = range(start, min(start + PAIRS, pairs))
    write_tar(folder / f"{start // PAIRS:05d}.tar", [member for number in numbers for member in _pair(seed, number)])


def _pair(seed: int, number: int) -> Iterator[tuple[str, bytes]]:
    random = np.random.default_rng([seed, number])
    concept = np.random.default_rng([7, int(random.integers(CONCEPTS))])
    colours = concept.integers(0, 256, (6, 6, 3)) + random.normal(0, 25, (6, 6, 3))
    size = (SHORTER, SHORTER + int(random.integers(0, 96)))
    smooth = Image.fromarray(colours.clip(0, 255).astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
    noisy = np.asarray(smooth) + random.integers(-14, 15, (*size[::-1], 3), dtype=np.int16)
    photo = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(photo, "JPEG", quality=85)
    words = [*concept.choice(WORDS, 5, replace=False), *random.choice(WORDS, 4, replace=False)]
    key = f"{number:09d}"
    yield f"{key}.jpg", photo.getvalue()
    yield f"{key}.txt", ("a photo of " + " ".join(f"thing{word}" for word in words)).encode()
    yield f"{key}.json", json.dumps({"uid": hashlib.md5(f"{seed} {key}".encode()).hexdigest()}).encode()
