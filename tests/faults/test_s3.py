"""An S3 server that dies, refuses or does not know the place: one clear line, and no byte other than it should be."""

import json
import os
import subprocess
import sys
import threading
import uuid

import pytest
import s3fs

from jobs.cli import main
from pipeline import storage
from tests.support.run_folders import result
from tests.support.s3_server import BUCKET, S3Server


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of this test's own, which is the one that everything uses."""
    own = S3Server(tmp_path / "server")
    own.folder.mkdir()
    for key, value in own.environment.items():
        monkeypatch.setenv(key, value)
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        own.start()
        yield own
    finally:
        own.kill()
        s3fs.S3FileSystem.clear_instance_cache()


def test_reading_and_writing_wait_for_a_server_that_comes_back(server, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "10")  # the pauses are random: five attempts can pass before the server is up
    s3fs.S3FileSystem.clear_instance_cache()
    storage.write_bytes(f"s3://{BUCKET}/before", b"before")
    server.kill()
    back = threading.Timer(1.0, server.start)
    back.start()
    try:
        assert storage.read_bytes(f"s3://{BUCKET}/before") == b"before"
        storage.write_bytes(f"s3://{BUCKET}/after", b"after")
    finally:
        back.join()
    assert storage.read_bytes(f"s3://{BUCKET}/after") == b"after"


@pytest.mark.slow
@pytest.mark.parametrize("outage", ["short", "long"])
@pytest.mark.parametrize("stage", ["features", "heads"])
def test_the_server_dies_in_the_middle_of_a_run(ecif, configure, server, pairs, whole, stage, outage):
    for path in pairs.rglob("*.tar"):
        storage.write_bytes(f"s3://{BUCKET}/pairs/{path.relative_to(pairs)}", path.read_bytes())
    run = f"s3://{BUCKET}/run"
    config = configure(run, f"s3://{BUCKET}/pairs")
    command = ecif("run", config)
    assert command.wait_until(lambda: storage.listing(f"{run}/{stage}", ""))
    server.kill()
    if outage == "short":
        server.start()
        ended = command.wait()
    else:
        ended = command.wait()
        server.start()
        assert ended.code == 1
    if ended.code:
        assert (ended.code, ended.out) == (1, "")
        assert ended.last.startswith("ecif: ")
        assert "s3://" in ended.last
        assert "the same command" in ended.last
        assert "Traceback" not in "\n".join(ended.lines), ended
        there = result(run)
        assert there and there.items() <= whole.items()
        ended = ecif("run", config).wait()
    assert ended.code == 0, ended
    assert result(run) == whole


@pytest.fixture
def refused(s3, monkeypatch, capsys):
    """Starts a run with changes to the environment that must not be let in: its one line."""

    def start(config, **environment: str | None) -> str:
        for key, value in environment.items():
            monkeypatch.delenv(key) if value is None else monkeypatch.setenv(key, value)
        monkeypatch.setattr(sys, "argv", ["ecif", "run", str(config)])
        s3fs.S3FileSystem.clear_instance_cache()
        with pytest.raises(SystemExit) as done:
            main()
        said = capsys.readouterr()
        assert (done.value.code, said.out) == (2, "")
        (line,) = said.err.strip().splitlines()
        return line

    yield start
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(params=["corpus", "run"])
def on_s3(request, s3, configure, pairs, tmp_path):
    """A configuration with its corpus or its run on S3, and how a line about that begins."""
    url = f"s3://{s3}/{uuid.uuid4().hex}"
    if request.param == "run":
        return configure(f"{url}/run", pairs), f"ecif: run: can't write to {url}/run: "
    for path in (pairs / "corpus").glob("*.tar"):
        storage.write_bytes(f"{url}/corpus/{path.name}", path.read_bytes())
    return configure(
        tmp_path / "run", pairs, corpus={"shards": f"{url}/corpus"}
    ), f"ecif: corpus.shards: can't read {url}/corpus: "


def test_a_wrong_secret_is_one_line_that_does_not_say_it(refused, on_s3):
    config, start = on_s3
    wrong, right = uuid.uuid4().hex, os.environ["AWS_SECRET_ACCESS_KEY"]
    line = refused(config, AWS_SECRET_ACCESS_KEY=wrong)
    assert line.startswith(start)
    assert wrong not in line and right not in line


def test_an_unknown_key_is_one_line(refused, on_s3):
    config, start = on_s3
    assert refused(config, AWS_ACCESS_KEY_ID="nobody").startswith(start)


def test_no_credentials_at_all_is_one_line(refused, on_s3, tmp_path):
    config, start = on_s3
    nothing = {"AWS_SECRET_ACCESS_KEY": None, "AWS_ACCESS_KEY_ID": None, "AWS_EC2_METADATA_DISABLED": "true"}
    files = {name: str(tmp_path / "none") for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE")}
    line = refused(config, **nothing, **files)
    assert line.startswith(start)
    assert "Unable to locate credentials" in line


def test_a_server_that_is_not_there_is_one_line(refused, on_s3):
    config, start = on_s3
    line = refused(config, AWS_ENDPOINT_URL="http://127.0.0.1:9", AWS_MAX_ATTEMPTS="1")
    assert line.startswith(start)
    assert "http://127.0.0.1:9" in line


def test_a_public_bucket_is_read_without_credentials(server, configure, pairs, tmp_path):
    for path in pairs.rglob("*.tar"):
        storage.write_bytes(f"s3://{BUCKET}/public/{path.relative_to(pairs)}", path.read_bytes())
    places = ["arn:aws:s3:::test", "arn:aws:s3:::test/public/*"]
    statement = {"Effect": "Allow", "Principal": "*", "Action": ["s3:GetObject", "s3:ListBucket"], "Resource": places}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    server.client().call_s3("put_bucket_policy", Bucket=BUCKET, Policy=policy)
    nothing = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "FSSPEC_S3_ANON": "true"}
    planned = call("plan", configure(tmp_path / "run", f"s3://{BUCKET}/public"), nothing)
    assert planned.returncode == 0, planned
    assert "~48" in planned.stdout
    refused = call("run", configure(f"s3://{BUCKET}/public/run", f"s3://{BUCKET}/public"), nothing)
    (line,) = refused.stderr.splitlines()
    assert (refused.returncode, refused.stdout) == (2, "")
    assert line.startswith(f"ecif: run: can't write to s3://{BUCKET}/public/run: "), "public is not writable"


def call(command, config, environment) -> subprocess.CompletedProcess:
    """The command, with variables that are read when it imports things."""
    call = [sys.executable, "-m", "jobs.cli", command, str(config)]
    return subprocess.run(call, env=os.environ | environment, capture_output=True, text=True)


def test_a_bucket_that_does_not_exist_is_one_line(refused, configure, pairs, tmp_path):
    for config in (configure(tmp_path / "run", "s3://not-a-bucket"), configure("s3://not-a-bucket/run", pairs)):
        line = refused(config)
        assert "s3://not-a-bucket" in line
        assert not (tmp_path / "run").exists()
