"""How a corpus differs from the last generation, from a listing of its shards and the names of the generation's files."""

from typing import NamedTuple

from pipeline.run_folder.artifacts import fingerprint
from pipeline.run_folder.dataset import Dataset
from pipeline.run_folder.generations import Generation


class Changes(NamedTuple):
    """How the shards of a corpus differ from those of the last generation."""

    new: list[str]
    changed: list[str]
    gone: list[str]
    same: list[str]


def sources_of(corpus: Dataset) -> dict[str, str]:
    """Of each shard, a fingerprint of what it and its sidecar are, as a listing shows them."""
    found = corpus.sidecars.found if corpus.sidecars else {}
    beside = {shard: [item.size, item.etag] for shard, item in found.items()}
    return {s.name: fingerprint(s.source.size, s.source.etag, beside.get(s.name)) for s in corpus.shards}


def changes_since(last: Generation | None, sources: dict[str, str]) -> Changes:
    """How a corpus with these sources differs from a generation. Without one everything is new."""
    before = {shard: file.source for shard, file in last.files.items()} | last.record["empty"] if last else {}
    found = Changes([], [], sorted(before.keys() - sources.keys()), [])
    for shard, source in sources.items():
        (found.new if shard not in before else found.same if before[shard] == source else found.changed).append(shard)
    return found
