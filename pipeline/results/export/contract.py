"""The contract of an export writer.

A writer makes one object of `out` from the kept pairs of one shard of the corpus. A new format is one subclass of `Writer`
with a `suffix`, `add` and `close`; docs/extending.md shows one. `ecif export --format my_package.captions:Captions` finds
it, given that every worker can import `my_package`.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import pyarrow as pa

from ecif.registry import Kind


class Member(NamedTuple):
    """One file of a pair."""

    name: str  # as in the corpus; a further copy of a pair has its own key in the place of the pair's
    data: bytes  # as in the corpus


class KeptPair(NamedTuple):
    """One pair as a writer gets it. A pair that the subset holds several times arrives several times in a row."""

    uid: str  # as in the score table
    key: str  # unique in the shard: the first copy has the pair's own, the next ones have `-1`, `-2`, ... after it
    members: dict[str, Member]  # by lower-case suffix (`jpg`, `txt`, `json`, ...), in the order of the corpus


class Writer(ABC, Kind):
    """Writes one object of an export. It is made on a worker, for one shard of the corpus, and is used once.

    Two writers may be at work on the same object at the same time, when a worker is thought to be lost. So an object has to
    appear whole or not at all (`storage.write_bytes`, `storage.upload`), and the same pairs have to give the same bytes.

    Args:
        url: of the object to write.
        scratch: a local folder that is removed when the writer is done or has failed.
    """

    suffix: ClassVar[str]  # of the objects' names, such as `.tar`; other objects of `out` with this suffix stop an export

    def __init__(self, url: str, scratch: str):
        self.url, self.scratch = url, scratch

    @abstractmethod
    def add(self, pair: KeptPair) -> None:
        """Take one pair. The pairs of a shard arrive in the order of the corpus."""

    @abstractmethod
    def close(self) -> int:
        """Write the object and return how many pairs are in it. An export fails if that is not how many were kept."""

    def describe(self, rows: pa.Table) -> None:
        """Write which pairs are in the object, beside it. Called after `close`; by default it does nothing.

        Args:
            rows: of the score table, with shard, index, key, uid and every column; one for each pair in the order of `add`.
        """

    @classmethod
    def names(cls, shards: list[str]) -> list[str]:
        """The name below `out` of the object for each shard, by default the shard's own name.

        Args:
            shards: names of all shards of the corpus with a kept pair, sorted.
        """
        return [f"{shard}{cls.suffix}" for shard in shards]

    @classmethod
    def finish(cls, out: str, sizes: dict[str, int], origin: dict[str, Any]) -> str:
        """Write what describes the export as a whole. Called once, on the driver, after every object is written.

        Args:
            out: folder of the export.
            sizes: number of pairs of each object, by its name below `out`.
            origin: `run` and `subset`, as the user named them; `model`, `loss` and `batch_size` of the run's
                configuration.

        Returns:
            A command that uses the export, to show to the user; empty by default.
        """
        return ""
