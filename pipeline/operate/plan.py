"""What a run would do and store, before it is started: from listings, `_stats.json` or the first bytes of a few shards."""

import io
from typing import NamedTuple

from pipeline import storage
from pipeline.config import Config
from pipeline.corpus import sidecar
from pipeline.corpus.shards import Shard
from pipeline.corpus.tar import Contents, groups
from pipeline.inputs import load_inputs
from pipeline.run_folder.dataset import Dataset
from pipeline.stages.solve.stage import BANK

SAMPLED = 8  # shards that a dataset's density of pairs is taken from
HEAD = 16 << 20  # bytes of each that are read where no _stats.json counts its pairs
IDENTITY_BYTES = 60  # of a pair in a Parquet table: mostly its uid and key, compressed
PART_BYTES = 3000  # of a feature file beside its rows


class DatasetPlan(NamedTuple):
    """A corpus or a target."""

    name: str
    shards: int
    bytes: int
    pairs: int  # estimated
    done_shards: int
    done_bytes: int
    feature_bytes: int  # estimated, of all shards

    def cells(self) -> list[str]:
        """For a table with the columns of `HEADER`."""
        counts = [str(self.shards), size(self.bytes), f"~{self.pairs}", str(self.done_shards)]
        left = [str(self.shards - self.done_shards), size(self.bytes - self.done_bytes)]
        return [self.name, *counts, *left, f"~{size(self.feature_bytes)}"]


HEADER = ["", "shards", "size", "pairs", "shards done", "left", "size left", "features"]


class RunPlan(NamedTuple):
    """What a configuration asks for."""

    datasets: list[DatasetPlan]
    score_bytes: int  # estimated
    head_bytes: int  # heads and directions


def plan(config: Config) -> RunPlan:
    """Estimate a run; nothing is started or written.

    Raises:
        UserError: a corpus, model or target that can't be had.
    """
    model, corpus, clean = load_inputs(config)
    feature_bytes = 2 * (model.heads.image.shape[0] + model.heads.text.shape[0])
    of_pair = feature_bytes + IDENTITY_BYTES
    datasets = [
        _dataset(name, dataset, of_pair, config.embed.part_size)
        for name, dataset in {"corpus": corpus, **{f"target {name}": target for name, target in clean.items()}}.items()
    ]
    columns = 4 + (4 if config.filter else 3) * len(clean)  # of float32
    head_sets = config.fit.folds * config.fit.fits
    parameters = model.heads.image.numel() + model.heads.text.numel()
    return RunPlan(
        datasets,
        datasets[0].pairs * (4 * columns + IDENTITY_BYTES),
        4 * parameters * (config.fit.checkpoints + head_sets + head_sets * len(clean))
        + feature_bytes * min(datasets[0].pairs, config.fit.sample, BANK),
    )


def size(count: float) -> str:
    """Bytes, to three digits: 1.23 GB."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 999.5 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:.3g} {units[0]}"


def _dataset(name: str, dataset: Dataset, of_pair: int, part_size: int) -> DatasetPlan:
    done = dataset.accounting()
    left = [shard for shard in dataset.shards if shard.name not in done]
    sample = [left[i * len(left) // SAMPLED] for i in range(SAMPLED)] if len(left) > SAMPLED else left
    counted = list(storage.in_threads(_count, sample))
    bytes_left = sum(shard.source.size for shard in left)
    pairs_a_byte = sum(pairs for pairs, _ in counted) / max(1, sum(count for _, count in counted))
    pairs = sum(a.pairs for a in done.values()) + round(bytes_left * pairs_a_byte)
    done_bytes = sum(a.size for a in done.values())
    parts = len(dataset.shards) + pairs // part_size
    shards = len(dataset.shards)
    return DatasetPlan(
        name, shards, bytes_left + done_bytes, pairs, len(done), done_bytes, pairs * of_pair + parts * PART_BYTES
    )


def _count(shard: Shard) -> tuple[int, int]:
    """Pairs, and in how many bytes they are: by `_stats.json`, else of the shard's beginning."""
    successes = sidecar.successes(shard.source)
    if successes is not None:
        return successes, shard.source.size
    data = storage.read_start(shard.source.url, HEAD)
    starts = [min(m.offset for m in group.members.values()) for group in groups(io.BytesIO(data), Contents())]
    if len(data) < shard.source.size and len(starts) > 1:  # the last pair is cut
        return len(starts) - 1, starts[-1]
    return len(starts), len(data)
