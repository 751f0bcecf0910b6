"""A look into the beginnings of a few shards, before anything is embedded: how large shards are, and what their uids are."""

import io
from contextlib import suppress
from typing import NamedTuple

from pipeline import storage
from pipeline.corpus import sidecar
from pipeline.corpus.captions import read_fields
from pipeline.corpus.reasons import Refused
from pipeline.corpus.remarks import of_layout
from pipeline.corpus.shards import Shard
from pipeline.corpus.tar import Contents, read_groups
from pipeline.corpus.uids import UidCounter, Uids, pack, repeats, uid_of, unpack
from pipeline.errors import RunError
from pipeline.sections import Embed

LOOKED_AT = 8  # shards
HEAD = 4 << 20  # bytes of each
SURELY = 0.75  # of a batch: an estimate below that says that a shard is smaller
SMALL = "their pairs meet fewer others, and so have lower losses: compare them with each other only, or write larger shards"


class Glance(NamedTuple):
    """What a few shards tell about all of them."""

    shards: list[Shard]  # all
    single: str  # a shard of one pair, if every shard that was looked at is one; else empty
    pairs_a_byte: float
    uids: Uids  # of the pairs that were looked at
    dots: str  # what dots in the names of the first shard do to its keys; empty if nothing

    @property
    def impossible(self) -> str:
        """Why no run of these shards is possible; empty if one is."""
        if not self.single or sum(map(self._pairs, self.shards)) >= 1.5 * len(self.shards):
            return ""
        if self.dots:
            return f"corpus.shards: one pair a shard, such as {self.single}: {self.dots}"
        return (
            f"corpus.shards: one pair a shard, such as {self.single}: a pair is contrasted with the others of its shard; "
            "write shards of some thousand pairs each"
        )

    def said(self, batch_size: int) -> list[str]:
        """What a user has to know about the shards, a line each."""
        small = [shard for shard in self.shards if shard.source.size and self._pairs(shard) < SURELY * batch_size]
        lines = self.uids.said("pairs looked at")
        if small and not self.impossible:
            least = min(small, key=lambda shard: shard.source.size)
            lines.append(
                f"about {len(small)} of {len(self.shards)} shards hold fewer pairs than batch_size {batch_size}, such as "
                f"{least.name} with ~{max(1, round(self._pairs(least)))}: {SMALL}"
            )
        return lines

    def _pairs(self, shard: Shard) -> float:
        return shard.source.size * self.pairs_a_byte


def glance(shards: list[Shard], key_rule: str, sidecars: sidecar.Sidecars | None, limits: Embed) -> Glance:
    """Look into some shards, spread over the corpus. What can't be read is passed over: reading it says what is wrong.

    Args:
        shards: of the corpus.
        key_rule: where their keys end, see `Pairs.key`.
        sidecars: beside them; None if nothing is read from there.
        limits: of what is read.
    """
    some = [shards[i * len(shards) // LOOKED_AT] for i in range(LOOKED_AT)] if len(shards) > LOOKED_AT else shards
    seen = list(storage.in_threads(lambda shard: _look(shard, key_rule, sidecars, limits), some))
    pairs, counted = sum(len(s.uids) for s in seen), sum(s.bytes for s in seen)
    single = some[0].name if all(len(s.uids) <= 1 for s in seen) and pairs else ""
    again = unpack(repeats(pack([uid for s in seen for uid in s.uids])))
    uids = Uids(
        pairs,
        sum(s.counter.without for s in seen),
        sum(s.counter.other for s in seen),
        next((s.counter.example for s in seen if s.counter.example), ""),
        len(again),
        again[0] if again else "",
    )
    return Glance(shards, single, pairs / max(1, counted), uids, seen[0].dots)


class _Seen(NamedTuple):
    """The beginning of a shard."""

    uids: list[str]  # of its pairs
    bytes: int  # that hold them
    counter: UidCounter
    dots: str = ""  # see `Glance`


def _look(shard: Shard, key_rule: str, sidecars: sidecar.Sidecars | None, limits: Embed) -> _Seen:
    seen = _Seen([], shard.source.size, UidCounter(shard.name))
    with suppress(OSError, RunError):
        data = storage.read_start(shard.source.url, HEAD) if shard.source.size else b""
        beside = sidecars.found.get(shard.name) if sidecars and sidecars.uids else None
        known = sidecar.read_uids(storage.read_bytes(beside.url), beside.url) if beside else None
        file = io.BytesIO(data)
        contents = Contents()
        groups = list(read_groups(file, contents, key_rule))
        seen = seen._replace(dots=of_layout(contents).get("dots", ""))
        if len(data) < shard.source.size and len(groups) > 1:  # the last pair may be cut
            seen = seen._replace(bytes=groups.pop().start)
        for group in groups:
            given = known.get(group.key) if known is not None else None
            if known is None:
                with suppress(Refused):
                    given = read_fields(file, group, limits).get("uid")
            uid = uid_of(shard.name, group.key, given)
            seen.uids.append(uid.text)
            seen.counter.add(group.key, uid.replaced)
    return seen
