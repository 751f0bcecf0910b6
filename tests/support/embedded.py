"""Datasets that look embedded, without a tar or a model: accounting of shards in memory."""

import uuid
from collections.abc import Mapping

from pipeline import storage
from pipeline.config import Config
from pipeline.corpus.shards import Shard
from pipeline.inputs import as_dataset, made_by
from pipeline.run_folder.dataset import Dataset
from pipeline.run_folder.tables import Accounting
from pipeline.sections import Pairs


class NoModel:
    """All of a model that names depend on."""

    fingerprint = "a model"


def embedded(config: Config, pairs: Pairs, shards: Mapping[str, int | tuple[int, str]]) -> Dataset:
    """A dataset of which every shard is done.

    Args:
        config: of the run.
        pairs: how the dataset is read.
        shards: by name, how many usable pairs a shard has, and which bytes where that matters.
    """
    found = [Shard(name, storage.Object(f"memory://{name}.tar", 1, "etag")) for name in sorted(shards)]
    dataset = as_dataset(f"memory://ecif-embedded/{uuid.uuid4().hex}", pairs, found, made_by(NoModel(), config))
    for name, content in shards.items():
        count, sha256 = content if isinstance(content, tuple) else (content, f"bytes of {name}")
        counts = {"members": 2 * count, "in_pairs": 2 * count, "ignored": 0, "pairs": count, "embedded": count}
        dataset.record(Accounting(name, 1, "etag", sha256, **counts, quarantined={}, parts=1, broken=None))
    return dataset
