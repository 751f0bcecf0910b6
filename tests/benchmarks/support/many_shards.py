"""A finished run of very many shards, made without reading or scoring any, and what asking it costs.

The objects that do not go shard by shard are those of a real small run. Tars and tables are links to a few real ones. What is
measured is the real code: every listing, accounting and name of a run is there.

As a program it measures one call in a process of its own: its arguments are a name in `WORK` and a folder, and it prints `Cost`
as JSON.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline import storage
from pipeline.config import Config
from pipeline.corpus.exact_copies import ExactCopies
from pipeline.corpus.uids import Uids
from pipeline.inputs import load_inputs
from pipeline.night import night
from pipeline.operate.plan import plan
from pipeline.operate.status import status
from pipeline.run import run
from pipeline.run_folder import tables
from pipeline.run_folder.artifacts import each_shard
from pipeline.run_folder.changes import sources_of
from pipeline.run_folder.columns import columns
from pipeline.run_folder.contents import find_artifacts, sampled
from pipeline.run_folder.finished import Finished, open_run, write_finished
from pipeline.run_folder.generations import File, Generations, file_path
from pipeline.run_folder.started import start
from pipeline.stages.publish import Publication
from tests.support.corpora import EMBEDDED, SETTINGS
from tests.support.small_models import TINY, write_model
from tests.support.tars import read_tar, write_tar

ROOT = Path(__file__).parents[3]
PAIRS = 10_000  # of a shard, as img2dataset writes them
LINKS = 30_000  # to one file: file systems have a limit
NEW = 10  # shards of a night
PAGE = 1000  # objects in an answer to a listing


class Cost(NamedTuple):
    """What a call took."""

    seconds: float
    cpu: float  # seconds of this process
    peak: int  # bytes resident
    requests: dict[str, int]  # by operation of the file system; a listing is one for every PAGE objects


class Linked:
    """A file that is given many names."""

    def __init__(self, source: Path):
        self.source, self.data, self.links = source, source.read_bytes(), 0

    def at(self, path: Path) -> None:
        """Give it one more name."""
        if self.links == LINKS:
            self.links, self.source = 0, self.source.with_name(f"{self.source.name}+")
            self.source.write_bytes(self.data)
        self.links += 1
        os.link(self.source, path)


def build(folder: Path, shards: int) -> None:
    """A finished run of `shards` shards of PAIRS pairs in `folder`."""
    members = read_tar(EMBEDDED / "corpus" / "00000.tar")
    for i in range(3):
        write_tar(folder / "small" / f"{i}.tar", members[108 * i : 108 * (i + 1)])
    write_tar(folder / "target" / "00000.tar", read_tar(EMBEDDED / "target" / "00000.tar")[: 3 * 24])
    base: dict[str, Any] = {
        "model": {"name": write_model(folder / "model", TINY)},
        "targets": {"clean": {"shards": str(folder / "target")}},
        **SETTINGS,
    }
    small = Config.model_validate(base | {"run": str(folder / "one"), "corpus": {"shards": str(folder / "small")}})
    run(small)
    (folder / "corpus").mkdir()
    tar = Linked(folder / "small" / "0.tar")
    for i in range(shards):
        tar.at(folder / "corpus" / f"{i:06d}.tar")
    settings: dict[str, Any] = {"run": str(folder / "run"), "corpus": {"shards": str(folder / "corpus")}, "batch_size": 256}
    settings["embed"] = base["embed"] | {"precision": "fp32"}  # which names the features, before any run has settled it
    config = Config.model_validate(base | settings)
    (folder / "config.json").write_text(config.model_dump_json())
    _finish(config, open_run(small.run))


def build_night(folder: Path, shards: int) -> None:
    """A run folder whose last generation has `shards` shards, and NEW more beside them that no night has seen.

    The first night is a real one. The files of the second generation are named and not there, because no night reads them.
    """
    members = read_tar(EMBEDDED / "corpus" / "00000.tar")
    for i in range(3):
        write_tar(folder / "corpus" / f"first{i}.tar", members[108 * i : 108 * (i + 1)])
    write_tar(folder / "target" / "00000.tar", read_tar(EMBEDDED / "target" / "00000.tar")[: 3 * 24])
    config = Config.model_validate(
        {
            "run": str(folder / "run"),
            "corpus": {"shards": str(folder / "corpus")},
            "model": {"name": write_model(folder / "model", TINY)},
            "targets": {"clean": {"shards": str(folder / "target")}},
            **SETTINGS,
        }
    )
    (folder / "config.json").write_text(config.model_dump_json())
    first = night(config).generation
    assert first
    tar = Linked(folder / "corpus" / "first0.tar")
    for i in range(shards - 3):
        tar.at(folder / "corpus" / f"{i:06d}.tar")
    sources = sources_of(load_inputs(config).corpus)
    run = first.files["first0"].run
    files = {shard: first.files.get(shard, File(file_path(run, shard, source), 1000, 36)) for shard, source in sources.items()}
    generations = Generations(config.run)
    generations.commit(files, first.record, first)
    for i in range(NEW):
        tar.at(folder / "corpus" / f"new{i}.tar")


def _finish(config: Config, before: Finished) -> None:
    """Everything that the run would write, from that of a small one."""
    inputs = load_inputs(config)
    folder, corpus = Path(config.run), inputs.corpus
    os.makedirs(folder / "targets")
    os.rename(Path(before.folder) / "targets" / "clean", folder / "targets" / "clean")
    done = tables.Accounting("", 0, "", "0" * 64, 3 * PAIRS, 3 * PAIRS, 0, PAIRS, PAIRS, {}, 1, None, successes=PAIRS)
    os.makedirs(os.path.dirname(corpus.accounting_url("x")))
    for shard in corpus.shards:
        one = done._replace(shard=shard.name, size=shard.source.size, etag=shard.source.etag)
        Path(corpus.accounting_url(shard.name)).write_bytes(tables.json_bytes(one._asdict()))
    artifacts = find_artifacts(config, corpus, inputs.targets)
    checkpoint = before.checkpoints[0]
    table = tables.scores_table({}, {column.name: np.zeros(1, np.float32) for column in columns(config)})
    storage.write_bytes(str(folder / "table.parquet"), tables.parquet_bytes(table))
    stand_in = Linked(folder / "table.parquet")
    for key in artifacts.names:
        if key == "scores":
            continue
        if each_shard(key):
            os.makedirs(artifacts.tables(key))
            for shard in artifacts.shards:
                stand_in.at(Path(artifacts.table(key, shard)))
        else:
            storage.write_bytes(artifacts.url(key), storage.read_bytes(checkpoint.artifacts(before.folder).url(key)))
    publication = Publication(config, [artifacts], None)
    first = next(iter(artifacts.shards))
    published = tables.described(table, columns(config), publication.run, publication.of_shard(first))
    storage.write_bytes(str(folder / "published.parquet"), tables.parquet_bytes(published))
    os.makedirs(folder / "latest")
    stand_in = Linked(folder / "published.parquet")
    for shard in artifacts.shards:
        stand_in.at(Path(publication.url(shard)))
    start(config, [inputs.datasets()])
    one = checkpoint._replace(features=corpus.fingerprint, names=artifacts.names)
    write_finished(Finished(config.run, config, publication.id(), [one], Uids(pairs=1), ExactCopies(pairs=1)))


def _sample(config: Config, folder: Path) -> None:
    """Draw the sample of a corpus whose accounting is at hand."""
    one = tables.Accounting("", 0, "", "0" * 64, 3 * PAIRS, 3 * PAIRS, 0, PAIRS, PAIRS, {}, 1, None)
    names = (f"{i:06d}" for i in range(len(os.listdir(folder / "corpus"))))
    sampled(config, {name: one._replace(shard=name) for name in names}, config.fit.sample)


WORK: dict[str, Callable[[Config, Path], object]] = {
    "import": lambda config, folder: None,
    "plan": lambda config, folder: plan(config),
    "run": lambda config, folder: run(config),
    "status": lambda config, folder: status(config.run),
    "sample": _sample,
    "night": lambda config, folder: night(config),
}


def measure(work: str, folder: Path) -> Cost:
    """One call in a process of its own."""
    program = [sys.executable, "-m", "tests.benchmarks.support.many_shards", work, str(folder)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=True)
    return Cost(*json.loads(done.stdout.splitlines()[-1]))


class Counting:
    """A file system that counts what is asked of it."""

    def __init__(self, fs: Any, requests: Counter[str]):
        self._fs, self._requests = fs, requests

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._fs, name)
        if name not in ("find", "glob", "info", "size", "exists", "isdir", "cat_file", "pipe_file", "rm_file", "get_file"):
            return found

        def counted(*args: Any, **kwargs: Any) -> Any:
            answer = found(*args, **kwargs)
            self._requests[name] += -(-len(answer) // PAGE) if name in ("find", "glob") else 1
            return answer

        return counted


def main(work: str, folder: Path) -> Cost:
    """One call, with its requests counted."""
    config = Config.model_validate_json((folder / "config.json").read_text())
    requests: Counter[str] = Counter()
    real = storage.objects.filesystem
    storage.objects.filesystem = lambda url: (lambda fs, path: (Counting(fs, requests), path))(*real(url))
    then, cpu = time.perf_counter(), time.process_time()
    WORK[work](config, folder)
    took, cpu = time.perf_counter() - then, time.process_time() - cpu
    return Cost(took, cpu, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, dict(requests))


if __name__ == "__main__":
    if sys.argv[1] == "build":
        build(Path(sys.argv[2]), int(sys.argv[3]))
    elif sys.argv[1] == "build_night":
        build_night(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
