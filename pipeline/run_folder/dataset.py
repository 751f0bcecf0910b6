"""Features, accounting and quarantine of a corpus or a target in a run folder, and where each of them is."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from pipeline import storage
from pipeline.corpus.shards import Shard
from pipeline.corpus.sidecar import Sidecars
from pipeline.run_folder import compacted
from pipeline.run_folder.tables import Accounting, json_bytes
from pipeline.sections import Reading


class Places:
    """Where the objects of a corpus or a target are. Workers get this, and not what the driver knows about every shard.

    Args:
        folder: the run, or a target's folder in it.
        fingerprint: of the model, the rules of reading and the limits. Objects of two fingerprints never mix.
    """

    def __init__(self, folder: str, fingerprint: str):
        self.folder, self.fingerprint = folder, fingerprint
        self.batched = False  # whether batches are formed within its shards, as those of a corpus are

    def places(self) -> "Places":
        """These places alone, without the shards of a dataset."""
        alone = Places(self.folder, self.fingerprint)
        alone.batched = self.batched
        return alone

    def prompts_url(self) -> str:
        """URL of the features of the prompts."""
        return storage.join(self.folder, "prompts", f"{self.fingerprint}.safetensors")

    def features_folder(self, shard: str) -> str:
        """Folder of the parts of a shard."""
        return storage.join(self.folder, "features", self.fingerprint, shard).rstrip("/")

    def accounting_url(self, shard: str) -> str:
        """The object whose existence says that a shard is done."""
        return storage.join(self.folder, "shards", self.fingerprint, f"{shard}.json")

    def compacted_url(self) -> str:
        """The accounting of all shards in one object, see `run_folder.compacted`."""
        return storage.join(self.folder, "accounting", f"{self.fingerprint}.parquet")

    def quarantine_url(self, shard: str) -> str:
        """URL of the table of a shard's unusable pairs.

        A shard without such pairs has no table. If it had some before it was mended, its table is empty.
        """
        return storage.join(self.folder, "quarantine", self.fingerprint, f"{shard}.parquet")

    def parts(self, shard: str) -> list[str]:
        """URLs of the parts that exist, whether or not the shard is done."""
        folder = f"/{self.fingerprint}/{shard}"
        listed = [item.url for item in storage.listing(self.features_folder(shard), ".parquet")]
        return [url for url in listed if url.rpartition("/")[0].endswith(folder)]  # not those of a shard <shard>/<more>

    def write_accounting(self, done: Accounting) -> None:
        """Write the accounting of a shard. It has to be the last object of the shard: it says that the shard is done."""
        storage.write_bytes(self.accounting_url(done.shard), json_bytes(done._asdict()))


class Dataset(Places):
    """The features of a corpus or a target in a run folder: what exists, and where.

    Args:
        folder, fingerprint: see `Places`.
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
        super().__init__(folder, fingerprint)
        self.shards, self.reading = shards, reading
        self.prompts, self.sidecars = prompts, sidecars
        self.part = False  # whether it has a few shards of many, see `of`
        self.others = 0  # usable pairs of the shards that a part leaves out
        self._done: dict[str, Accounting] | None = None  # of every shard that is done
        self._read = _Read({}, True)

    def __getstate__(self) -> dict[str, Any]:
        """The state that workers get: without the accounting of every shard, which they do not need."""
        return self.__dict__ | {"_done": None, "_read": _Read({}, True)}

    @property
    def classes(self) -> list[str]:
        """A caption for each class: its first prompt. Empty for a dataset without classes."""
        return [templates[0] for templates in self.prompts]

    def of(self, shards: list[str], few: bool = True, others: int = 0) -> "Dataset":
        """The part of this dataset with some shards.

        Args:
            shards: their names.
            few: what they have written is asked for shard by shard, and not listed.
            others: usable pairs of all other shards, as far as that matters.
        """
        names = {*shards}
        some = [shard for shard in self.shards if shard.name in names]
        part = Dataset(self.folder, self.fingerprint, some, self.reading, self.prompts, self.sidecars)
        part.batched, part.part, part.others = self.batched, few, others
        return part

    def uids_from(self, shard: str) -> storage.Object | None:
        """The sidecar that holds a shard's uids; None if they are in the JSON of its pairs."""
        return self.sidecars.found[shard] if self.sidecars and self.sidecars.uids else None

    def accounting(self) -> dict[str, Accounting]:
        """Accounting of every shard that is done and has not changed since, in the order of the shards.

        It is read once; `record` and `remember` keep it up to date.
        """
        done = self._known()
        return {shard.name: done[shard.name] for shard in self.shards if shard.name in done}

    def record(self, done: Accounting) -> None:
        """Write the accounting of a shard, and remember it."""
        self.write_accounting(done)
        self.remember(done)

    def remember(self, done: Accounting) -> None:
        """Take in the accounting of a shard that has just been written."""
        self._known()[done.shard] = done
        self._read.listed.pop(done.shard, None)  # it is another object now

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

    def compact(self) -> None:
        """Write what the accounting of all shards says into one object, unless it is there, or this is a part of the shards."""
        done = self._known()
        new = done.keys() - self._read.listed.keys()
        if self.part or (self._read.complete and not new):
            return
        now = self._list() if new else {}
        listed = self._read.listed | {name: now[name] for name in new if name in now}
        compacted.write(self.compacted_url(), listed, {name: json.dumps(one._asdict()) for name, one in done.items()})
        self._read = _Read(listed, True)

    def objects(self) -> dict[str, storage.Object]:
        """The accounting object of every shard that has one, as it was listed when the accounting was read.

        The shard may have changed since its accounting was written.
        """
        self._known()
        return self._read.listed

    def _list(self) -> dict[str, storage.Object]:
        if self.part:
            names = [shard.name for shard in self.shards]
            found = storage.in_threads(storage.described, map(self.accounting_url, names))
            return {name: item for name, item in zip(names, found, strict=True) if item}
        there = in_folder(storage.join(self.folder, "shards", self.fingerprint), ".json")
        return {shard.name: there[shard.name] for shard in self.shards if shard.name in there}

    def _known(self) -> dict[str, Accounting]:
        if self._done is None:
            self._done = {name: done for name, done in self._written().items() if done}
        return self._done

    def _written(self) -> dict[str, Accounting | None]:
        """The accounting of every shard that has one; None for a shard that has changed since."""
        listed = self._list()
        compact = None if self.part else self.compacted_url()
        said = compacted.read(compact, listed, lambda item: storage.read_bytes(item.url).decode())
        self._read = _Read(listed, said.complete)
        shards = {shard.name: shard for shard in self.shards}
        found = {name: Accounting(**json.loads(text)) for name, text in said.texts.items()}
        return {name: done if is_of(done, shards[name], self.uids_from(name)) else None for name, done in found.items()}


class _Read(NamedTuple):
    """The accounting objects that were read."""

    listed: dict[str, storage.Object]  # by shard, as they were then
    complete: bool  # whether the compacted object said the same


def is_of(done: Accounting, shard: Shard, uids: storage.Object | None) -> bool:
    """Whether an accounting was written for the content that a shard has now, and for the sidecar that holds its uids."""
    same = (done.size, done.etag) == (shard.source.size, shard.source.etag)
    return same and (uids is None or (done.sidecar or [""])[0] == uids.etag)


def in_folder(folder: str, suffix: str) -> dict[str, storage.Object]:
    """Every object below a folder `<kind>/<fingerprint>` of a run, by the name of its shard."""
    below = "/" + "/".join(folder.rsplit("/", 2)[1:]) + "/"
    return {item.url.partition(below)[2].removesuffix(suffix): item for item in storage.listing(folder, suffix)}
