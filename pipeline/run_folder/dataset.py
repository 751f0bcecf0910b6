"""What a run folder holds of a corpus or a target: features, accounting, quarantine, and where each is."""

import json
from collections.abc import Sequence

from pipeline import storage
from pipeline.corpus.shards import Shard
from pipeline.corpus.sidecar import Sidecars
from pipeline.run_folder.tables import Accounting


class Dataset:
    """The features of a corpus or a target in a run folder: what exists, and where.

    Args:
        folder: the run, or a target's folder in it.
        fingerprint: of the model, the way pairs are read and the limits; another one never mixes with it.
        shards: what the features are of.
        caption: `txt`, a preset, or the JSON field that holds the caption.
        prompts: of a classification dataset, the filled templates of each class.
        sidecars: what is beside the shards, if anything is asked of it.
    """

    def __init__(
        self,
        folder: str,
        fingerprint: str,
        shards: list[Shard],
        caption: str,
        prompts: Sequence[list[str]] = (),
        sidecars: Sidecars | None = None,
    ):
        self.folder, self.fingerprint, self.shards, self.caption = folder, fingerprint, shards, caption
        self.prompts, self.sidecars = prompts, sidecars

    @property
    def classes(self) -> list[str]:
        """A caption for each class, its first prompt; empty where there are no classes."""
        return [templates[0] for templates in self.prompts]

    def prompts_url(self) -> str:
        """Where the prompts' features are."""
        return storage.join(self.folder, "prompts", f"{self.fingerprint}.safetensors")

    def features_folder(self, shard: str) -> str:
        """Where a shard's parts are."""
        return storage.join(self.folder, "features", self.fingerprint, shard).rstrip("/")

    def accounting_url(self, shard: str) -> str:
        """The object whose existence says that a shard is done."""
        return storage.join(self.folder, "shards", self.fingerprint, f"{shard}.json")

    def quarantine_url(self, shard: str) -> str:
        """The table of a shard's unusable pairs: none, or empty once mended, where there are none."""
        return storage.join(self.folder, "quarantine", self.fingerprint, f"{shard}.parquet")

    def uids_from(self, shard: str) -> storage.Object | None:
        """The sidecar that a shard's uids are from; None where they are from its JSON."""
        return self.sidecars.found[shard] if self.sidecars and self.sidecars.uids else None

    def content(self) -> list[str]:
        """What the features are a function of: how they were made, every shard's bytes, and which pairs could not be used.

        The last is no function of the bytes where a device failed: `non_finite_features`.
        """
        done = self.accounting()
        digests = {name: [a.sha256, *(a.sidecar or [])[1:], a.unusable] for name, a in done.items()}
        return [self.fingerprint, *(" ".join([name, *digests[name]]) for name in sorted(done))]

    def accounting(self) -> dict[str, Accounting]:
        """Accounting of every shard that is done and has not changed since."""
        return {name: done for name, done in self._written().items() if done}

    def forget_changed(self) -> dict[str, Accounting]:
        """Remove the accounting of shards that have changed, before their parts are written anew; returns the rest."""
        written = self._written()
        for name, done in written.items():
            if not done:
                for part in self.parts(name):  # it may have fewer now
                    storage.delete(part)
                storage.delete(self.accounting_url(name))
        return {name: done for name, done in written.items() if done}

    def objects(self) -> dict[str, storage.Object]:
        """The accounting object of every shard that has one, whether or not the shard has changed since."""
        there = in_folder(storage.join(self.folder, "shards", self.fingerprint), ".json")
        return {shard.name: there[shard.name] for shard in self.shards if shard.name in there}

    def parts(self, shard: str) -> list[str]:
        """URLs of the parts that are there, whether or not the shard is done."""
        folder = f"/{self.fingerprint}/{shard}"
        listed = [item.url for item in storage.listing(self.features_folder(shard), ".parquet")]
        return [url for url in listed if url.rpartition("/")[0].endswith(folder)]  # not those of a shard <shard>/<more>

    def is_of(self, done: Accounting, shard: Shard) -> bool:
        """Whether accounting is of a shard as it is now."""
        uids = self.uids_from(shard.name)
        same = (done.size, done.etag) == (shard.source.size, shard.source.etag)
        return same and (uids is None or (done.sidecar or [""])[0] == uids.etag)

    def _written(self) -> dict[str, Accounting | None]:
        """For every shard with an accounting object: what it says, or None if the shard has changed since."""
        there = self.objects()
        shards = [shard for shard in self.shards if shard.name in there]
        return dict(zip((s.name for s in shards), storage.in_threads(self._read, shards), strict=True))

    def _read(self, shard: Shard) -> Accounting | None:
        done = Accounting(**json.loads(storage.read_bytes(self.accounting_url(shard.name))))
        return done if self.is_of(done, shard) else None


def in_folder(folder: str, suffix: str) -> dict[str, storage.Object]:
    """Every object below a run's folder `<kind>/<fingerprint>`, by the name of the shard that it is of."""
    below = "/" + "/".join(folder.rsplit("/", 2)[1:]) + "/"
    return {item.url.partition(below)[2].removesuffix(suffix): item for item in storage.listing(folder, suffix)}
