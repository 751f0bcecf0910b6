"""The share of unusable pairs above which a run ends: a fault in most pairs is rather a fault in the configuration."""

from collections import Counter

from pipeline.errors import RunError
from pipeline.run_folder.dataset import Dataset
from pipeline.run_folder.tables import Accounting
from pipeline.sections import Embed

ENOUGH = 10_000  # from this many pairs on the share of a dataset is judged before its end


class Budget:
    """Counts the bad pairs of a dataset: those quarantined, and those that `_stats.json` counts but the tar does not hold."""

    def __init__(self, dataset: Dataset, limits: Embed):
        self._dataset, self._limits = dataset, limits
        self._pairs, self._bad = dataset.others, Counter[str]()

    def spend(self, shard: Accounting) -> None:
        """Count a finished shard.

        Raises:
            RunError: the shard is above its budget, or all shards so far are above theirs and have at least ENOUGH pairs.
        """
        bad = bad_pairs(shard)
        pairs = shard.pairs + shard.lost
        self._pairs += pairs
        self._bad.update(bad)
        of_shard = self._limits.max_bad_fraction_of_shard
        _check(shard.shard, bad, pairs, of_shard, "max_bad_fraction_of_shard", self._dataset.quarantine_url(shard.shard))
        if self._pairs >= ENOUGH:
            self.settle()

    def settle(self) -> None:
        """Raise RunError if all shards together are above the budget."""
        place = self._dataset.quarantine_url("").removesuffix("/.parquet")
        _check(self._dataset.folder, self._bad, self._pairs, self._limits.max_bad_fraction, "max_bad_fraction", place)


def bad_pairs(shard: Accounting) -> Counter[str]:
    """A shard's unusable pairs by reason. Pairs that the tar does not hold count as `lost`."""
    return Counter(shard.quarantined) + Counter(lost=shard.lost)


def _check(what: str, bad: Counter[str], pairs: int, allowed: float, key: str, place: str) -> None:
    if bad.total() > allowed * pairs:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(bad.items()))
        found = f"{bad.total()} of {pairs} pairs can't be used ({reasons})"
        raise RunError(f"{what}: {found}, more than embed.{key} = {allowed:g}; see {place}")
