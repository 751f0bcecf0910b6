"""What `ecif plan` says about requests, beside those that reach a real S3 server."""

import os
import subprocess
import sys
import uuid

from pipeline import storage
from pipeline.operate.costs import total
from pipeline.operate.plan import plan
from tests.support.counting import Counting

SHARDS = 12  # so many that what is there once does not rule


def test_planned_requests_are_those_of_a_run(s3, configure, corpus, tmp_path):
    base = f"s3://{s3}/{uuid.uuid4().hex}"
    tars = [path.read_bytes() for path in sorted((corpus / "corpus").glob("*.tar"))]
    for shard in range(SHARDS):
        storage.write_bytes(f"{base}/corpus/{shard:05d}.tar", tars[shard % len(tars)])
    config = configure(f"{base}/run", corpus={"shards": f"{base}/corpus"})
    planned = total("run", plan(config).costs)
    (tmp_path / "config.yaml").write_text(config.model_dump_json(exclude_none=True))
    with Counting(os.environ["AWS_ENDPOINT_URL"]) as way:
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"AWS_ENDPOINT_URL": way.url}
        command = [sys.executable, "-m", "jobs.cli", "run", str(tmp_path / "config.yaml")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        way.shutdown()
    assert done.returncode == 0, done.stderr
    print(f"planned {planned.writes:.0f} writes and {planned.reads:.0f} reads, counted {way.writes()} and {way.reads()}")
    assert 0.8 < planned.reads / way.reads() < 1.25
    assert 0.75 < planned.writes / way.writes() < 1.33
