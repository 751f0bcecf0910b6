"""Two commands started at once on one folder of an S3 server: one works; and nothing of the credentials is left anywhere."""

import os
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import NamedTuple

import pytest

from pipeline import storage
from tests.support.command import Command, Ended, write_config
from tests.support.run_folders import result

pytestmark = pytest.mark.slow


class Race(NamedTuple):
    """What came of two commands."""

    base: str  # with the corpus and the run
    ended: list[Ended]  # by exit code
    logs: Path  # of Ray


@pytest.fixture(scope="module")
def race(s3, tmp_path_factory, pairs, tiny_model):
    base, logs = f"s3://{s3}/{uuid.uuid4().hex}", Path(tempfile.mkdtemp(prefix="ray-"))  # a short name: sockets have a limit
    for path in pairs.rglob("*.tar"):
        storage.write_bytes(f"{base}/pairs/{path.relative_to(pairs)}", path.read_bytes())
    config = write_config(tmp_path_factory.mktemp("race"), f"{base}/run", f"{base}/pairs", tiny_model)
    started = [Command("run", config, environment={"RAY_TMPDIR": str(logs)}) for _ in range(2)]
    try:
        yield Race(base, sorted(command.wait() for command in started), logs)
    finally:
        for command in started:
            command.end()
        shutil.rmtree(logs)


def test_one_works_and_the_other_is_refused(race, whole):
    worked, refused = race.ended
    assert (worked.code, refused.code) == (0, 2)
    assert worked.out.strip() == f"{race.base}/run/latest"
    assert refused.out == ""
    assert refused.last.startswith(f"ecif: run: another run is at work in {race.base}/run (process ")
    assert all("waiting up to 60 s to see whether it lives" in line for line in refused.lines[:-1])
    assert result(f"{race.base}/run") == whole


def test_no_object_log_or_line_has_a_credential(race):
    secret = os.environ["AWS_SECRET_ACCESS_KEY"].encode()
    places = {item.url: storage.read_bytes(item.url) for item in storage.listing(f"{race.base}/run", "")}
    places |= {str(path): path.read_bytes() for path in race.logs.rglob("*") if path.is_file()}
    places |= {f"command {i}": "\n".join([ended.out, *ended.lines]).encode() for i, ended in enumerate(race.ended)}
    assert {Path(url).suffix for url in places} >= {".json", ".parquet", ".safetensors", ".log", ".out"}
    assert [place for place, data in places.items() if secret in data] == []
