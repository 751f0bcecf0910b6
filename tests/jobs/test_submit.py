"""`ecif submit` before a cluster is there: names, quoting, and mistakes that are one line within seconds."""

import http.server
import shlex
import socket
import subprocess
import sys
import threading
import time
from datetime import date

import pytest

from jobs.cli import main
from jobs.submit import Attempt, attempt_of, entrypoint, run_name

NASTY = "/data/a b;$(touch x) `id` 'q\" & #.yaml"


@pytest.fixture
def ecif(monkeypatch, capsys):
    def call(*arguments: str) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["ecif", *arguments])
        with pytest.raises(SystemExit) as done:
            main()
        return int(done.value.code or 0), capsys.readouterr().err.strip().splitlines()

    return call


def test_a_name_is_a_function_of_the_place_alone():
    assert run_name("/shared/Night Run.yaml") == run_name("/shared/Night Run.yaml")
    assert run_name("/shared/Night Run.yaml").startswith("ecif-night-run-")
    assert run_name("/shared/a.yaml") != run_name("/other/a.yaml")
    for place in (NASTY, "s3://bucket/" + "x" * 500 + ".yaml", "/"):
        assert set(run_name(place)) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
        assert len(run_name(place)) < 50


def test_attempts_are_read_from_ids_and_ordered_by_day_and_number():
    run = run_name("/a.yaml")
    attempts = [Attempt(date(2026, 11, day), number) for day in (9, 10) for number in (1, 2, 10)]
    assert [attempt_of(run, attempt.id_of(run)) for attempt in attempts] == attempts == sorted(attempts)
    assert attempts[0].id_of(run) == f"{run}-2026-11-09"
    for other in (None, run, "raysubmit_x", f"{run_name('/b.yaml')}-2026-11-09", f"{run}-2026-11-09-x"):
        assert attempt_of(run, other) is None


def test_a_shell_gives_the_command_the_place_as_it_was_written():
    words = subprocess.run(f"printf '%s\\0' {entrypoint(NASTY)}", shell=True, capture_output=True, text=True, check=True).stdout
    assert words.split("\0")[:-1] == ["ecif", "run", NASTY] == shlex.split(entrypoint(NASTY))


def test_a_night_is_never_taken_for_a_run_of_the_same_configuration():
    place = "/shared/config.yaml"
    run, night = run_name(place), run_name(place, nightly=True)
    today = Attempt(date(2026, 11, 28), 2)
    assert attempt_of(run, today.id_of(run)) == attempt_of(night, today.id_of(night)) == today
    assert attempt_of(run, today.id_of(night)) is None
    assert attempt_of(night, today.id_of(run)) is None
    assert night == f"{run}-nightly"


@pytest.mark.parametrize(("exit_zero", "options"), [(False, []), (True, ["--exit-zero"])])
def test_the_command_of_a_night(exit_zero, options):
    assert shlex.split(entrypoint(NASTY, True, exit_zero)) == ["ecif", "nightly", NASTY, *options]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["config.yaml"], "config.yaml: the head node reads it, so it is an absolute path there or a URL"),
        (["https://x/c.yaml?Signature=abc"], "https://x/c.yaml?***: no credentials in CONFIG"),
        (["s3://user:secret@x/c.yaml"], "s3://***@x/c.yaml: no credentials in CONFIG"),
        (["/c.yaml", "--address", "127.0.0.1:8265"], "--address is http://HOST:8265"),
        (["/c.yaml", "--address", "ray://127.0.0.1:10001"], "--address is http://HOST:8265"),
        (["/c.yaml", "--address", "http://user:secret@127.0.0.1:8265"], "--address: no credentials in a URL"),
        (["/c.yaml", "--address", "http://nowhere.invalid:8265"], "http://nowhere.invalid:8265: "),
        (["/c.yaml", "--exit-zero"], "--exit-zero needs --nightly"),
        (["/c.yaml", "--retry", "--stop"], "give one of --retry, --status and --stop"),
    ],
)
def test_a_mistake_is_one_line(ecif, arguments, line):
    code, lines = ecif("submit", *arguments)
    assert (code, len(lines)) == (2, 1), lines
    assert lines[0].startswith(f"ecif: {line}")
    assert "secret" not in lines[0]
    assert "abc" not in lines[0]


def test_nobody_listens(ecif):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = f"http://127.0.0.1:{taken.getsockname()[1]}"
    started = time.monotonic()
    code, lines = ecif("submit", "/c.yaml", "--address", free)
    assert (code, len(lines)) == (2, 1)
    assert lines[0].startswith(f"ecif: {free}: Connection refused (has Ray a job server on the head, as ecif[cluster]")
    assert time.monotonic() - started < 10


def test_something_else_listens(ecif, monkeypatch):
    monkeypatch.setattr(http.server.BaseHTTPRequestHandler, "log_message", lambda *_: None)
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        code, lines = ecif("submit", "/c.yaml", "--address", f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert (code, len(lines)) == (2, 1)
    assert "what listens there is no job server of Ray" in lines[0]


def test_a_server_that_accepts_and_says_nothing(ecif, monkeypatch):
    monkeypatch.setattr("jobs.job_server.ANSWER_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        code, lines = ecif("submit", "/c.yaml", "--address", f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert (code, len(lines)) == (2, 1)
    assert "no answer within 1 s" in lines[0] or "timed out" in lines[0]
