"""What a call of the recipe did, with every pair accounted for."""

from collections import Counter
from typing import NamedTuple

import pyarrow as pa

from pipeline.errors import RunError
from pipeline.run_folder.dataset import Dataset
from pipeline.run_folder.finished import Finished


class Outcome(NamedTuple):
    """What a run did."""

    finished: Finished
    pairs: int  # in the corpus's tars
    scored: int
    quarantined: dict[str, int]  # by reason; pairs = scored + all of these
    lost: int  # pairs that a shard's _stats.json counts and its tar does not hold
    seconds: dict[str, float]  # wall time of each stage in this call
    seconds_a_pair: dict[str, float | None]  # computing time of one actor, by work; None if there was none
    small_shards: int  # shards with fewer usable pairs than a batch
    swallowed: int = 0  # members of pairs that were lost to a key that ends at the first dot

    def scores(self, columns: list[str] | None = None) -> pa.Table:
        """The columns of every pair, see `Finished.scores`."""
        return self.finished.scores(columns)


def account(
    finished: Finished,
    corpus: Dataset,
    published: set[str],
    seconds: dict[str, float],
    seconds_a_pair: dict[str, float | None],
) -> Outcome:
    """Count the pairs of a finished run.

    Args:
        finished: the run.
        corpus: the corpus of the run.
        published: the shards that have a table of columns.
        seconds: wall time of each stage.
        seconds_a_pair: see `Outcome`.

    Raises:
        RunError: a pair is neither scored nor quarantined.
    """
    done = corpus.accounting()
    pairs = sum(a.pairs for a in done.values())
    scored = sum(a.embedded for a in done.values() if a.shard in published)
    quarantined = Counter[str]()
    for a in done.values():
        quarantined.update(a.quarantined)
    if len(done) != len(corpus.shards) or pairs != scored + quarantined.total():
        raise RunError(f"{pairs} pairs, but {scored} scored and {quarantined.total()} quarantined: the run lost count")
    lost = sum(a.lost for a in done.values())
    small = sum(0 < a.embedded < finished.config.batch_size for a in done.values())
    swallowed = sum(a.swallowed for a in done.values())
    return Outcome(finished, pairs, scored, dict(sorted(quarantined.items())), lost, seconds, seconds_a_pair, small, swallowed)
