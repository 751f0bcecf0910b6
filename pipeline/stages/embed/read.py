"""The reading half of stage `embed`: a shard in, its decoded parts out."""

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch

from ecif import towers
from pipeline import storage
from pipeline.config import Embed
from pipeline.corpus import sidecar
from pipeline.corpus.pairs import Pair, Quarantined, read_pair
from pipeline.corpus.tar import Contents, groups
from pipeline.errors import RunError
from pipeline.run_folder.tables import Accounting


class ReadParts:
    """One shard in, its decoded parts out, a fixed number of consecutive keys each; the last one carries the accounting."""

    def __init__(self, limits: Embed, preprocess: dict[str, Any]):
        self.limits, self.preprocess = limits, preprocess

    def __call__(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Rows for `EmbedPart`.

        A read that fails is begun anew from the start of the shard. What was given away before is not given again: the
        object is the one that was listed, or the attempt fails too, and its parts are a function of its bytes.

        Raises:
            RunError: every attempt failed.
        """
        torch.set_num_threads(1)
        given = 0
        for attempt in range(storage.ATTEMPTS):
            try:
                for part in islice(self._parts(row), given, None):
                    yield part
                    given += 1
                return
            except OSError as error:
                failed = f"{row['shard']}: can't be read: {type(error).__name__}: {' '.join(str(error).split())}"
            if attempt + 1 < storage.ATTEMPTS:
                storage.pause(attempt)
        raise RunError(f"{failed} ({storage.ATTEMPTS} attempts; the same command takes up what is not done)")

    def _parts(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        source = storage.Object(row["url"], row["size"], row["etag"])
        resize = towers.resize_transform(self.preprocess)
        contents, pairs, in_pairs, part = Contents(), 0, 0, 0
        good: list[Pair] = []
        bad: list[Quarantined] = []
        position, key, joined = 0, "", False
        uids, of_uids = _uids(row["sidecar"])
        classes: list[str] = json.loads(row["classes"])
        with storage.local_copy(source) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
            file.seek(0)
            for group in groups(file, contents):
                if pairs and pairs % self.limits.part_size == 0:
                    at = min(m.offset for m in group.members.values())
                    yield _part(row, part, good, bad, at - position)
                    position, part, good, bad = at, part + 1, [], []
                pairs += 1
                in_pairs += group.count
                key, joined = group.key, joined or (uids is not None and group.key in uids)
                pair = read_pair(file, group, row["shard"], row["caption"], self.limits, resize, classes, uids)
                if contents.broken:  # the last group before the break: nobody can say that it is all there
                    pair = Quarantined(group.index, pair.key, pair.uid, "truncated_shard", contents.broken)
                (good if isinstance(pair, Pair) else bad).append(pair)  # type: ignore[arg-type]
            storage.expect_unchanged(source)
        if uids is not None and pairs and not joined:
            raise RunError(f"{row['shard']}: no key of its .parquet is in the tar, which has {key!r} last")
        if contents.broken and not pairs:  # not a tar at all: at least one pair is missing
            pairs = 1
            bad.append(Quarantined(0, "", "", "truncated_shard", contents.broken))
        accounting = Accounting(
            shard=row["shard"],
            size=source.size,
            etag=source.etag,
            sha256=digest,
            members=contents.members,
            in_pairs=in_pairs,
            ignored=contents.ignored,
            pairs=pairs,
            embedded=0,
            quarantined={},
            parts=part + 1,
            broken=contents.broken,
            successes=sidecar.successes(source),
            sidecar=of_uids,
        )
        yield _part(row, part, good, bad, source.size - position, accounting)


def _uids(source: str) -> tuple[dict[str, str] | None, list[str] | None]:
    """The uids of a sidecar by key, and which sidecar that was: its etag and sha256; (None, None) if there is none to ask."""
    place = json.loads(source)
    if place is None:
        return None, None
    listed = storage.Object(*place)
    with storage.local_copy(listed) as file:
        data = file.read()
    return sidecar.read_uids(data, listed.url), [listed.etag, hashlib.sha256(data).hexdigest()]


def _part(
    source: dict[str, Any], part: int, good: list[Pair], bad: list[Quarantined], size: int, accounting: Accounting | None = None
) -> dict[str, Any]:
    """A row for the actors. Plain bytes: a part's shape differs from the next one's."""
    return {
        "dataset": source["dataset"],
        "shard": source["shard"],
        "part": part,
        "bytes": size,
        "pixels": b"".join(p.pixels.tobytes() for p in good),
        "shape": list(good[0].pixels.shape) if good else [0, 0, 0],
        "pairs": json.dumps([[p.index, p.key, p.uid, p.caption, p.label] for p in good]),
        "labelled": source["classes"] != "[]",
        "quarantined": json.dumps([vars(q) | {"stage": "read"} for q in bad]),
        "accounting": json.dumps(accounting._asdict()) if accounting else "",
    }
