"""Lines about shards that are odd: the first few of each kind by name, the others by number."""

from collections import Counter

from pipeline.console import say
from pipeline.run_folder.dataset import Dataset
from pipeline.run_folder.tables import Accounting

NAMED = 3  # shards of a dataset that have a line of their own, for each kind of oddity


class Oddities:
    """Says what is odd about the shards of a dataset."""

    def __init__(self, dataset: Dataset):
        self._urls = {shard.name: shard.source.url for shard in dataset.shards}
        self._folder, self._count = dataset.folder, Counter[str]()

    def note(self, shard: Accounting) -> None:
        """Say what is odd about a finished shard."""
        for kind, remark in (shard.remarks or {}).items():
            self._count[kind] += 1
            if self._count[kind] <= NAMED:
                say(f"{self._urls.get(shard.shard, shard.shard)}: {remark}")

    def settle(self) -> None:
        """Say how many shards were not named."""
        for kind, count in self._count.items():
            if count > NAMED:
                say(f"{count - NAMED} more shards are odd in that way ({kind}): `remarks` in {self._folder}/shards has them")
