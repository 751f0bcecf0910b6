"""The export writer `webdataset`: tars, with the files that open_clip and img2dataset keep beside them."""

import io
import os
import tarfile

from pipeline import storage
from pipeline.results.export.contract import KeptPair, Writer
from pipeline.run_folder import tables


class WebDataset(Writer, name="webdataset"):
    """Tars numbered without gaps, members copied byte for byte under their own keys.

    `<shard>_stats.json` says how many pairs a shard has (img2dataset), `sizes.json` says it of all shards (open_clip), and
    `meta.json` says where the export is from.
    """

    suffix = ".tar"

    def __init__(self, url: str, scratch: str):
        super().__init__(url, scratch)
        self._pairs = 0
        self._path = os.path.join(scratch, "shard.tar")
        self._tar = tarfile.open(self._path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115  (`close` closes it)

    def add(self, pair: KeptPair) -> None:
        """Append the pair's members."""
        for member in pair.members.values():
            header = tarfile.TarInfo(member.name)
            header.size = len(member.data)  # everything else stays at its default, so that bytes repeat
            self._tar.addfile(header, io.BytesIO(member.data))
        self._pairs += 1

    def close(self) -> int:
        """Upload the tar, then its `_stats.json`."""
        self._tar.close()
        storage.upload(self._path, self.url)
        stats = f"{self.url.removesuffix(self.suffix)}_stats.json"
        storage.write_bytes(stats, tables.json_bytes({"successes": self._pairs}))
        return self._pairs

    @classmethod
    def names(cls, shards: list[str]) -> list[str]:
        """Consecutive numbers: a trainer is given a range of them."""
        return [f"{i:05d}{cls.suffix}" for i in range(len(shards))]

    @classmethod
    def finish(cls, out: str, sizes: dict[str, int], origin: dict[str, str]) -> str:
        """Write `sizes.json` and `meta.json`; return the command that trains open_clip on the shards."""
        pairs = sum(sizes.values())
        storage.write_bytes(storage.join(out, "sizes.json"), tables.json_bytes(sizes))
        meta = origin | {"pairs": pairs, "shards": len(sizes)}
        storage.write_bytes(storage.join(out, "meta.json"), tables.json_bytes(meta))
        shards = f"{out}/{{00000..{len(sizes) - 1:05d}}}.tar"
        data = f"--dataset-type webdataset --train-data '{shards}' --train-num-samples {pairs}"
        return f"python -m open_clip_train.main {data}"
