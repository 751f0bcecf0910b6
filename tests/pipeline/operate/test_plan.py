"""What a run would take, without starting it: against what is really there."""

import json
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from pipeline import storage
from pipeline.config import Config
from pipeline.corpus.shards import Shard
from pipeline.errors import UserError
from pipeline.inputs import load_inputs
from pipeline.operate import plan as estimate
from pipeline.operate.pace import PAIRS, Pace, measure
from pipeline.operate.plan import plan
from pipeline.run_folder.tables import Accounting, json_bytes
from pipeline.sections import Embed, Reading
from tests.support.tars import pair, tar_bytes

EMBEDDED = Path(str(files("jobs.demo") / "corpus"))


def configure(tmp_path, tiny_model, shards) -> Config:
    clean = {"clean": {"shards": str(EMBEDDED / "target")}}
    return Config.model_validate(
        {"run": str(tmp_path / "run"), "corpus": {"shards": str(shards)}, "model": {"name": tiny_model}, "targets": clean}
    )


def test_pairs_are_those_of_stats_json(tmp_path, tiny_model):
    found = plan(configure(tmp_path, tiny_model, EMBEDDED / "corpus"))
    truth = sum(json.loads(path.read_text())["successes"] for path in (EMBEDDED / "corpus").glob("*_stats.json"))
    (corpus, target) = found.datasets
    assert (corpus.name, corpus.shards, corpus.done_shards, corpus.pairs) == ("corpus", 3, 0, truth)
    assert corpus.bytes == sum(path.stat().st_size for path in (EMBEDDED / "corpus").glob("*.tar"))
    assert target.name == "target clean"
    assert not (tmp_path / "run").exists()


def test_without_stats_pairs_are_counted_in_the_beginning_of_some_shards(tmp_path, monkeypatch):
    data = tar_bytes([m for i in range(100) for m in pair(f"{i:03d}", f"caption {i}", n=i)])
    storage.write_bytes(str(tmp_path / "0.tar"), data)
    shard = Shard("0", storage.describe(str(tmp_path / "0.tar")))
    assert estimate.count_pairs(shard, Reading(), Embed()) == (100, len(data), [])
    monkeypatch.setattr(estimate, "HEAD", len(data) // 3)
    pairs, count, _ = estimate.count_pairs(shard, Reading(), Embed())
    assert 25 < pairs < 40
    assert pairs * len(data) / count == pytest.approx(100, rel=0.1)


def test_what_is_odd_about_a_shard_is_said_before_a_run(tmp_path, tiny_model, capsys):
    members = [m for i in range(9) for m in pair(f"scan.{i}")]
    storage.write_bytes(str(tmp_path / "corpus" / "0.tar"), tar_bytes(members))
    storage.write_bytes(str(tmp_path / "corpus" / "1.tar"), tar_bytes(sorted(pair("0") + pair("1"), key=lambda m: m[0][-3:])))
    storage.write_bytes(str(tmp_path / "corpus" / "1_stats.json"), b"[]")
    plan(configure(tmp_path, tiny_model, tmp_path / "corpus"))
    lines = [line.removeprefix(f"{tmp_path}/corpus/") for line in capsys.readouterr().err.splitlines()]
    assert [line[:35] for line in lines] == [
        "0.tar: 27 members are swallowed by ",
        "1.tar: its _stats.json has no numbe",
        "1.tar: 4 members are not next to ot",
    ]


@pytest.mark.parametrize("folder", ["", "s3"])
def test_a_shard_without_bytes_is_no_pair_on_any_storage(tmp_path, s3, folder):
    url = f"s3://{s3}/none/0.tar" if folder else str(tmp_path / "0.tar")
    storage.write_bytes(url, b"")
    assert estimate.count_pairs(Shard("0", storage.describe(url)), Reading(), Embed()) == (0, 0, [])


def test_each_caption_that_is_a_pair_is_counted(tmp_path):
    storage.write_bytes(str(tmp_path / "0.tar"), tar_bytes([m for i in range(9) for m in pair(str(i), "one\ntwo\nthree")]))
    storage.write_bytes(str(tmp_path / "0_stats.json"), b'{"successes": 9}')
    shard = Shard("0", storage.describe(str(tmp_path / "0.tar")))
    counts = [estimate.count_pairs(shard, Reading(pick=pick), Embed()).pairs for pick in (None, "first", "all")]
    assert counts == [9, 9, 27]


def test_what_is_done_is_not_estimated(tmp_path, tiny_model):
    for i in range(20):
        storage.write_bytes(str(tmp_path / "corpus" / f"{i:02d}.tar"), tar_bytes(pair("0") + pair("1")))
    config = configure(tmp_path, tiny_model, tmp_path / "corpus")
    corpus = load_inputs(config).corpus
    for shard in corpus.shards[:5]:
        fields = {"sha256": "", "members": 9, "in_pairs": 9, "ignored": 0, "pairs": 1000, "embedded": 1000, "quarantined": {}}
        done = Accounting(shard.name, shard.source.size, shard.source.etag, **fields, parts=4, broken=None)
        storage.write_bytes(corpus.accounting_url(shard.name), json_bytes(done._asdict()))
    found = plan(config).datasets[0]
    assert (found.shards, found.done_shards, found.pairs) == (20, 5, 5 * 1000 + 15 * 2)
    assert found.done_bytes * 4 == found.bytes


def test_what_a_core_reads_and_embeds_is_measured(tmp_path, tiny_model):
    config = configure(tmp_path, tiny_model, EMBEDDED / "corpus")
    inputs = load_inputs(config)
    pace = measure(inputs.model, inputs.corpus, config.embed)
    assert pace.device == ("cuda" if torch.cuda.is_available() else "cpu")
    started = time.perf_counter()
    again = measure(inputs.model, inputs.corpus, config.embed)
    assert PAIRS / again.reading < time.perf_counter() - started, "it reads so many pairs in less time than all of it takes"
    line = plan(config).pace
    assert line.startswith("a core here reads " if pace.device == "cpu" else "the GPU here embeds ")
    storage.write_bytes(str(tmp_path / "bad" / "0.tar"), tar_bytes([("0.jpg", b"none"), ("0.txt", b"words")]))
    assert plan(configure(tmp_path, tiny_model, tmp_path / "bad")).pace is None


def test_what_rates_mean():
    assert Pace("cpu", 200.0, 10.0).said() == "a core here reads 200 pairs/s and embeds 10"
    rates = "the GPU here embeds 10,100 pairs/s and a core reads 200"
    assert Pace("cuda", 200.0, 10_100.0).said() == f"{rates}: 51 cores keep one such GPU busy"


def test_what_can_not_be_had_is_said(tmp_path, tiny_model):
    with pytest.raises(UserError, match=r"corpus\.shards: no shard or folder"):
        plan(configure(tmp_path, tiny_model, tmp_path / "none"))


MANY = """
import json, resource, sys, ray
from pipeline.config import Config
from pipeline.operate.plan import plan
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
few, many = (Config.model_validate(config) for config in json.load(sys.stdin))
plan(few)
before = peak()
found = plan(many).datasets[0]
print(found.shards, found.pairs, ray.is_initialized(), peak(), before)
"""


@pytest.mark.slow
def test_100000_shards_are_planned_in_little_memory(tmp_path, tiny_model):
    data = tar_bytes(pair("0"))
    for i in range(100):
        (tmp_path / "corpus" / f"{i:02d}").mkdir(parents=True)
        for j in range(1000):
            (tmp_path / "corpus" / f"{i:02d}" / f"{j:03d}.tar").write_bytes(data)
    configs = [configure(tmp_path, tiny_model, shards) for shards in (EMBEDDED / "corpus", tmp_path / "corpus")]
    asked = json.dumps([config.model_dump() for config in configs])
    done = subprocess.run([sys.executable, "-c", MANY], input=asked, capture_output=True, text=True, check=True)
    shards, pairs, started, *peaks = done.stdout.split()
    peak, before = map(int, peaks)
    print(f"{peak / 1e6:.0f} MB, {before / 1e6:.0f} MB of them for what is imported and the model")
    assert (shards, pairs, started) == ("100000", "100000", "False")
    assert peak - before < 300e6
