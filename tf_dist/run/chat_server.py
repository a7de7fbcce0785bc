"""``tf-dist chat --serve``: a page on this machine's loopback address, with text that streams.

It answers requests from this machine alone: it listens on 127.0.0.1, and a page of another site, which a
browser here may show, is refused by its ``Host`` and ``Origin``. Nothing is read from disk, nothing is kept.
"""

from __future__ import annotations

import html
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tf_dist.errors import DataError, TfDistError, UsageError
from tf_dist.run.generate import Sampling
from tf_dist.untrusted_files import parsed_json, read_bytes

HOST = "127.0.0.1"
PAGE = Path(__file__).with_name("chat.html")
MOST_BYTES, MOST_TOKENS = 1 << 20, 4096
# Prompt, tokens, sampling -> pieces of text.
Continue = Callable[[str, int, Sampling], Iterator[str]]


def server(port: int, title: str, go_on: Continue, check: Callable[[str], None]) -> ThreadingHTTPServer:
    """A server that is not running yet.

    Args:
        port: to listen on; 0: any.
        title: of the page.
        go_on: continues a text; called by one request at a time.
        check: refuses a prompt, before anything is sent.

    Raises:
        UsageError: the port cannot be had.
    """
    page = read_bytes(PAGE, MOST_BYTES, follow=True).decode()
    page = page.replace("TITLE", html.escape(title))
    made = type("ChatHandler", (_Handler,), {
        "page": page.encode(), "go_on": staticmethod(go_on), "check": staticmethod(check),
        "turn": threading.Lock(),
    })  # fmt: skip
    try:
        return ThreadingHTTPServer((HOST, port), made)
    except OSError as error:
        raise UsageError(f"--serve {port}: {error.strerror}. Choose another port") from error


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    page: bytes
    go_on: Continue
    check: Callable[[str], None]
    turn: threading.Lock
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "tf_dist", ""
    timeout = 60

    def do_GET(self) -> None:
        """The page."""
        if not self._is_ours() or self.path != "/":
            self._refuse(HTTPStatus.NOT_FOUND, "no such page")
            return
        self.send_response(HTTPStatus.OK)
        self._headers("text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(self.page)))
        self.end_headers()
        self.wfile.write(self.page)

    def do_POST(self) -> None:
        """``/generate``: ``{"prompt": ..., "tokens": N, "temperature": X}`` -> text, as it comes."""
        if not self._is_ours() or self.path != "/generate":
            self._refuse(HTTPStatus.NOT_FOUND, "no such page")
            return
        try:
            prompt, tokens, sampling = self._asked()
            self.check(prompt)
        except TfDistError as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
            return
        self.send_response(HTTPStatus.OK)
        self._headers("text/plain; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with self.turn:
            for piece in self.go_on(prompt, tokens, sampling):
                self._chunk(piece.encode())
        self._chunk(b"")

    def _asked(self) -> tuple[str, int, Sampling]:
        """What a request asks for.

        Raises:
            DataError, UsageError: it is none, or a value is out of range.
        """
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MOST_BYTES:
            raise DataError(f"a request has at most {MOST_BYTES} bytes, and says how many")
        try:
            found = parsed_json(self.rfile.read(int(length)))
        except ValueError as error:
            raise DataError("the request is not JSON") from error
        found = found if isinstance(found, dict) else {}
        prompt, tokens = found.get("prompt"), found.get("tokens", 200)
        temperature = found.get("temperature", Sampling().temperature)
        if not isinstance(prompt, str) or not isinstance(tokens, int) or isinstance(tokens, bool):
            raise DataError("the request has no prompt, or a number of tokens that is none")
        if not 0 < tokens <= MOST_TOKENS:
            raise DataError(f"tokens is {tokens}: 1 to {MOST_TOKENS}")
        if isinstance(temperature, bool) or not isinstance(temperature, int | float):
            raise DataError("temperature is no number")
        return prompt, tokens, Sampling(temperature=float(temperature))

    def _is_ours(self) -> bool:
        assert isinstance(self.server, ThreadingHTTPServer)
        port = self.server.server_port
        names = {f"{HOST}:{port}", f"localhost:{port}"}
        origin = self.headers.get("Origin")
        return self.headers.get("Host") in names and (
            origin is None or origin.removeprefix("http://") in names
        )

    def _headers(self, kind: str) -> None:
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header(
            "Content-Security-Policy",
            "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'",
        )

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        data = message.encode()
        self.send_response(status)
        self._headers("text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged: prompts are nobody's business."""
