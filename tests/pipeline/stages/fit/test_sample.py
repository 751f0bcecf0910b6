"""The sample is the rows of the chosen batches, wherever they are read."""

import numpy as np
import pytest
import torch

from ecif.copies import pair_ids
from pipeline import storage
from pipeline.config import Config
from pipeline.corpus.batches import batches_of
from pipeline.corpus.pairs import Pair
from pipeline.run_folder import tables
from pipeline.run_folder.contents import sampled
from pipeline.run_folder.dataset import Dataset
from pipeline.stages.fit import sample as reading
from pipeline.stages.fit.sample import read_sampled
from tests.support.embedded import embedded

PAIRS, PART = 50, 16
CONFIG = Config.model_validate(
    {"run": "run", "corpus": {"shards": "x"}, "model": {"name": "x"}, "targets": {"a": {"shards": "x"}}}
    | {"batch_size": 8, "fit": {"sample": 100, "folds": 2}}
)


@pytest.fixture
def corpus(tmp_path) -> Dataset:
    """Twelve shards of four parts; a pair's features say which pair it is."""
    dataset = embedded(CONFIG, CONFIG.corpus, {f"{i:05d}": PAIRS for i in range(12)})
    done = {name: one._replace(parts=4) for name, one in dataset.accounting().items()}
    dataset = Dataset(str(tmp_path), "fingerprint", dataset.shards, CONFIG.corpus.reading)
    for name, one in done.items():
        dataset.record(one)
        for number, rows in enumerate(np.split(np.arange(PAIRS), range(PART, PAIRS, PART))):
            pairs = [Pair(2 * i, f"{i}", f"{name}{i:027d}", "", np.zeros((3, 1, 1), np.uint8), "0" * 32) for i in rows]
            features = np.stack([np.full(len(rows), int(name)), rows], 1).astype(np.float16)
            table = tables.features_table(pairs, features, -features)
            storage.write_bytes(f"{dataset.features_folder(name)}/{tables.part_name(number)}", tables.parquet_bytes(table))
    return dataset


@pytest.mark.parametrize("where", ["threads", "workers"])
def test_a_sample_is_the_rows_of_the_batches_that_are_drawn(corpus, where, monkeypatch, local_ray):
    monkeypatch.setattr(reading, "FEW", 0)
    found = read_sampled(corpus, CONFIG, local_ray if where == "workers" else None)
    chosen = sampled(CONFIG, corpus.accounting(), CONFIG.fit.sample)
    of_shard = {name: batches_of(CONFIG).of(name, PAIRS) for name in chosen}
    batches = [(name, of_shard[name][i]) for name in sorted(chosen) for i in chosen[name]]
    rows = [(int(name), row, name) for name, batch in batches for row in batch.tolist()]
    assert 80 < len(rows) <= 100
    assert found.sizes == [len(batch) for _, batch in batches]
    assert found.images.tolist() == [[shard, row] for shard, row, _ in rows]
    assert torch.equal(found.texts, -found.images)
    assert found.uids == [f"{name}{row:027d}" for _, row, name in rows]
    assert torch.equal(found.pair, torch.cat([pair_ids(name, 2 * batch) for name, batch in batches]))
