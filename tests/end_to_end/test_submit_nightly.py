"""Nights handed in to a real head: their exit codes come out as they are. An `ecif` stands in that ends as its CONFIG says."""

import os
import subprocess
import sys

import pytest

from jobs.submit import NIGHTS
from tests.support.command import PATIENCE_S, Ended
from tests.support.head import Head


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """One whose jobs find the stand-in before any other `ecif`."""
    folder = tmp_path_factory.mktemp("bin")
    stand_in = folder / "ecif"
    stand_in.write_text('#!/bin/sh\necho "stand-in: $*"\n[ "$3" = --exit-zero ] && exit 0\nexit "$(cat "$2")"\n')
    stand_in.chmod(0o755)

    class Standing(Head):
        @property
        def environment(self) -> dict[str, str]:
            given = super().environment
            return given | {"PATH": f"{folder}{os.pathsep}{given['PATH']}"}

    with Standing("--num-cpus=1") as started:
        yield started


@pytest.fixture
def submit(head):
    def call(*arguments: object) -> Ended:
        command = [sys.executable, "-m", "jobs.cli", "submit", *map(str, arguments), "--address", head.address]
        done = subprocess.run(command, env=head.environment, capture_output=True, text=True, timeout=PATIENCE_S)
        return Ended(done.returncode, done.stdout, done.stderr.strip().splitlines())

    return call


@pytest.fixture
def ends_with(tmp_path):
    def write(code: int) -> str:
        config = tmp_path / f"config-{code}.yaml"
        config.write_text(str(code))
        return str(config)

    return write


def how(code: int) -> str:
    return f"{NIGHTS[code]} (exit code {code})"


@pytest.mark.parametrize("code", NIGHTS)
def test_a_night_that_has_not_failed(submit, ends_with, code):
    config = ends_with(code)
    ended = submit(config, "--nightly")
    name = ended.lines[0].removeprefix("submitting ")
    assert ended.code == code, ended
    assert f"stand-in: nightly {config}" in ended.out.splitlines()
    assert ended.lines[1].endswith(f"--submission-id {name} -- ecif nightly {config}")
    assert ended.last == f"{name} has ended: {how(code)}"


def test_a_deadline_is_no_failure_that_retry_starts_again(submit, ends_with):
    config = ends_with(11)
    (name,) = submit(config, "--nightly", "--no-wait").out.split()
    assert submit(config, "--nightly").code == 11
    again = submit(config, "--nightly", "--retry", "--exit-zero")
    assert (again.code, again.lines[0]) == (0, f"{name} of today has ended, {how(11)}: nothing is started")
    assert submit(config, "--nightly", "--status").out == f"{name} {how(11)}\n"


def test_an_uneventful_night_with_exit_zero_is_no_failed_job(submit, ends_with):
    config = ends_with(10)
    ended = submit(config, "--nightly", "--exit-zero")
    assert ended.code == 0, ended
    assert f"stand-in: nightly {config} --exit-zero" in ended.out.splitlines()
    assert submit(config, "--nightly", "--status").out.endswith(" SUCCEEDED\n")


def test_a_night_and_a_run_of_one_configuration_are_two_jobs(submit, ends_with):
    config = ends_with(0)
    assert f"stand-in: run {config}" in submit(config).out.splitlines()
    assert f"stand-in: nightly {config}" in submit(config, "--nightly").out.splitlines()


def test_a_night_that_failed_is_started_again_when_asked(submit, ends_with):
    config = ends_with(1)
    ended = submit(config, "--nightly")
    assert ended.code == 1
    assert ended.last.endswith("(--retry starts it again)")
    assert "FAILED" in ended.last
    again = submit(config, "--nightly", "--retry")
    assert (again.code, again.lines[0]) == (1, f"{ended.lines[0]}-2")
