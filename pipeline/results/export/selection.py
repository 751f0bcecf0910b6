"""Find the pairs that an export has to copy, by shard."""

from collections import Counter
from typing import NamedTuple

from pipeline.corpus.shards import Shard, find
from pipeline.errors import RunError, UserError
from pipeline.results.select import read_subset
from pipeline.run_folder.dataset import Dataset
from pipeline.run_folder.finished import Finished, open_run


class Kept(NamedTuple):
    """A pair that the subset holds."""

    uid: str
    copies: int  # how often the subset holds it


class Selection(NamedTuple):
    """The pairs of a subset in the corpus of a run."""

    workers: int | None  # of the configuration of the run
    corpus: list[Shard]
    kept: dict[str, dict[int, Kept]]  # by shard and index in the shard; no shard without a kept pair

    def shards(self) -> list[Shard]:
        """Shards with a kept pair, sorted by name."""
        return [shard for shard in self.corpus if shard.name in self.kept]


def find_selection(run: str, subset: str) -> Selection:
    """Find the pairs of a subset.

    Raises:
        UserError: there is no finished run or no subset, the subset is empty, or the run has not scored one of its uids.
        RunError: a shard with kept pairs is gone or has changed since the run scored it.
    """
    finished = open_run(run)
    corpus = finished.config.corpus
    wanted = read_subset(subset)
    if not wanted:
        raise UserError(f"{subset} is empty: there is nothing to export")
    shards = find(corpus.shards, "corpus.shards", corpus.root, corpus.missing)
    found = Selection(finished.config.workers, shards, _kept(finished, wanted))
    scored = Dataset(run, finished.checkpoints[0].features, found.shards(), corpus.reading).accounting()
    if changed := found.kept.keys() - scored.keys():
        raise RunError(f"{min(changed)}: gone or changed since the run scored it; run again first")
    return found


def _kept(run: Finished, wanted: Counter[str]) -> dict[str, dict[int, Kept]]:
    table = run.scores(["shard", "index", "uid"])
    kept: dict[str, dict[int, Kept]] = {}
    known = set()
    for shard, index, uid in zip(*(table[c].to_pylist() for c in ("shard", "index", "uid")), strict=True):
        # A uid that the corpus holds twice is one pair: its first copy stands for it.
        if uid in wanted and uid not in known:
            known.add(uid)
            kept.setdefault(shard, {})[index] = Kept(uid, wanted[uid])
    if missing := wanted.keys() - known:
        raise UserError(f"{len(missing)} uids of the subset are not in the run, such as {min(missing)}")
    return kept
