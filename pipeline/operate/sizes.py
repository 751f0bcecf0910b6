"""What a run stores: bytes of each kind of object, as functions of a few numbers."""

import math
from collections.abc import Callable
from typing import NamedTuple

from ecif.columns.filter import QUANTILES
from ecif.copies import COPIES
from ecif.system import BANK
from ecif.targets.question import CALIBRATION_GROUPS, PARTS
from pipeline.config import Config
from pipeline.run_folder.artifacts import KINDS, instances
from pipeline.run_folder.columns import columns, evidence_scores

IDENTITY_BYTES = 60  # of a pair in a Parquet table: mostly its uid and key, compressed
HASH_BYTES = 18  # of its image_hash, compressed
PART_BYTES = 3000  # size of a feature file beside its rows


class Sizes(NamedTuple):
    """The numbers that sizes of objects, times and requests are computed from."""

    config: Config
    shards: int
    pairs: int
    bytes: int  # of the shards' tars
    features: int  # d_x + d_t
    parameters: int  # P, of both heads
    chosen: int  # parameters that forward mode moves

    @property
    def parts(self) -> int:
        """Objects that hold features, if all shards are of one size."""
        return self.shards * math.ceil(self.pairs / max(1, self.shards) / self.config.embed.part_size)

    @property
    def fits(self) -> int:
        """Sets of heads that score pairs."""
        return self.config.fit.folds * self.config.fit.fits

    @property
    def sample(self) -> int:
        """Pairs that are fitted on."""
        return max(1, min(self.pairs, self.config.fit.sample))

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


def of_features(sizes: Sizes) -> int:
    """Bytes of the features of some shards."""
    return sizes.pairs * (2 * sizes.features + IDENTITY_BYTES + HASH_BYTES) + sizes.parts * PART_BYTES


def of_stages(sizes: Sizes) -> dict[str, float]:
    """Bytes that each stage after `embed` stores, whether or not its objects are there already."""
    stored: dict[str, float] = {}
    for kind, what in KINDS.items():
        if kind in BYTES and what.asked(sizes.config):
            stored[what.stage] = stored.get(what.stage, 0) + of_kind(kind, sizes)
    return stored


def of_kind(kind: str, sizes: Sizes) -> float:
    """Bytes of all objects of a kind that a run makes after `embed`."""
    return len(instances(kind, sizes.config)) * BYTES[kind](sizes)
