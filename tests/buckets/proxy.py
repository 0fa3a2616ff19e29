"""An HTTP proxy on loopback before the real server, for what that one won't do on demand.

A rule sees each request (method, path, body size) and may answer in the server's place.
"""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import unquote


@dataclass(frozen=True)
class Request:
    """A request.

    Attributes:
        path: without escapes.
        headers: by names in small letters.
    """

    method: str
    path: str
    headers: dict[str, str]

    @property
    def creates(self) -> bool:
        """Whether it is a create-only put."""
        if_none = self.headers.get("if-none-match") == "*"
        return self.method == "PUT" and (if_none or self.headers.get("x-goog-if-generation-match") == "0")


@dataclass(frozen=True)
class Answer:
    """What happens to a request.

    Attributes:
        status: the answer; None passes the server's on.
        applied: let the server see the request all the same.
        delay_s: before the answer.
        cut: break the connection after half of the answer's body, or before any answer if there is none.
    """

    status: int | None = None
    applied: bool = True
    delay_s: float = 0.0
    cut: bool = False


Rule = Callable[[Request], Answer | None]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        request = Request(self.command, unquote(self.path), {k.lower(): v for k, v in self.headers.items()})
        answer = self.server.proxy.rule(request) or Answer()
        status, headers, data = 503, {}, b""
        if answer.applied:
            status, headers, data = self.forward(request.headers, body)
        time.sleep(answer.delay_s)
        if answer.status is not None:
            data = b"" if answer.status == 200 else b"<Error><Code>Refused</Code></Error>"
            status, headers = answer.status, {"etag": '"made-up"'}
        self.answer(status, headers, data, cut=answer.cut)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any  # noqa: N815

    def forward(self, said: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.proxy.port, timeout=30)
        headers = {k: v for k, v in said.items() if k != "connection"}
        connection.request(self.command, self.path, body or None, headers)
        got = connection.getresponse()
        data = got.read()
        kept = {k.lower(): v for k, v in got.getheaders() if k.lower() != "transfer-encoding"}
        connection.close()
        return got.status, kept, data

    def answer(self, status: int, headers: dict[str, str], data: bytes, *, cut: bool) -> None:
        if cut and (not data or self.command != "GET"):
            self.hang_up()
            return
        self.send_response_only(status)
        for name, value in {"content-length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.hang_up()

    def hang_up(self) -> None:
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    proxy: Proxy

    def handle_error(self, *_: object) -> None:
        """A client that gave up is what these tests are about."""


class Proxy:
    """Runs while it is entered; `rule` may be changed at any time.

    Args:
        port: of the server behind it.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.rule: Rule = lambda request: None
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
