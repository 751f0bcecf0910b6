"""Find the pairs that an export has to copy, by shard."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.console import say
from pipeline.corpus.shards import Shard, find
from pipeline.errors import RunError, UserError
from pipeline.results.subset import read_subset
from pipeline.run_folder.dataset import Dataset
from pipeline.run_folder.finished import Finished, open_generation


class Selection(NamedTuple):
    """The pairs of a subset in the corpus of a run."""

    run: Finished
    corpus: list[Shard]
    kept: dict[str, NDArray[np.int32]]  # by shard, [n, 2]: index of a pair, number of its copies. No shard without a kept pair

    def shards(self) -> list[Shard]:
        """Shards with a kept pair, sorted by name."""
        return [shard for shard in self.corpus if shard.name in self.kept]


def find_selection(finished: Finished, subset: str, since: int | None = None) -> Selection:
    """Find the pairs of a subset.

    Args:
        finished: the run.
        subset: a file of `ecif select`.
        since: number of a generation; pairs of shards that it has are left out.

    Raises:
        UserError: there is no such generation or no subset, the subset is empty, or the run has not scored one of its pairs.
        RunError: a shard with kept pairs is gone or has changed since the run scored it.
    """
    corpus = finished.config.corpus
    wanted = read_subset(subset)
    if not len(wanted):
        raise UserError(f"{subset} is empty: there is nothing to export")
    shards = find(corpus.shards, "corpus.shards", corpus.root, corpus.missing)
    kept = {}
    for shard, pairs in finished.of_shards(["index", "key", "uid"]):
        copies = wanted.copies(shard, pairs)
        rows = np.flatnonzero(copies)
        if len(rows):
            kept[shard] = np.stack([pairs["index"].to_numpy()[rows], copies[rows]], 1).astype(np.int32)
    missing, example = wanted.missing()
    if missing:
        raise UserError(f"{missing} pairs of the subset are not in the run, such as {example}")
    several, example = wanted.ambiguous()
    if several:
        say(f"{several} uids of {subset} belong to several pairs each, such as {example}: all of these pairs are copied")
    if since is not None:
        increment = open_generation(finished.folder, finished.generation, since).files
        kept = {shard: pairs for shard, pairs in kept.items() if shard in increment}
        if not kept:
            raise UserError(f"{subset} has no pair of a shard that generation {since} does not have")
    found = Selection(finished, shards, kept)
    scored = Dataset(finished.folder, finished.checkpoints[0].features, found.shards(), corpus.reading).accounting()
    if changed := found.kept.keys() - scored.keys():
        line = f"{len(changed)} of {len(found.kept)} shards are gone or changed since they were scored, such as {min(changed)}"
        raise RunError(f"{line}; export copies them as they were scored, so run again first, or select from what is there")
    return found
