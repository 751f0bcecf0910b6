"""An address where no cluster is: one line within seconds, and an answer to signals meanwhile."""

import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from pipeline.workers import address
from pipeline.workers.address import why_not


@pytest.fixture
def silent():
    """A port that accepts, and never says a word."""
    with socket.create_server(("", 0)) as listening:  # Ray takes this machine's own address for 127.0.0.1
        listening.settimeout(60)
        yield listening


@pytest.fixture
def web():
    """The port of a web server."""
    with http.server.HTTPServer(("", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.socket
        server.shutdown()


def place(listening: socket.socket) -> str:
    return f"127.0.0.1:{listening.getsockname()[1]}"


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = place(taken)
    assert why_not(free).endswith(f"{free.partition(':')[2]}: Connection refused")


@pytest.mark.parametrize("where", ["silent", "web"])
def test_something_else_listens(where, request, monkeypatch):
    monkeypatch.setattr(address, "ANSWER_S", 6.0)
    assert why_not(place(request.getfixturevalue(where))) == "no Ray answers there within 6 s"


@pytest.mark.parametrize(
    "malformed", ["somewhere", "127.0.0.1", "127.0.0.1:ray", "127.0.0.1:99999", "127.0.0.1:80", ":6379", "a b:1"]
)
def test_a_malformed_address(malformed):
    assert why_not(malformed) == "that is no host:port, with a port from 1024 to 65535"


def test_a_host_without_an_address():
    assert why_not("nowhere.invalid:6379").startswith("nowhere.invalid:6379: ")


@pytest.mark.parametrize("url", ["ray://127.0.0.1:10001", "http://127.0.0.1:8265"])
def test_a_client_or_a_job_server_is_no_node(url):
    assert "ecif submit" in why_not(url)


JOIN = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what goes on in the background deaf to it
from pipeline.errors import RunError, UserError
from pipeline.workers.cluster import session
try:
    with session(None):
        pass
except (RunError, UserError) as error:
    print(type(error).__name__, error)
"""


def join(where: str) -> "subprocess.Popen[str]":
    environment = os.environ | {"RAY_ADDRESS": where}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", JOIN], env=environment, stdout=pipe, stderr=pipe, text=True)


def test_a_session_at_a_wrong_address_is_the_users_mistake():
    out, errors = join(" ray://127.0.0.1:10001 ").communicate(timeout=120)
    assert (out.splitlines(), errors) == ([out.strip()], "")
    assert out.startswith("UserError RAY_ADDRESS=ray://127.0.0.1:10001: a run joins a cluster on one of its nodes")
    assert "without it Ray is started on this machine" in out


@pytest.mark.parametrize("told", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_answered_while_nobody_answers(silent, told):
    command = join(place(silent))
    silent.accept()  # it asks now
    started = time.monotonic()
    command.send_signal(told)
    out, errors = command.communicate(timeout=60)
    assert time.monotonic() - started < 5
    assert (out.splitlines(), errors) == ([out.strip()], "")
    assert out.startswith("RunError the run failed: it was told to stop")
