"""What a finished run leaves behind, made without running it."""

import hashlib
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.config import Config
from pipeline.corpus.images import Resize
from pipeline.corpus.pairs import Pair, ReadingRules, read_pair
from pipeline.corpus.shards import find
from pipeline.corpus.tar import Contents, read_groups
from pipeline.run_folder import tables
from pipeline.run_folder.finished import LATEST, Checkpoint, Finished, write_finished
from pipeline.sections import Embed, Reading

MODEL = {"name": "local-dir:nowhere"}
PREPROCESS = {"size": (8, 8), "mode": "RGB", "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
RESIZE = Resize(PREPROCESS | {"resize_mode": "shortest", "fill_color": 0})


@dataclass
class Run:
    """A run folder, and the uids of its pairs by (shard, key)."""

    folder: str
    uids: dict[tuple[str, str], str] = field(default_factory=dict)


def write_scores(folder: Path, shards: dict[str, dict[str, list]]) -> Run:
    """A run of which only the columns are left: by shard, the uids and any scores."""
    run = Run(str(folder))
    finish(folder, "nowhere")
    for shard, columns in shards.items():
        uids, count = columns["uid"], len(columns["uid"])
        keys = columns.get("key", [f"{i:04d}" for i in range(count)])
        places = {"shard": [shard] * count, "index": columns.get("index", list(range(count))), "key": keys}
        hashes = columns.get(
            "image_hash", [hashlib.blake2b(f"{shard} {key}".encode(), digest_size=16).hexdigest() for key in keys]
        )
        identity = places | {"uid": uids, "image_hash": hashes, "batch": [0] * count, "fold": [0] * count}
        scores = {name: np.array(v, np.float32) for name, v in columns.items() if name not in (*identity, "shard")}
        url = storage.join(run.folder, LATEST, f"{shard}.parquet")
        table = tables.described(tables.scores_table(identity, scores), [], "a run", "a shard")
        storage.write_bytes(url, tables.parquet_bytes(table))
        run.uids |= {(shard, key): uid for key, uid in zip(keys, uids, strict=True)}
    return run


def write_run(folder: Path, corpus: str, caption: str = "txt") -> Run:
    """A run that has scored every pair of a corpus that can be read, with its captions in some place."""
    columns = {}
    for shard in find(corpus):
        contents = Contents()
        file = io.BytesIO(storage.read_bytes(shard.source.url))
        rules = ReadingRules(shard.name, Reading(caption), Embed(), RESIZE)
        read = [read_pair(file, group, rules) for group in read_groups(file, contents)]
        good = [pair for pair in read if isinstance(pair, Pair)]
        columns[shard.name] = {name: [getattr(pair, name) for pair in good] for name in ("index", "key", "uid")}
        counts = (contents.members, contents.members - contents.ignored, contents.ignored, len(read), len(good))
        done = tables.Accounting(shard.name, shard.source.size, shard.source.etag, "", *counts, {}, 1, contents.broken)
        url = storage.join(str(folder), "shards", "def", f"{shard.name}.json")
        storage.write_bytes(url, tables.json_bytes(done._asdict()))
    run = write_scores(folder, columns)
    finish(folder, corpus)
    return run


def finish(folder: Path, corpus: str, *checkpoints: dict[str, Any]) -> None:
    """Write run.json.

    Args:
        folder: of the run.
        corpus: its shards.
        checkpoints: for each checkpoint of the model, what it found out about each target; one that found nothing by default.
    """
    names = sorted({name for facts in checkpoints for name in facts} or {"clean"})
    clean = {name: {"shards": "nowhere"} for name in names}
    config = Config(run=str(folder), corpus={"shards": corpus}, model=MODEL, targets=clean)
    left = [Checkpoint("def", {}, {}, facts) for facts in checkpoints or [{}]]
    write_finished(Finished(str(folder), config, "id", left))
