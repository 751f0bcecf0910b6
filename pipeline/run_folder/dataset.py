"""Features, accounting and quarantine of a corpus or a target in a run folder, and where each of them is."""

import json
from collections.abc import Sequence
from typing import Any

from pipeline import storage
from pipeline.corpus.shards import Shard
from pipeline.corpus.sidecar import Sidecars
from pipeline.run_folder.tables import Accounting, json_bytes
from pipeline.sections import Reading


class Dataset:
    """The features of a corpus or a target in a run folder: what exists, and where.

    Args:
        folder: the run, or a target's folder in it.
        fingerprint: of the model, the rules of reading and the limits. Objects of two fingerprints never mix.
        shards: the shards that features are computed from.
        reading: how members of the shards become pairs with captions.
        prompts: of a classification dataset, the filled templates of each class.
        sidecars: of the shards; None if nothing is read from them.
    """

    def __init__(
        self,
        folder: str,
        fingerprint: str,
        shards: list[Shard],
        reading: Reading,
        prompts: Sequence[list[str]] = (),
        sidecars: Sidecars | None = None,
    ):
        self.folder, self.fingerprint, self.shards, self.reading = folder, fingerprint, shards, reading
        self.prompts, self.sidecars = prompts, sidecars
        self.batched = False  # whether batches are formed within its shards, as those of a corpus are
        self._done: dict[str, Accounting] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """The state that workers get: without the accounting of every shard, which they do not need."""
        return self.__dict__ | {"_done": None}

    @property
    def classes(self) -> list[str]:
        """A caption for each class: its first prompt. Empty for a dataset without classes."""
        return [templates[0] for templates in self.prompts]

    def prompts_url(self) -> str:
        """URL of the features of the prompts."""
        return storage.join(self.folder, "prompts", f"{self.fingerprint}.safetensors")

    def features_folder(self, shard: str) -> str:
        """Folder of the parts of a shard."""
        return storage.join(self.folder, "features", self.fingerprint, shard).rstrip("/")

    def accounting_url(self, shard: str) -> str:
        """The object whose existence says that a shard is done."""
        return storage.join(self.folder, "shards", self.fingerprint, f"{shard}.json")

    def quarantine_url(self, shard: str) -> str:
        """URL of the table of a shard's unusable pairs.

        A shard without such pairs has no table. If it had some before it was mended, its table is empty.
        """
        return storage.join(self.folder, "quarantine", self.fingerprint, f"{shard}.parquet")

    def uids_from(self, shard: str) -> storage.Object | None:
        """The sidecar that holds a shard's uids; None if they are in the JSON of its pairs."""
        return self.sidecars.found[shard] if self.sidecars and self.sidecars.uids else None

    def accounting(self) -> dict[str, Accounting]:
        """Accounting of every shard that is done and has not changed since, in the order of the shards.

        It is read once; `record` keeps it up to date.
        """
        if self._done is None:
            self._done = {name: done for name, done in self._written().items() if done}
        return {shard.name: self._done[shard.name] for shard in self.shards if shard.name in self._done}

    def record(self, done: Accounting) -> None:
        """Write the accounting of a shard. It has to be the last object of the shard: it says that the shard is done."""
        self._done = self.accounting() | {done.shard: done}
        storage.write_bytes(self.accounting_url(done.shard), json_bytes(done._asdict()))

    def forget_changed(self) -> dict[str, Accounting]:
        """Remove the parts and the accounting of shards that have changed. Returns the accounting of all others."""
        written = self._written()
        for name, done in written.items():
            if not done:
                for part in self.parts(name):  # the changed shard may have fewer parts
                    storage.delete(part)
                storage.delete(self.accounting_url(name))
        self._done = {name: done for name, done in written.items() if done}
        return dict(self._done)

    def objects(self) -> dict[str, storage.Object]:
        """The accounting object of every shard that has one, whether or not the shard has changed since."""
        there = in_folder(storage.join(self.folder, "shards", self.fingerprint), ".json")
        return {shard.name: there[shard.name] for shard in self.shards if shard.name in there}

    def parts(self, shard: str) -> list[str]:
        """URLs of the parts that exist, whether or not the shard is done."""
        folder = f"/{self.fingerprint}/{shard}"
        listed = [item.url for item in storage.listing(self.features_folder(shard), ".parquet")]
        return [url for url in listed if url.rpartition("/")[0].endswith(folder)]  # not those of a shard <shard>/<more>

    def is_of(self, done: Accounting, shard: Shard) -> bool:
        """Whether an accounting was written for the content that a shard has now."""
        uids = self.uids_from(shard.name)
        same = (done.size, done.etag) == (shard.source.size, shard.source.etag)
        return same and (uids is None or (done.sidecar or [""])[0] == uids.etag)

    def _written(self) -> dict[str, Accounting | None]:
        """The accounting of every shard that has one; None for a shard that has changed since."""
        there = self.objects()
        shards = [shard for shard in self.shards if shard.name in there]
        return dict(zip((s.name for s in shards), storage.in_threads(self._read, shards), strict=True))

    def _read(self, shard: Shard) -> Accounting | None:
        done = Accounting(**json.loads(storage.read_bytes(self.accounting_url(shard.name))))
        return done if self.is_of(done, shard) else None


def in_folder(folder: str, suffix: str) -> dict[str, storage.Object]:
    """Every object below a folder `<kind>/<fingerprint>` of a run, by the name of its shard."""
    below = "/" + "/".join(folder.rsplit("/", 2)[1:]) + "/"
    return {item.url.partition(below)[2].removesuffix(suffix): item for item in storage.listing(folder, suffix)}
