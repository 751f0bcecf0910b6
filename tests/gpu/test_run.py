"""A whole run on a GPU: what each stage of it takes, and how long until the first pair is embedded. `make gpu` prints it."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import open_clip
import pytest
import torch
import yaml

from pipeline import storage
from tests.gpu.photos import write_shards
from tests.support.small_models import write_model

PAIRS, ASKED, TARGETS = 100_000, 5000, 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_run_by_stage(table, tmp_path: Path):
    write_shards(tmp_path / "corpus", PAIRS, 0)
    for target in range(TARGETS):
        write_shards(tmp_path / f"target{target}", ASKED, 1 + target)
    config = {
        "run": str(tmp_path / "run"),
        "corpus": {"shards": str(tmp_path / "corpus")},
        "model": {"name": write_model(tmp_path / "model", open_clip.get_model_config("ViT-B-32"))},
        "targets": {f"target{target}": {"shards": str(tmp_path / f"target{target}")} for target in range(TARGETS)},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    torch.cuda.empty_cache()  # the run's processes need the memory that the tests before this one left
    started = time.time()
    command = [sys.executable, "-m", "jobs.cli", "run", str(tmp_path / "config.yaml")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    first = min(item.modified for item in storage.listing(str(tmp_path / "run" / "features"), ".parquet")) - started
    stages = re.findall(r"^[-\d]+ [:\d]+ (.+?) +done in ([\d.]+) s", ran.stderr, re.MULTILINE)
    said = re.findall(r"^GPUs busy.*$|^readers are the limit.*$", ran.stderr, re.MULTILINE)
    table.append(f"a run of {PAIRS:,} pairs, {TARGETS} targets of {ASKED}, ViT-B-32, {os.cpu_count()} cores: first part of")
    table.append(f"  features after {first:.0f} s; {', '.join(f'{name} {seconds} s' for name, seconds in stages)}")
    table.extend(f"  {line}" for line in said)
