"""What `score` takes beside merely reading the features that it reads, in ViT-B/32's dimensions, a core.

`pytest tests/benchmarks/test_score_rate.py -m benchmark -s`
"""

import statistics
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.demo import model as demo
from pipeline import storage
from pipeline.config import Config
from pipeline.corpus.pairs import Pair
from pipeline.inputs import load_inputs
from pipeline.run import run
from pipeline.run_folder import tables
from pipeline.run_folder.tables import Accounting
from tests.support.small_models import TINY, write_model

pytestmark = pytest.mark.benchmark
TARGET = Path(demo.__file__).parent / "corpus" / "target" / "00000.tar"
SHARDS, PAIRS = 8, 1024
WIDE = {"vision_cfg": {"width": 768, "head_width": 64}, "text_cfg": {"width": 512, "heads": 8}}


def embedded(config: Config) -> str:
    """Features of noise where `embed` would write them, one part a shard; returns their folder."""
    dataset, heads = (inputs := load_inputs(config)).corpus, inputs.model.heads
    draw = np.random.default_rng(0)
    for shard in dataset.shards:
        sides = [draw.standard_normal((PAIRS, h.shape[0])) for h in (heads.image, heads.text)]
        images, texts = ((side / np.linalg.norm(side, axis=1, keepdims=True)).astype(np.float16) for side in sides)
        pairs = [Pair(i, f"{i:09d}", f"{shard.name}{i:027d}", "", np.empty(0, np.uint8), f"{i:032x}") for i in range(PAIRS)]
        url = storage.join(dataset.features_folder(shard.name), tables.part_name(0))
        storage.write_bytes(url, tables.parquet_bytes(tables.features_table(pairs, images, texts)))
        size, etag = shard.source.size, shard.source.etag
        done = Accounting(shard.name, size, etag, "0" * 64, PAIRS, PAIRS, 0, PAIRS, PAIRS, {}, 1, None)
        storage.write_bytes(dataset.accounting_url(shard.name), tables.json_bytes(done._asdict()))
    return dataset.features_folder("")


def test_score_beside_reading(tmp_path):
    model = {key: value | WIDE.get(key, {}) if isinstance(value, dict) else 512 for key, value in TINY.items()}
    for i in range(SHARDS):
        storage.write_bytes(str(tmp_path / "corpus" / f"{i:05d}.tar"), b"embedded already")
    config = Config.model_validate(
        {
            "run": str(tmp_path / "run"),
            "corpus": {"shards": str(tmp_path / "corpus")},
            "model": {"name": write_model(tmp_path / "model", model)},
            "targets": {"clean": {"shards": str(TARGET)}},
            "fit": {"folds": 2, "epochs": 1, "checkpoints": 1, "sample": 1024},
            "solve": {"iterations": 4, "refits": 4, "dampings": [0.1]},
            "score": {"repeats": 1},
            "embed": {"precision": "fp32"},  # as the features below are named
        }
    )
    folder = embedded(config)
    outcome = run(config)
    assert outcome.scored == SHARDS * PAIRS
    torch.set_num_threads(1)
    reading = []
    for i in range(SHARDS):
        started = time.perf_counter()
        tables.read_features(storage.join(folder, f"{i:05d}"), 1)
        reading.append((time.perf_counter() - started) / PAIRS)
    score, read = outcome.seconds_a_pair["projection"], statistics.median(reading)
    print(f"\nscore, 2 folds, one repeat of batches of {config.batch_size}, one target: {1 / score:.0f} pairs/s and core")
    print(f"reading the same features: {1 / read:.0f} pairs/s; score takes {score / read:.0f} times as long")
