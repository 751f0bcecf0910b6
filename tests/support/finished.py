"""What a finished run leaves behind, made without running it."""

import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ecif.towers import resize_transform
from pipeline import storage
from pipeline.config import Config, Embed
from pipeline.corpus.pairs import Pair, read_pair
from pipeline.corpus.shards import find
from pipeline.corpus.tar import Contents, groups
from pipeline.run_folder import tables

MODEL = {"name": "local-dir:nowhere"}
PREPROCESS = {"size": (8, 8), "mode": "RGB", "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
RESIZE = resize_transform(PREPROCESS | {"resize_mode": "shortest", "fill_color": 0})


@dataclass
class Run:
    """A run folder, and the uids of its pairs by (shard, key)."""

    folder: str
    uids: dict[tuple[str, str], str] = field(default_factory=dict)


def write_scores(folder: Path, shards: dict[str, dict[str, list]]) -> Run:
    """A run of which only the columns are left: by shard, the uids and any scores."""
    run = Run(str(folder))
    facts = {"config": _config(folder, "nowhere"), "scores": "abc", "features": "def"}
    storage.write_bytes(storage.join(run.folder, "run.json"), tables.json_bytes(facts))
    for shard, columns in shards.items():
        uids, count = columns["uid"], len(columns["uid"])
        keys = columns.get("key", [f"{i:04d}" for i in range(count)])
        places = {"shard": [shard] * count, "index": columns.get("index", list(range(count))), "key": keys}
        identity = places | {"uid": uids, "batch": [0] * count, "fold": [0] * count}
        scores = {name: np.array(v, np.float32) for name, v in columns.items() if name not in (*identity, "shard")}
        url = storage.join(run.folder, "scores", "abc", f"{shard}.parquet")
        storage.write_bytes(url, tables.parquet_bytes(tables.scores_table(identity, scores)))
        run.uids |= {(shard, key): uid for key, uid in zip(keys, uids, strict=True)}
    return run


def write_run(folder: Path, corpus: str) -> Run:
    """A run that has scored every pair of a corpus that can be read."""
    columns = {}
    for shard in find(corpus):
        contents = Contents()
        file = io.BytesIO(storage.read_bytes(shard.source.url))
        read = [read_pair(file, group, shard.name, "txt", Embed(), RESIZE) for group in groups(file, contents)]
        good = [pair for pair in read if isinstance(pair, Pair)]
        columns[shard.name] = {name: [getattr(pair, name) for pair in good] for name in ("index", "key", "uid")}
        counts = (contents.members, contents.members - contents.ignored, contents.ignored, len(read), len(good))
        done = tables.Accounting(shard.name, shard.source.size, shard.source.etag, "", *counts, {}, 1, contents.broken)
        url = storage.join(str(folder), "shards", "def", f"{shard.name}.json")
        storage.write_bytes(url, tables.json_bytes(done._asdict()))
    run = write_scores(folder, columns)
    facts = {"config": _config(folder, corpus), "scores": "abc", "features": "def"}
    storage.write_bytes(storage.join(run.folder, "run.json"), tables.json_bytes(facts))
    return run


def _config(folder: Path, corpus: str) -> dict:
    clean = {"clean": {"shards": "nowhere"}}
    return Config(run=str(folder), corpus={"shards": corpus}, model=MODEL, targets=clean).model_dump()
