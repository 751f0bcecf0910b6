"""Small real corpora: emoji pairs of the embedded corpus in a few small shards."""

import os
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from pipeline.config import Config
from pipeline.run import Outcome, run
from tests.support.corpora import EMBEDDED, ON_REQUEST, SETTINGS
from tests.support.nights import Nights
from tests.support.tars import read_tar, write_tar


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """3 shards with 36 pairs each, and a target of 24."""
    folder = tmp_path_factory.mktemp("pairs")
    members = read_tar(EMBEDDED / "corpus" / "00000.tar")
    for shard in range(3):
        write_tar(folder / "corpus" / f"{shard:05d}.tar", members[108 * shard : 108 * (shard + 1)])
    write_tar(folder / "target" / "00000.tar", read_tar(EMBEDDED / "target" / "00000.tar")[: 3 * 24])
    return folder


@pytest.fixture(scope="session")
def configure(corpus, tiny_model):
    """Makes the configuration of a small run; keys replace the defaults."""

    def make(run: Path | str, **changes) -> Config:
        base = {
            "run": str(run),
            "corpus": {"shards": str(corpus / "corpus")},
            "model": {"name": tiny_model},
            "targets": {"clean": {"shards": str(corpus / "target")}},
        }
        return Config.model_validate(base | SETTINGS | changes)

    return make


@pytest.fixture(scope="session")
def finished(tmp_path_factory, local_ray, configure):
    """A finished small run: its configuration and outcome."""
    config = configure(tmp_path_factory.mktemp("run"))
    return config, run(config)


@pytest.fixture(scope="session")
def everything(tmp_path_factory, finished, configure):
    """The finished run gone on with everything that a run can be asked for: its configuration and outcome."""
    folder = tmp_path_factory.mktemp("everything") / "run"
    shutil.copytree(finished[0].run, folder)
    config = configure(folder, **ON_REQUEST)
    return config, run(config)


class Imperfect(NamedTuple):
    """A finished run of a corpus that can't all be used."""

    corpus: Path
    run: Path
    outcome: Outcome

    def replace(self, shard: str, data: bytes) -> bytes:
        """Put other bytes in a shard's place, as far as a listing shows the same; gives what was there."""
        path = self.corpus / f"{shard}.tar"
        before, then = path.read_bytes(), path.stat().st_mtime_ns
        path.write_bytes(data)
        os.utime(path, ns=(then, then))
        return before


@pytest.fixture(scope="session")
def imperfect(tmp_path_factory, corpus, local_ray, configure):
    """Shard 00001 has an image that is none and a pair without a caption, 00002 is damaged from its middle on."""
    folder = tmp_path_factory.mktemp("imperfect")
    shutil.copytree(corpus / "corpus", folder / "corpus")
    members = read_tar(folder / "corpus" / "00001.tar")
    image, caption = ([name for name, _ in members if name.endswith(suffix)] for suffix in (".webp", ".txt"))
    kept = [(name, b"no image" if name == image[0] else data) for name, data in members if name != caption[1]]
    write_tar(folder / "corpus" / "00001.tar", kept)
    data = (folder / "corpus" / "00002.tar").read_bytes()
    (folder / "corpus" / "00002.tar").write_bytes(data[: len(data) // 2].ljust(len(data), b"\1"))
    outcome = run(configure(folder / "run", corpus={"shards": str(folder / "corpus")}))
    return Imperfect(folder / "corpus", folder / "run", outcome)


@pytest.fixture
def damaged(imperfect, tmp_path):
    """A copy of the imperfect run, to damage."""
    shutil.copytree(imperfect.run, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def nights(tmp_path, corpus, configure, local_ray):
    return Nights(tmp_path, corpus, configure)


@pytest.fixture(scope="session")
def first(tmp_path_factory, corpus, configure, local_ray):
    """A first night."""
    made = Nights(tmp_path_factory.mktemp("first"), corpus, configure)
    done = made.night()
    assert (done.state, done.generation.number, done.committed) == ("done", 0, 1)
    return made


@pytest.fixture
def second(first, tmp_path, configure) -> Nights:
    """A copy of the first night to go on in: times of files are those of the original."""
    made = Nights.__new__(Nights)
    made.corpus, made.folder, made.configure = tmp_path / "corpus", tmp_path / "run", configure
    shutil.copytree(first.corpus, made.corpus)
    shutil.copytree(first.folder, made.folder)
    return made
