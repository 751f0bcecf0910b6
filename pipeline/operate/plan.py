"""Estimate what a run would do and store. Sources are listings, and `_stats.json` or the first bytes of a few shards."""

import io
from collections.abc import Callable
from typing import NamedTuple

from ecif.columns.filter import QUANTILES
from ecif.copies import COPIES
from ecif.system import BANK
from ecif.targets.question import CALIBRATION_GROUPS, PARTS
from pipeline import storage
from pipeline.config import Config
from pipeline.console import say
from pipeline.corpus import sidecar
from pipeline.corpus.captions import find_pairs
from pipeline.corpus.glance import glance
from pipeline.corpus.remarks import of_layout
from pipeline.corpus.shards import Shard
from pipeline.corpus.tar import Contents, read_groups
from pipeline.inputs import load_inputs
from pipeline.operate.pace import HEAD, measure
from pipeline.run_folder.artifacts import KINDS, instances
from pipeline.run_folder.columns import columns, evidence_scores
from pipeline.run_folder.dataset import Dataset
from pipeline.sections import Embed, Reading
from pipeline.stages.forward.model import check_parameters
from pipeline.workers.process import as_found

SAMPLED = 8  # shards that pairs a byte are estimated from
IDENTITY_BYTES = 60  # of a pair in a Parquet table: mostly its uid and key, compressed
HASH_BYTES = 18  # of its image_hash, compressed
PART_BYTES = 3000  # size of a feature file beside its rows


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
        """Cells of a table row, in the columns of `HEADER`."""
        counts = [str(self.shards), size(self.bytes), f"~{self.pairs}", str(self.done_shards)]
        left = [str(self.shards - self.done_shards), size(self.bytes - self.done_bytes)]
        return [self.name, *counts, *left, f"~{size(self.feature_bytes)}"]


HEADER = ["", "shards", "size", "pairs", "shards done", "left", "size left", "features"]


class RunPlan(NamedTuple):
    """The estimate for a configuration."""

    datasets: list[DatasetPlan]
    stored: dict[str, float]  # bytes that each stage after `embed` will store, estimated
    notes: list[str]  # what a user has to know about the shards and uids of the corpus, a line each
    pace: str | None  # how fast this machine reads and embeds; None if no pair could be read


class Sizes(NamedTuple):
    """The numbers that sizes of objects are computed from."""

    config: Config
    shards: int
    pairs: int
    features: int  # d_x + d_t
    parameters: int  # P, of both heads
    chosen: int  # parameters that forward mode moves

    @property
    def fits(self) -> int:
        """Sets of heads that score pairs."""
        return self.config.fit.folds * self.config.fit.fits

    @property
    def sample(self) -> int:
        """Pairs that are fitted on."""
        return min(self.pairs, self.config.fit.sample)

    def projected(self, rank: tuple[int, int]) -> int:
        """k, numbers of a gradient of both heads in a projection."""
        return 2 * rank[0] * rank[1]


def _index_rank(sizes: Sizes) -> int:
    return sizes.projected(sizes.config.index.rank) if sizes.config.index else 0


def _order_rank(sizes: Sizes) -> int:
    return sizes.projected(sizes.config.score.order_rank)


# Bytes of one object of each kind, or of all shards together for a kind with an object for each shard. Numbers are float32, if
# nothing else is said. Tables of the stage `score` other than `pairs` repeat the pair's position, 4 bytes.
BYTES: dict[str, Callable[[Sizes], float]] = {
    "copies": lambda s: s.sample * (2 * (s.features + 2) + 18),
    "fit_choice": lambda s: 3_000,
    "heads": lambda s: 4 * s.parameters * (s.config.fit.checkpoints + s.fits),
    "evidence": lambda s: s.sample * (8 * len(evidence_scores(s.config)) + 1) + min(s.sample, BANK) * 2 * s.features,
    "directions": lambda s: 4 * s.parameters * s.fits + 4 * s.sample * (2 * PARTS + CALIBRATION_GROUPS),
    "misalignment": lambda s: 500,
    "curvature": lambda s: 8 * s.fits * _order_rank(s) ** 2,
    "second_order": lambda s: 4 * s.fits * _order_rank(s) * (1 + _order_rank(s)),
    "filter": lambda s: 16 * QUANTILES,
    "pairs": lambda s: s.pairs * (IDENTITY_BYTES + HASH_BYTES + 4 * (len(evidence_scores(s.config)) + len(COPIES))),
    "influence": lambda s: 16 * s.pairs,
    "correction": lambda s: 16 * s.pairs,
    "column": lambda s: 8 * s.pairs,
    "parameters": lambda s: 4 * s.chosen,
    "forward_directions": lambda s: 4 * s.chosen,
    "forward_influence": lambda s: 12 * s.pairs,
    "scores": lambda s: s.pairs * (IDENTITY_BYTES + HASH_BYTES + 4 * len(columns(s.config)) + 8 * len(s.config.corpus.sidecar)),
    "index_projection": lambda s: 4 * sum(s.config.index.rank if s.config.index else ()) * s.features,
    "index": lambda s: s.pairs * (IDENTITY_BYTES + 4 * _index_rank(s) + 8) + 4 * s.shards * _index_rank(s) ** 2,
    "index_curvature": lambda s: 4 * _index_rank(s) ** 2,
    "self_influence": lambda s: s.pairs * (IDENTITY_BYTES + 32),
}


@as_found()
def plan(config: Config) -> RunPlan:
    """Estimate a run; nothing is started or written.

    Raises:
        UserError: the corpus, the model or a target can't be read.
    """
    inputs = load_inputs(config)
    heads = inputs.model.heads
    features = heads.image.shape[0] + heads.text.shape[0]
    of_pair = 2 * features + IDENTITY_BYTES + HASH_BYTES
    datasets = [_dataset(name, dataset, of_pair, config.embed) for name, dataset in inputs.datasets().items()]
    corpus = datasets[0]
    chosen = check_parameters(config)
    sizes = Sizes(config, corpus.shards, corpus.pairs, features, heads.image.numel() + heads.text.numel(), chosen)
    stored: dict[str, float] = {}
    for kind, what in KINDS.items():
        if kind in BYTES and what.asked(config):
            stored[what.stage] = stored.get(what.stage, 0) + len(instances(kind, config)) * BYTES[kind](sizes)
    seen = glance(inputs.corpus.shards, inputs.corpus.reading.key, inputs.corpus.sidecars, config.embed)
    impossible = [f"{seen.impossible}; `ecif run` refuses them"] if seen.impossible else []
    left = sum(round(one.pairs * (1 - one.done_bytes / max(1, one.bytes))) for one in datasets)
    pace = measure(inputs.model, inputs.corpus, config.embed) if left else None
    return RunPlan(datasets, stored, [*impossible, *seen.said(config.batch_size)], pace.said(left) if pace else None)


def size(count: float) -> str:
    """A number of bytes as text, to three digits: 1.23 GB."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 999.5 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:.3g} {units[0]}"


def _dataset(name: str, dataset: Dataset, of_pair: int, limits: Embed) -> DatasetPlan:
    done = dataset.accounting()
    left = [shard for shard in dataset.shards if shard.name not in done]
    sample = [left[i * len(left) // SAMPLED] for i in range(SAMPLED)] if len(left) > SAMPLED else left
    counted = list(storage.in_threads(lambda shard: count_pairs(shard, dataset.reading, limits), sample))
    for shard, found in zip(sample, counted, strict=True):
        for remark in found.remarks:
            say(f"{shard.source.url}: {remark}")
    bytes_left = sum(shard.source.size for shard in left)
    pairs_a_byte = sum(found.pairs for found in counted) / max(1, sum(found.bytes for found in counted))
    pairs = sum(a.pairs for a in done.values()) + round(bytes_left * pairs_a_byte)
    done_bytes = sum(a.size for a in done.values())
    parts = len(dataset.shards) + pairs // limits.part_size
    shards = len(dataset.shards)
    return DatasetPlan(
        name, shards, bytes_left + done_bytes, pairs, len(done), done_bytes, pairs * of_pair + parts * PART_BYTES
    )


class Counted(NamedTuple):
    """A number of pairs of a shard, the bytes that hold them, and what is odd about the shard."""

    pairs: int
    bytes: int
    remarks: list[str] = []


def count_pairs(shard: Shard, reading: Reading, limits: Embed) -> Counted:
    """Count pairs of a shard.

    All pairs are counted if there is a `_stats.json`, else those in the first HEAD bytes.
    """
    successes, wrong = sidecar.successes(shard.source)
    if successes is not None and reading.pick != "all":  # it counts images
        return Counted(successes, shard.source.size)
    data, contents = storage.read_start(shard.source.url, HEAD), Contents()
    file = io.BytesIO(data)
    starts = [pair.start for pair in find_pairs(file, read_groups(file, contents, reading.key), reading, limits)]
    remarks = [remark for remark in (wrong, *of_layout(contents).values()) if remark]
    if len(data) < shard.source.size and len(starts) > 1:  # the last pair is cut
        return Counted(len(starts) - 1, starts[-1], remarks)
    return Counted(len(starts), len(data), remarks)
