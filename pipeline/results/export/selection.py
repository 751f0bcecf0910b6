"""Which pairs of which shards an export has to copy."""

from collections import Counter
from typing import NamedTuple

from pipeline.config import Config
from pipeline.corpus.shards import Shard, find
from pipeline.errors import RunError, UserError
from pipeline.results.select import read_scores, read_subset
from pipeline.run import load_run
from pipeline.run_folder.dataset import Dataset


class Kept(NamedTuple):
    """A pair that the subset holds."""

    uid: str
    copies: int  # how often the subset holds it


class Selection(NamedTuple):
    """The pairs of a subset in the corpus of a run."""

    workers: int | None  # as the run was configured
    corpus: list[Shard]
    kept: dict[str, dict[int, Kept]]  # by shard and index in the shard; no shard without a kept pair

    def shards(self) -> list[Shard]:
        """Shards with a kept pair, sorted by name."""
        return [shard for shard in self.corpus if shard.name in self.kept]


def find_selection(run: str, subset: str) -> Selection:
    """Find the pairs of a subset.

    Raises:
        UserError: no finished run, no subset, an empty one, or uids that the run has not scored.
        RunError: a shard with kept pairs is gone or has changed since the run scored it.
    """
    facts = load_run(run)
    config = Config(**facts["config"])
    wanted = read_subset(subset)
    if not wanted:
        raise UserError(f"{subset} is empty: there is nothing to export")
    found = Selection(config.workers, find(config.corpus.shards), _kept(run, wanted))
    scored = Dataset(run, facts["features"], found.shards(), config.corpus.caption).accounting()
    if changed := found.kept.keys() - scored.keys():
        raise RunError(f"{min(changed)}: gone or changed since the run scored it; run again first")
    return found


def _kept(run: str, wanted: Counter[str]) -> dict[str, dict[int, Kept]]:
    table = read_scores(run, ["shard", "index", "uid"])
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
