"""Readers that outrun the model wait for it, and slow readers keep it busy together: with stand-ins that sleep, so that the
numbers are Ray's and not this machine's. `pytest tests/benchmarks/test_back_pressure.py -m benchmark -s`
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.benchmark
MB = 1_000_000
PART = 5 * MB


def waited(**asked) -> dict:
    program = [sys.executable, str(Path(__file__).with_name("stand_ins.py")), json.dumps(asked)]
    return json.loads(subprocess.run(program, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def test_decoded_parts_do_not_pile_up(tmp_path):
    store, shards, parts = 150 * MB, 8, 10
    found = waited(
        run=str(tmp_path), shards=shards, parts=parts, part_bytes=PART, read_s=0.01, embed_s=0.3, store=store, gpus=1, cpus=3
    )
    print(
        f"\n{shards * parts * PART / MB:.0f} MB of decoded parts from readers 30 times as fast as the model: at most ", end=""
    )
    print(f"{found['stored'] / MB:.0f} MB of the {store / MB:.0f} MB object store in use, {found['spilled']} files spilled")
    assert 0 < found["stored"] < 0.75 * store
    assert found["spilled"] == 0


def test_several_readers_keep_one_model_busy(tmp_path):
    found = waited(
        run=str(tmp_path), shards=24, parts=5, part_bytes=PART, read_s=0.9, embed_s=0.3, store=300 * MB, gpus=1, cpus=6
    )
    print(
        f"\n6 readers, each 3 times as slow as the model that they feed: the model is at work {found['busy']:.0%} of the time"
    )
    assert found["busy"] > 0.9
