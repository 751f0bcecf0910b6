"""A file behind a URL is fetched once a node, checked by hash, and its credentials appear nowhere."""

import hashlib
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipeline import storage
from pipeline.storage import cache
from pipeline.storage.cache import fetch, sha256_of
from pipeline.urls import masked

DATA = b"weights" * 1000


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "pause", lambda attempt: None)
    return tmp_path / "cache"


@pytest.fixture
def server():
    """Over HTTP: /w.pt with an ETag that follows the content, /private for a password only, /broken. Counts its downloads."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body):
            path = self.path.partition("?")[0]
            status = {"/w.pt": 200, "/private/w.pt": 200 if "Authorization" in self.headers else 403, "/broken": 500}.get(
                path, 404
            )
            self.send_response(status)
            self.send_header("Content-Length", str(len(server.data)))
            self.send_header("ETag", hashlib.md5(server.data).hexdigest())
            self.end_headers()
            if body and status == 200:
                server.downloads += 1
                self.wfile.write(server.data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.data, server.downloads = DATA, 0
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()


def test_many_processes_fetch_once(server):
    url = f"http://127.0.0.1:{server.server_port}/w.pt"
    first = fetch(url)
    assert first.read_bytes() == DATA and first.name == "w.pt"
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: fetch(url, sha256_of(first)), range(8))) == {first}
    assert fetch(url) == first
    assert server.downloads == 1


def test_workers_of_an_empty_node_fetch_once_too(server, tmp_path, monkeypatch):
    url, digest = f"http://127.0.0.1:{server.server_port}/w.pt", hashlib.sha256(DATA).hexdigest()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: fetch(url, digest), range(8)))
    assert server.downloads == 1


def test_other_bytes_than_the_drivers_are_refused(server):
    url = f"http://127.0.0.1:{server.server_port}/w.pt"
    digest = sha256_of(fetch(url))
    server.data = b"other" * 1000
    assert fetch(url, digest).read_bytes() == DATA  # this node has what the driver has
    new = fetch(url)
    assert new.read_bytes() == server.data
    with pytest.raises(OSError, match="another file than the driver has"):
        fetch(url, "0" * 64)


def test_a_file_of_the_cache_that_was_damaged_is_fetched_again(server):
    url = f"http://127.0.0.1:{server.server_port}/w.pt"
    fetch(url).write_bytes(b"damaged")
    assert fetch(url).read_bytes() == DATA


@pytest.mark.parametrize(
    ("path", "says"),
    [("absent.pt", "there is no such file"), ("private/w.pt", "access is refused"), ("broken", "HTTP|no such file|Error")],
)
def test_errors_name_the_object_and_no_credentials(server, path, says, caplog):
    url = f"http://127.0.0.1:{server.server_port}/{path}?token=secret"
    with caplog.at_level(logging.DEBUG, "ecif"), pytest.raises(OSError, match=says) as error:
        fetch(url)
    assert path in str(error.value)
    assert "secret" not in str(error.value) + caplog.text
    assert error.value.__cause__ is None and error.value.__suppress_context__


def test_a_password_in_a_url_is_used_and_not_shown(server, caplog, own_cache):
    url = f"http://me:secret@127.0.0.1:{server.server_port}/private/w.pt"
    with caplog.at_level(logging.DEBUG, "ecif"):
        assert fetch(url).read_bytes() == DATA
    assert "fetching http://***@127.0.0.1" in caplog.text
    assert "secret" not in caplog.text + " ".join(map(str, own_cache.rglob("*")))


def test_a_url_of_which_only_the_masked_form_was_kept():
    with pytest.raises(OSError, match="keeps no credentials"):
        fetch(masked("https://me:secret@host/w.pt"))


def test_from_s3(s3):
    storage.write_bytes(f"s3://{s3}/models/w.pt", DATA)
    assert fetch(f"s3://{s3}/models/w.pt").read_bytes() == DATA
    with pytest.raises(OSError, match="no such file"):
        fetch(f"s3://{s3}/models/absent.pt")


def test_a_protocol_that_nobody_knows():
    with pytest.raises(OSError, match=r"abc://x/w.pt: Protocol not known: abc"):
        fetch("abc://x/w.pt")


def test_without_a_home_the_folder_for_temporary_files_is_used(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path / "scratch"))
    path = fetch(f"http://127.0.0.1:{server.server_port}/w.pt")
    assert path.is_relative_to(tmp_path / "scratch") and path.parent.parent.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("/home/me/w.pt", "/home/me/w.pt"),
        ("s3://bucket/a/w.pt", "s3://bucket/a/w.pt"),
        ("https://me:pw@host:80/w.pt?X-Amz-Signature=1#x", "https://***@host:80/w.pt?***"),
    ],
)
def test_masked(url, shown):
    assert masked(url) == shown
