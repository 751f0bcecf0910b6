"""The export writer `webdataset`: tars, with the files that open_clip and img2dataset keep beside them."""

import io
import os
import shlex
import tarfile
from typing import Any

import pyarrow as pa

from pipeline import storage
from pipeline.results.export.contract import KeptPair, Writer
from pipeline.run_folder import tables

TRAINER = "open_clip_torch[training]>=3.3,<4"  # the extra brings a webdataset (0.2.86 at most) that its loader works with
LOADERS = 4  # the most loading processes of the printed command, as open_clip_train's own default


class WebDataset(Writer, name="webdataset"):
    """Tars numbered without gaps, with the bytes of every member as they were.

    A pair is called by the number of its shard and its number in it, such as `00003-000017`: a corpus may have keys that other
    readers take apart, and the same ones in several shards. `<shard>.parquet` says which pair that is: `key` is the new key,
    `corpus_key` the old one, and all columns of the score table follow. So it is a sidecar by img2dataset's rules.
    `<shard>_stats.json` says how many pairs a shard has (img2dataset), `sizes.json` says it of all shards (open_clip), and
    `meta.json` says where the export is from.
    """

    suffix = ".tar"

    def __init__(self, url: str, scratch: str):
        super().__init__(url, scratch)
        self._stem = url.removesuffix(self.suffix)
        self._keys: list[str] = []
        self._path = os.path.join(scratch, "shard.tar")
        self._tar = tarfile.open(self._path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115  (`close` closes it)

    def add(self, pair: KeptPair) -> None:
        """Append the pair's members."""
        key = f"{self._stem.rpartition('/')[2]}-{len(self._keys):06d}"
        for suffix, member in pair.members.items():
            header = tarfile.TarInfo(f"{key}.{suffix}")
            header.size = len(member.data)  # everything else stays at its default, so that bytes repeat
            self._tar.addfile(header, io.BytesIO(member.data))
        self._keys.append(key)

    def close(self) -> int:
        """Upload the tar, then its `_stats.json`."""
        self._tar.close()
        storage.upload(self._path, self.url)
        storage.write_bytes(f"{self._stem}_stats.json", tables.json_bytes({"successes": len(self._keys)}))
        return len(self._keys)

    def describe(self, rows: pa.Table) -> None:
        """Write `<shard>.parquet`."""
        renamed = rows.rename_columns({"key": "corpus_key"}).replace_schema_metadata(None)
        named = renamed.add_column(0, "key", pa.array(self._keys, pa.string()))
        storage.write_bytes(f"{self._stem}.parquet", tables.parquet_bytes(named))

    @classmethod
    def names(cls, shards: list[str]) -> list[str]:
        """Consecutive numbers: a trainer is given a range of them."""
        return [f"{i:05d}{cls.suffix}" for i in range(len(shards))]

    @classmethod
    def finish(cls, out: str, sizes: dict[str, int], origin: dict[str, Any]) -> str:
        """Write `sizes.json` and `meta.json`; return the commands that train open_clip on the shards."""
        pairs = sum(sizes.values())
        storage.write_bytes(storage.join(out, "sizes.json"), tables.json_bytes(sizes))
        meta = origin | {"pairs": pairs, "shards": len(sizes)}
        storage.write_bytes(storage.join(out, "meta.json"), tables.json_bytes(meta))
        batch = min(origin["batch_size"], pairs)
        options = {
            "model": origin["model"],
            "dataset-type": "webdataset",
            "train-data": _as_trainers_read(storage.join(storage.canonical(out), f"{{00000..{len(sizes) - 1:05d}}}.tar")),
            "train-num-samples": pairs,
            "batch-size": batch,
            "workers": _loaders(sorted(sizes.values()), batch),
        }
        given = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in options.items())
        given += " --siglip" if origin["loss"] == "siglip" else ""
        install = f"pip install {shlex.quote(TRAINER)}  # in an environment of its own: it needs webdataset 0.2.86 or older"
        return f"{install}\npython -m open_clip_train.main {given}"


def _as_trainers_read(shards: str) -> str:
    """A pattern of shards in a form that webdataset opens: it knows no s3://, and runs a command instead."""
    return f"pipe:aws s3 cp {shlex.quote(shards) if ' ' in shards else shards} -" if shards.startswith("s3://") else shards


def _loaders(sizes: list[int], batch: int) -> int:
    """How many processes may load: each gets as many shards, at random, and has to fill a batch, or it waits for ever.

    Args:
        sizes: pairs of each shard, ascending.
        batch: pairs in a batch, at most as many as there are.
    """
    fitting = (n for n in range(min(LOADERS, len(sizes)), 1, -1) if sum(sizes[: len(sizes) // n]) >= batch)
    return next(fitting, 1)
