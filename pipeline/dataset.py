"""What a run folder holds of a corpus or a target: features, accounting, quarantine, and where each is."""

import json
from concurrent.futures import ThreadPoolExecutor

from pipeline import storage
from pipeline.shards import Shard
from pipeline.tables import Accounting

READERS = 16


class Dataset:
    """The features of a corpus or a target in a run folder: what exists, and where.

    Args:
        folder: the run, or a target's folder in it.
        fingerprint: of the model, the way pairs are read and the limits; another one never mixes with it.
        shards: what the features are of.
        caption: `txt`, or the JSON field that holds the caption.
    """

    def __init__(self, folder: str, fingerprint: str, shards: list[Shard], caption: str):
        self.folder, self.fingerprint, self.shards, self.caption = folder, fingerprint, shards, caption

    def features_folder(self, shard: str) -> str:
        """Where a shard's parts are."""
        return storage.join(self.folder, "features", self.fingerprint, shard).rstrip("/")

    def accounting_url(self, shard: str) -> str:
        """The object whose existence says that a shard is done."""
        return storage.join(self.folder, "shards", self.fingerprint, f"{shard}.json")

    def quarantine_url(self, shard: str) -> str:
        """The table of a shard's unusable pairs: none, or empty once mended, where there are none."""
        return storage.join(self.folder, "quarantine", self.fingerprint, f"{shard}.parquet")

    def content(self) -> list[str]:
        """What the features are a function of: how they were made, and every shard's bytes."""
        done = self.accounting()
        return [self.fingerprint, *(f"{name} {done[name].sha256}" for name in sorted(done))]

    def accounting(self) -> dict[str, Accounting]:
        """Accounting of every shard that is done and has not changed since."""
        return {name: done for name, done in self._written().items() if done}

    def forget_changed(self) -> dict[str, Accounting]:
        """Remove the accounting of shards that have changed, before their parts are written anew; returns the rest."""
        written = self._written()
        for name, done in written.items():
            if not done:
                storage.delete(self.accounting_url(name))
        return {name: done for name, done in written.items() if done}

    def _written(self) -> dict[str, Accounting | None]:
        """For every shard with an accounting object: what it says, or None if the shard has changed since."""
        prefix = storage.join(self.folder, "shards", self.fingerprint)
        there = {item.url.partition(f"/shards/{self.fingerprint}/")[2] for item in storage.listing(prefix, ".json")}
        shards = [shard for shard in self.shards if f"{shard.name}.json" in there]
        with ThreadPoolExecutor(READERS) as pool:
            return dict(zip((s.name for s in shards), pool.map(self._read, shards), strict=True))

    def _read(self, shard: Shard) -> Accounting | None:
        done = Accounting(**json.loads(storage.read_bytes(self.accounting_url(shard.name))))
        return done if (done.size, done.etag) == (shard.source.size, shard.source.etag) else None
