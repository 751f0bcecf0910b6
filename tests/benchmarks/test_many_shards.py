"""What 100,000 shards take the driver, embedding to scoring, with stand-ins that read and compute nothing (planning them:
tests/pipeline/operate/test_plan.py). `pytest tests/benchmarks/test_many_shards.py -m benchmark -s`
"""

import pytest

from tests.benchmarks.support.stand_ins import Asked, run_apart

pytestmark = pytest.mark.benchmark
SHARDS = 100_000


def test_100000_shards_are_run_in_little_memory(tmp_path):
    found = run_apart(Asked(run=str(tmp_path), shards=SHARDS))
    driver, before, resident = (f"{size / 1e6:.0f} MB" for size in (found.peak, found.before, found.resident))
    print(f"\n{SHARDS} shards through all stages in {found.seconds:.0f} s: the driver's own memory peaks at {driver}")
    print(f"({before} before the first stage), with the mapped files of its libraries at {resident}")
    assert found.peak < 1e9
