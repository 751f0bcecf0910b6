"""Small real corpora: emoji pairs of the embedded corpus in a few small shards."""

from pathlib import Path

import pytest
from corpora import EMBEDDED, SETTINGS, read_tar, write_tar

from pipeline.config import Config
from pipeline.run import run


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
