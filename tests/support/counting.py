"""A way to an S3 server that counts what is asked of it. The lease is not counted: a run that takes longer asks more often."""

import contextlib
import re
import socket
import socketserver
import threading
from urllib.parse import urlsplit

HEAD = re.compile(rb"(GET|HEAD|PUT|POST|DELETE) (\S+) HTTP/1\.1\r\n")


class Counting(socketserver.ThreadingTCPServer):
    """Passes everything on to the S3 server at `url`, and keeps the method and the path of each request."""

    allow_reuse_address = daemon_threads = True

    def __init__(self, url: str):
        super().__init__(("127.0.0.1", 0), _Connection)
        there = urlsplit(url)
        self.target, self.asked = (there.hostname, there.port), list[tuple[str, str]]()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """Where clients find it."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def reads(self) -> int:
        """GET and HEAD of objects."""
        return sum(method in ("GET", "HEAD") and not _lists(path) for method, path in self.asked)

    def writes(self) -> int:
        """PUT, POST and listings, which stores bill alike."""
        return sum(method in ("PUT", "POST") or (method == "GET" and _lists(path)) for method, path in self.asked)


def _lists(path: str) -> bool:
    return "list-type=2" in path


class _Connection(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        with contextlib.suppress(OSError), socket.create_connection(self.server.target) as there:
            threading.Thread(target=self._answers, args=(there,), daemon=True).start()
            while asked := self.request.recv(1 << 16):
                head = HEAD.match(asked)  # a client waits for its answer before it asks again
                if head and b"lease" not in head[2]:
                    self.server.asked.append((head[1].decode(), head[2].decode()))
                there.sendall(asked)

    def _answers(self, there: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while answer := there.recv(1 << 16):
                self.request.sendall(answer)
