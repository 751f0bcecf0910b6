"""Stages with readers and models that wait instead of computing: what Ray and the driver do, whatever the cores are busy with.

`run_apart` runs it as a program, in a Ray of its own: its argument is `Asked` as JSON, and it prints `Found` as JSON.
"""

import json
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import ray

from pipeline import storage
from pipeline.config import Config
from pipeline.corpus.shards import Shard
from pipeline.run_folder.artifacts import Artifacts
from pipeline.run_folder.contents import contents
from pipeline.run_folder.dataset import Dataset
from pipeline.run_folder.tables import Accounting
from pipeline.sections import Embed, Model, Reading
from pipeline.stages.embed import stage as stage
from pipeline.stages.embed.rows import Busy, Embedded, Part, ToRead
from pipeline.workers.cluster import Resources, session
from pipeline.workers.shards import ShardWorker, missing_tables, over_shards

ROOT = Path(__file__).parents[3]
WARM_UP = 10  # parts before the model's waiting for input is counted: reading processes have to start


class Asked(NamedTuple):
    """A corpus that is not there, and how fast it is read and embedded."""

    run: str
    shards: int
    parts: int = 1  # of a shard
    part_bytes: int = 100  # of a part's pixels
    read_s: float = 0.0  # that a reader takes for a part
    embed_s: float = 0.0  # that the model takes for a part
    store: int = 200_000_000  # bytes of Ray's object store
    cpus: int = 2  # as Ray is told: waiting takes none
    gpus: int = 0


class Found(NamedTuple):
    """What became of it."""

    before: int  # bytes of the driver before the stages, without the files of libraries
    peak: int  # the same, at most
    resident: int  # with these files, at most
    seconds: float  # of the stages
    stored: int  # bytes of Ray's object store in use, at most
    spilled: int  # files that Ray wrote for want of room in it
    busy: float  # share of its time that the model was at work


def run_apart(asked: Asked) -> Found:
    """`main` in a process of its own."""
    program = [sys.executable, "-m", "tests.benchmarks.support.stand_ins", json.dumps(asked._asdict())]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=True)
    return Found(**json.loads(done.stdout.splitlines()[-1]))


class Reader:
    """A shard in, its parts out, after a while each."""

    def __init__(self, asked: Asked):
        self.asked = asked

    def __call__(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        shard, parts = ToRead.from_row(row), self.asked.parts
        source = shard.source
        done = Accounting(shard.shard, source.size, source.etag, "0" * 64, parts, parts, 0, parts, 0, {}, parts, None)
        for number in range(parts):
            time.sleep(self.asked.read_s)
            last = number + 1 == parts
            part = Part(0, shard.shard, number, source.size if last else 0, [], [], False, done if last else None)
            yield part.to_row() | {"pixels": bytes(self.asked.part_bytes)}


class Actor:
    """A part in, what the driver counts out, after a while; `seconds` are those since the part before."""

    def __init__(self, folders: list[str], model: Model, precision: str):
        self.seconds, self.parts, self.ended, self.turn = float(model.name), 0, 0.0, threading.Lock()

    def __call__(self, rows: pa.Table) -> dict[str, list[Any]]:
        with self.turn:
            time.sleep(self.seconds)
            before, self.ended, self.parts = self.ended, time.perf_counter(), self.parts + 1
            seconds = self.ended - before if self.parts > WARM_UP else 0.0
        part = Part.from_row({"pixels": b"", "tokens": b"", "facts": rows["facts"][0].as_py()})
        return Embedded(part.dataset, part.shard, part.size, 1, Busy(seconds), [], part.accounting).to_columns()


class Worker(ShardWorker):
    """What `score` does to Ray: a row for each shard."""

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"pairs": 1}


def stages(dataset: Dataset, asked: Asked, resources: Resources) -> float:
    """What a run does in the driver with all shards, from embedding to scores; returns the model's seconds a part."""
    stage.ReadParts, stage.EmbedPart = lambda *_: Reader(asked), Actor
    seconds = stage.embed([dataset], Model(name=str(asked.embed_s)), Embed(), {}, resources)
    found = contents(Config.model_construct(), dataset, {})
    missing = missing_tables(Artifacts(asked.run, {"pairs": "0" * 16}, found.shards), ["pairs"])
    over_shards("score", dataset.accounting(), missing, Worker, (), resources)
    return seconds


def main(asked: Asked) -> Found:
    """All stages on the corpus that is not there."""
    started = ray.init(
        "local",
        num_cpus=asked.cpus,
        num_gpus=asked.gpus,
        object_store_memory=asked.store,
        include_dashboard=False,
        log_to_driver=False,
    )
    room = ray.cluster_resources()["object_store_memory"]
    used, own, end = [0.0], [_own()], threading.Event()

    def look() -> None:
        while not end.wait(0.2):
            used.append(room - ray.available_resources().get("object_store_memory", 0.0))
            own.append(_own())

    then = time.perf_counter()
    shards = [Shard(f"{i:06d}", storage.Object(f"none/{i:06d}.tar", 10_240, f"10240-{i}")) for i in range(asked.shards)]
    with session(None) as resources:
        threading.Thread(target=look, daemon=True).start()
        seconds = stages(Dataset(asked.run, "0" * 16, shards, Reading()), asked, resources)
        end.set()
    took = time.perf_counter() - then
    parts = asked.shards * asked.parts
    busy = asked.embed_s * (parts - WARM_UP * resources.workers) / max(1e-9, parts * seconds)
    spilled = sum(1 for folder in Path(started.address_info["session_dir"]).rglob("*spill*") for _ in folder.rglob("*"))
    resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Found(own[0], max(own), resident, took, int(max(used)), spilled, busy)


def _own() -> int:
    """Bytes of this process that are not those of a file."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


if __name__ == "__main__":
    print(json.dumps(main(Asked(**json.loads(sys.argv[1])))._asdict()))
