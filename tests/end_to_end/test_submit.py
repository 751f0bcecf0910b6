"""Runs handed in from outside to a real head that asks for a token, started from this very environment."""

import os
import re
import shutil
import subprocess
import sys
import time

import pytest

from pipeline.workers import metrics
from tests.support.command import PATIENCE_S, Ended, write_config
from tests.support.corpora import EMBEDDED
from tests.support.head import ROOT, Head
from tests.support.tars import read_tar, write_tar


@pytest.fixture(scope="module")
def head():
    with Head("--num-cpus=2") as started:
        yield started


@pytest.fixture(scope="module")
def submit(head, tmp_path_factory):
    """Calls `ecif submit`, with the cluster's token unless another is given, and the home of someone without one."""
    home = str(tmp_path_factory.mktemp("home"))

    def call(*arguments: object, **environment: str) -> Ended:
        given = head.environment | {"HOME": home} | environment
        command = [sys.executable, "-m", "jobs.cli", "submit", *map(str, arguments), "--address", head.address]
        done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=PATIENCE_S)
        return Ended(done.returncode, done.stdout, done.stderr.strip().splitlines())

    return call


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"RAY_AUTH_MODE": "disabled"}, "asks for a token"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": ""}, "asks for a token"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "another"}, "refuses the token that it was given"),
    ],
)
def test_another_token_is_one_line(submit, head, environment, says):
    ended = submit("/nowhere/config.yaml", **environment)
    assert (ended.code, ended.out, len(ended.lines)) == (2, "", 1), ended
    assert ended.last.startswith(f"ecif: {head.address}: the cluster {says}: set RAY_AUTH_MODE=token")
    assert head.token not in ended.last


def test_a_run_is_submitted_followed_and_found_again(submit, head, corpus, tiny_model, tmp_path):
    plain = write_config(tmp_path, tmp_path / "run", corpus, tiny_model)
    config = tmp_path / f'it\'s a $(touch {tmp_path.name}); `id` "night" & run.yaml'
    os.rename(plain, config)
    ended = submit(config)
    assert ended.code == 0, ended
    assert "108 of 108 pairs scored" in ended.out
    assert (tmp_path / "run" / "run.json").exists()
    assert ended.lines[0].startswith("submitting ecif-it-s-a-")
    assert ended.lines[1].startswith("as does: ray job submit --address http://127.0.0.1:")
    assert head.token not in ended.out + "".join(ended.lines)
    again = submit(config)
    assert again.code == 0
    assert again.out == ended.out
    assert again.lines[0].endswith("of today has ended, SUCCEEDED: nothing is started")
    assert submit(config, "--status").out.endswith(" SUCCEEDED\n")


def test_prometheus_sees_a_run_and_the_board_asks_for_nothing_else(submit, head, corpus, tiny_model, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(corpus, broken)
    image, *others = read_tar(broken / "corpus" / "00001.tar")
    write_tar(broken / "corpus" / "00001.tar", [(image[0], b"no image"), *others])
    config = write_config(tmp_path, tmp_path / "run", broken, tiny_model)
    asked = set(re.findall(r"ray_ecif_\w+", (ROOT / "infra" / "grafana.json").read_text()))
    assert asked == set(re.findall(r"ray_ecif_\w+", str(metrics.__doc__)))
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    for path in (first, second):
        shutil.copyfile(config, path)
    assert submit(first, "--nightly").code == 0
    write_tar(broken / "corpus" / "00003.tar", read_tar(EMBEDDED / "corpus" / "00001.tar")[: 3 * 36])
    assert submit(second, "--nightly", "--no-wait").code == 0
    expected = ['stage="embed",state="done"', 'stage="score",state="left"', 'reason="undecodable_image"', 'state="busy"']
    expected += ["ray_ecif_generation", 'measure="texts"', 'state="new"', "ray_ecif_night_misaligned", 'stage="drift"']
    seen, end = list[str](), time.monotonic() + PATIENCE_S
    while missing := [of for of in expected if not any(of in line for line in seen)]:
        assert time.monotonic() < end, missing
        seen += [line for line in head.metrics().splitlines() if line.startswith("ray_ecif_")]
        time.sleep(0.5)
    assert {line.partition("{")[0] for line in seen} == asked


def test_a_job_that_failed_is_started_again_only_when_asked(submit, tmp_path):
    config = tmp_path / "none.yaml"
    ended = submit(config)
    assert (ended.code, f"ecif: {config}: no such file" in ended.out) == (2, True), ended
    assert "FAILED" in ended.last
    assert submit(config).lines[0].endswith("FAILED: nothing is started; --retry starts it again")
    assert submit(config, "--retry", "--no-wait").lines[0] == f"{ended.lines[0]}-2"


def test_a_job_that_goes_on_is_found_and_stopped(submit, corpus, tiny_model, tmp_path):
    long = write_config(tmp_path, tmp_path / "run", corpus, tiny_model, fit={"folds": 2, "epochs": 500_000})
    assert submit(long, "--status").last.endswith("-DAY")
    started = submit(long, "--no-wait")
    name = started.out.strip()
    assert (started.code, started.lines[0]) == (0, f"submitting {name}")
    found = submit(long, "--no-wait")
    assert (found.out.strip(), found.lines) == (name, [f"{name} goes on: nothing is started"])
    assert submit(long, "--stop").code == 0
    ended = submit(long)
    assert ended.code == 1
    assert submit(long, "--status").out == f"{name} STOPPED\n"
