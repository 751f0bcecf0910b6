"""Readers that outrun the model wait for it, and slow readers keep it busy together: with stand-ins that sleep, so that the
numbers are Ray's and not this machine's. `pytest tests/benchmarks/test_back_pressure.py -m benchmark -s`
"""

import pytest

from tests.benchmarks.support.stand_ins import Asked, run_apart

pytestmark = pytest.mark.benchmark
MB = 1_000_000
PART = 5 * MB


def test_decoded_parts_do_not_pile_up(tmp_path):
    store, shards, parts = 150 * MB, 8, 10
    waits = {"read_s": 0.01, "embed_s": 0.3}
    asked = Asked(str(tmp_path), shards, parts=parts, part_bytes=PART, **waits, store=store, gpus=1, cpus=3)
    found = run_apart(asked)
    print(
        f"\n{shards * parts * PART / MB:.0f} MB of decoded parts from readers 30 times as fast as the model: at most ", end=""
    )
    print(f"{found.stored / MB:.0f} MB of the {store / MB:.0f} MB object store in use, {found.spilled} files spilled")
    assert 0 < found.stored < 0.75 * store
    assert found.spilled == 0


def test_several_readers_keep_one_model_busy(tmp_path):
    waits = {"read_s": 0.9, "embed_s": 0.3}
    found = run_apart(Asked(str(tmp_path), 24, parts=5, part_bytes=PART, **waits, store=300 * MB, gpus=1, cpus=6))
    print(f"\n6 readers, each 3 times as slow as the model that they feed: the model is at work {found.busy:.0%} of the time")
    assert found.busy > 0.9
