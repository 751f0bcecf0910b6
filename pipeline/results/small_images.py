"""What whole models are judged on: the pairs of a run and of a test set, decoded small, and rules that choose among them."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.corpus.captions import find_pairs
from pipeline.corpus.images import Resize
from pipeline.corpus.pairs import Pair, ReadingRules, read_pair
from pipeline.corpus.shards import Shard, find
from pipeline.corpus.tar import Contents, read_groups
from pipeline.errors import RunError, UserError
from pipeline.results.select import chosen_filter, select
from pipeline.results.subset import read_subset
from pipeline.results.whole_models import Pairs, Rule
from pipeline.run_folder.finished import Finished
from pipeline.sections import Embed, Reading
from pipeline.sections import Pairs as PairsSection
from pipeline.stages.forward.decode import Members, decode

BATCH = 512  # pairs that are decoded at once


def read_corpus(run: Finished, architecture: dict[str, Any]) -> Pairs:
    """Decode the pairs that a finished run has scored, in the order of its columns, at the size that a small model takes.

    Args:
        run: the run.
        architecture: of the small model, see `ecif.training.build`.

    Raises:
        RunError: a shard is gone, or has changed since the run scored it.
    """
    corpus = run.config.corpus
    shards = {shard.name: shard for shard in find(corpus.shards, "corpus.shards", corpus.root, corpus.missing)}
    batches = []
    for name, part in run.of_shards(["index", "uid"]):
        if name not in shards:
            raise RunError(f"{name}: gone since the run scored it")
        members = Members(shards[name], part["index"].to_numpy(), part["uid"].to_pylist())
        batches += [members.take(rows) for rows in np.split(np.arange(len(part)), range(BATCH, len(part), BATCH))]
    read = list(decode(batches, corpus.reading, run.config, _preprocess(architecture)))
    captions = [caption for batch in read for caption in batch.captions]
    return Pairs(np.concatenate([batch.pixels for batch in read]), tokens_of(captions, architecture))


def read_test(test: PairsSection, limits: Embed, architecture: dict[str, Any]) -> Pairs:
    """Decode every pair of a test set that can be read, at the size that a small model takes.

    Args:
        test: where it is.
        limits: of what is decoded.
        architecture: of the small model.

    Raises:
        UserError: there is none.
    """
    resize = Resize(_preprocess(architecture))
    shards = find(test.shards, "test.shards", missing=test.missing)
    pairs = [pair for shard in shards for pair in _readable(shard, test.reading, limits, resize)]
    if not pairs:
        raise UserError("test.shards: no pair can be read")
    pixels = np.stack([pair.pixels.transpose(2, 0, 1) for pair in pairs])
    return Pairs(pixels, tokens_of([pair.caption for pair in pairs], architecture))


def tokens_of(captions: list[str], architecture: dict[str, Any]) -> NDArray[np.int32]:
    """[N, L] the tokens of captions by CLIP's own tokenizer, which is part of open_clip. Longer captions are cut off."""
    from open_clip.tokenizer import SimpleTokenizer  # takes seconds

    return SimpleTokenizer(context_length=architecture["text_cfg"]["context_length"])(captions).numpy().astype(np.int32)


def rule_of_column(run: Finished, name: str, by: str | None = None, keep: float | None = None) -> Rule:
    """Keep the best share by one column; without them what the run's own filter keeps. See `ecif select`."""
    by, keep = chosen_filter(run, by, keep)
    return Rule(name, select(run.of_shards, by, keep).copies)


def rule_of_subset(run: Finished, name: str, url: str) -> Rule:
    """Keep what a file of `ecif select` holds, each pair as often as it is in there.

    Raises:
        UserError: the file holds pairs that the run has not scored, or see `read_subset`.
    """
    subset = read_subset(url)
    counts = [subset.copies(shard, part) for shard, part in run.of_shards(["index", "key", "uid"])]
    missing, example = subset.missing()
    if missing:
        raise UserError(f"{missing} pairs of {url} are not in the run, such as {example}")
    return Rule(name, np.concatenate(counts).astype(np.int32))


def _readable(shard: Shard, reading: Reading, limits: Embed, resize: Resize) -> Iterable[Pair]:
    rules = ReadingRules(shard.name, reading, limits, resize)
    with storage.local_copy(shard.source, storage.ATTEMPTS) as file:
        for group in find_pairs(file, read_groups(file, Contents(), reading.key), reading, limits):
            pair = read_pair(file, group, rules)
            if isinstance(pair, Pair) and not group.broken:
                yield pair


def _preprocess(architecture: dict[str, Any]) -> dict[str, Any]:
    """Resize the short side and crop the centre, as CLIP does."""
    size = architecture["vision_cfg"]["image_size"]
    shape = {"size": (size, size), "mode": "RGB", "interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0}
    return shape | {"mean": (0.5,) * 3, "std": (0.5,) * 3}  # not applied: decoded pixels stay bytes
