"""A corpus that grows, changes and shrinks, and a run folder with nights."""

import shutil
from pathlib import Path

from deltalake import DeltaTable

from pipeline.night import night
from tests.support.corpora import EMBEDDED
from tests.support.tars import read_tar, write_tar

PAIRS = 36  # of a shard


def more(corpus: Path, name: str, number: int) -> None:
    """Write a shard of pairs that the small corpus does not have."""
    members = read_tar(EMBEDDED / "corpus" / "00001.tar")
    write_tar(corpus / f"{name}.tar", members[3 * PAIRS * number : 3 * PAIRS * (number + 1)])


class Nights:
    """A corpus of its own, and a run folder with nights."""

    def __init__(self, folder: Path, corpus: Path, configure):
        self.corpus, self.folder = folder / "corpus", folder / "run"
        shutil.copytree(corpus / "corpus", self.corpus)
        self.configure = configure

    def config(self, folder: Path | None = None, **changes):
        corpus = {"shards": str(self.corpus)} | changes.pop("corpus", {})
        return self.configure(folder or self.folder, corpus=corpus, **changes)

    def night(self, folder: Path | None = None, **changes):
        return night(self.config(folder, **changes))

    def table(self, number: int | None = None) -> dict[str, bytes]:
        """Bytes of the columns of each shard, as another program finds them."""
        table = DeltaTable(self.folder / "table", version=number)
        return {Path(url).name.split(".")[0]: Path(url).read_bytes() for url in table.file_uris()}
