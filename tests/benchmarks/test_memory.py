"""Memory does not grow with the corpus: a whole run of 1, 4 and 16 times as many shards, in a Ray of its own each.

`pytest tests/benchmarks/test_memory.py -m benchmark -s`
"""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from jobs.demo import model as demo
from pipeline import storage
from tests.benchmarks.support.processes import Watch
from tests.support.small_models import TINY, write_model
from tests.support.tars import write_tar

pytestmark = pytest.mark.benchmark
EMBEDDED = Path(demo.__file__).parent / "corpus"
SIDE = 128  # pixels: 49 kB decoded
SHARDS, PAIRS, PART = 4, 128, 64  # of 1x
STORE = 150_000_000
WIDER = 1.2  # 16x beside 1x, at most
PROGRAM = f"""
import json, sys, ray
from pipeline.config import Config
from pipeline.run import run
ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory={STORE}, log_to_driver=False)
print(run(Config.model_validate(json.load(sys.stdin))).scored)
"""
SETTINGS = {
    "batch_size": 64,
    "embed": {"part_size": PART},
    "fit": {"folds": 2, "epochs": 2, "sample": 256},
    "solve": {"iterations": 4, "refits": 4, "dampings": [0.1]},
}


def corpus(folder: Path, times: int) -> None:
    """The same real pairs over and over."""
    with tarfile.open(EMBEDDED / "corpus" / "00000.tar") as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar if not m.name.endswith(".json")][: 2 * PAIRS]
    data = write_tar(folder / "00000.tar", members).read_bytes()
    for i in range(1, SHARDS * times):
        (folder / f"{i:05d}.tar").write_bytes(data)


def peaks(tmp_path: Path, model: str, times: int) -> dict[str, int]:
    """Largest bytes of the driver, of all that it started, and of Ray's object store."""
    corpus(tmp_path / f"{times}x", times)
    config = {
        "run": str(tmp_path / f"run{times}"),
        "corpus": {"shards": str(tmp_path / f"{times}x")},
        "model": {"name": model},
        "targets": {"clean": {"shards": str(tmp_path / "1x" / "00000.tar")}},
    }
    run = subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with Watch(run.pid) as watch:
        out, _ = run.communicate(json.dumps(config | SETTINGS))
    assert int(out.splitlines()[-1]) == times * SHARDS * PAIRS
    assert len(storage.listing(config["run"] + "/latest", ".parquet")) == times * SHARDS
    return {what: watch.peak(what) for what in ("driver", "workers", "store")}


def test_memory_is_flat(tmp_path):
    vision = TINY["vision_cfg"] | {"image_size": SIDE, "patch_size": 64}
    model = write_model(tmp_path / "model", TINY | {"vision_cfg": vision})
    found = {times: peaks(tmp_path, model, times) for times in (1, 4, 16)}
    print(f"\npeak MB (PSS)  {'driver':>8} {'workers':>8} {'store':>8}   pixels")
    for times, peak in found.items():
        pixels = 3 * SIDE**2 * times * SHARDS * PAIRS
        cells = " ".join(f"{peak[what] / 1e6:8.0f}" for what in ("driver", "workers", "store"))
        print(f"{times:>3}x           {cells} {pixels / 1e6:8.0f}")
    for what in ("driver", "workers"):
        assert found[16][what] < WIDER * found[1][what]
    assert found[16]["store"] < STORE + 50_000_000
