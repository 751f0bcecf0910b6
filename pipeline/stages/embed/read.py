"""The reading half of stage `embed`: a shard in, its decoded parts out."""

import hashlib
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.corpus import sidecar
from pipeline.corpus.captions import find_pairs
from pipeline.corpus.images import Resize
from pipeline.corpus.pairs import Pair, Quarantined, ReadingRules, read_pair
from pipeline.corpus.remarks import Seen, remarks
from pipeline.corpus.tar import Contents, read_groups
from pipeline.corpus.uids import UidCounter
from pipeline.errors import RunError
from pipeline.run_folder.tables import Accounting
from pipeline.sections import Embed, Model
from pipeline.stages.embed.rows import Part, Refused, ToRead


class ReadParts:
    """Decodes a shard into parts of a fixed number of consecutive keys. The last part carries the accounting.

    Args:
        limits: how images are read.
        preprocess: of the model.
        model: to make tokens with its tokenizer. None leaves them to the actors: a reader would take seconds to import it.
    """

    def __init__(self, limits: Embed, preprocess: dict[str, Any], model: Model | None = None):
        self.limits, self.preprocess, self.model = limits, preprocess, model

    def __call__(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield rows of `Part` for a row of `ToRead`.

        A failed read starts again at the beginning of the shard, and parts that were yielded before are not yielded again. All
        attempts give the same parts: these are a function of the bytes, and an attempt fails if the object has changed.

        Raises:
            RunError: every attempt failed.
        """
        asked, given = ToRead.from_row(row), 0
        for attempt in range(storage.ATTEMPTS):
            try:
                started = time.perf_counter()
                for part in islice(self._parts(asked), given, None):
                    tokens = self._tokens(part)
                    yield part._replace(tokens=tokens, seconds=time.perf_counter() - started).to_row()
                    given += 1
                    started = time.perf_counter()
                return
            except OSError as error:
                failed = f"{asked.shard}: can't be read: {type(error).__name__}: {' '.join(str(error).split())}"
            if attempt + 1 < storage.ATTEMPTS:
                storage.pause(attempt)
        raise RunError(f"{failed} ({storage.ATTEMPTS} attempts; the same command takes up what is not done)")

    def _tokens(self, part: Part) -> NDArray[np.int32] | None:
        if self.model is None:
            return None
        from pipeline.workers.model import tokens  # takes seconds

        return tokens(self.model, [pair.caption for pair in part.pairs])

    def _parts(self, asked: ToRead) -> Iterator[Part]:
        source = asked.source
        resize = Resize(self.preprocess, self.limits.resize)
        contents, pairs, further, in_pairs, number = Contents(), 0, 0, 0, 0
        good: list[Pair] = []
        bad: list[Refused] = []
        position, key, joined = 0, "", False
        uids, of_uids = _uids(asked.uids)
        rules, seen = ReadingRules(asked.shard, asked.reading, self.limits, resize, asked.classes, uids), Seen()
        replaced = UidCounter(asked.shard)

        def part(size: int, accounting: Accounting | None = None) -> Part:
            return Part(asked.dataset, asked.shard, number, size, good, bad, bool(asked.classes), accounting)

        with storage.local_copy(source) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
            file.seek(0)
            groups = read_groups(file, contents, asked.reading.key)
            for group in find_pairs(file, groups, asked.reading, self.limits):
                if pairs and pairs % self.limits.part_size == 0:
                    yield part(group.start - position)
                    position, number, good, bad = group.start, number + 1, [], []
                pairs += 1
                further += group.caption > 0
                in_pairs += group.count
                key, joined = group.key, joined or (uids is not None and group.key in uids)
                pair = read_pair(file, group, rules)
                if group.broken:  # the group at which the tar breaks off may be incomplete
                    pair = Quarantined(group.index, pair.key, pair.uid, "truncated_shard", group.broken)
                seen.add(pair)
                if isinstance(pair, Pair):
                    good.append(pair)
                    replaced.add(pair.key, pair.replaced)
                else:
                    bad.append(Refused("read", pair))
            storage.expect_unchanged(source)
        if uids is not None and pairs and not joined:
            raise RunError(f"{asked.shard}: no key of its .parquet is in the tar, which has {key!r} last")
        if contents.broken and not pairs:  # not a tar at all: count one pair, so that the shard is not taken for an empty one
            pairs = 1
            bad.append(Refused("read", Quarantined(0, "", "", "truncated_shard", contents.broken)))
        successes, of_stats = sidecar.successes(source)
        accounting = Accounting(
            shard=asked.shard,
            size=source.size,
            etag=source.etag,
            sha256=digest,
            members=contents.members,
            in_pairs=in_pairs,
            ignored=contents.ignored,
            pairs=pairs,
            embedded=0,
            quarantined={},
            parts=number + 1,
            broken=contents.broken,
            successes=None if successes is None else successes + further,  # it counts images
            sidecar=of_uids,
            swallowed=contents.swallowed,
            remarks=remarks(contents, seen, asked.reading, of_stats) or None,
            without_uid=replaced.without,
            other_uid=replaced.other,
            other_uid_example=replaced.example,
        )
        yield part(source.size - position, accounting)


def _uids(listed: storage.Object | None) -> tuple[dict[str, str | None] | None, list[str] | None]:
    """The uids of a sidecar by key, and the etag and sha256 of the sidecar; (None, None) if uids are from the JSON."""
    if listed is None:
        return None, None
    with storage.local_copy(listed) as file:
        data = file.read()
    return sidecar.read_uids(data, listed.url), [listed.etag, hashlib.sha256(data).hexdigest()]
