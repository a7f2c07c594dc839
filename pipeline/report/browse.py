"""A local page over shards, maps and students: pick an example, point at a word, see where each looks.

Listens on the loopback address only and answers only requests that name it with its port, so no other site's page can
read the data through a browser. Nothing a request says becomes a path: files are served from a fixed table.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

import numpy as np

from pipeline.errors import UserError
from pipeline.report import theme
from pipeline.report.library import MOST_ROWS, Library, Missing

if TYPE_CHECKING:
    from pipeline.config import Config

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")
MIME = {"jpg": "image/jpeg", "png": "image/png", "webp": "image/webp", "gif": "image/gif", "bmp": "image/bmp"}
FILES = {
    "/": ("browse.html", "text/html"),
    "/browse.js": ("browse.js", "text/javascript"),
    "/browse.css": ("browse.css", "text/css"),
}
ABOUT = b'<script type="application/json" id="about">'
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def serve(cfg: Config, port: int = 8765, ready: Callable[[str], object] = print) -> None:
    """Serves until interrupted.

    Args:
        port: 0 takes any free one.
        ready: called with the address.

    Raises:
        UserError: no shards, or the port is taken.
    """
    library = Library(cfg)
    try:
        server = ThreadingHTTPServer((HOST, port), handler(library))
    except OSError as error:
        raise UserError(f"port {port} is not free ({error.strerror}): give another with --port") from error
    server.daemon_threads = True
    library.warm()
    with server:
        ready(f"http://{HOST}:{server.server_port}/")
        server.serve_forever()


def handler(library: Library) -> type[BaseHTTPRequestHandler]:
    """The request handler over a library."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1  # head and body in one packet: apart they would wait for the receiver's acknowledgement

        def handle(self) -> None:
            with suppress(ConnectionError):  # the reader went on before this answer was there
                super().handle()

        def do_GET(self) -> None:
            port = self.server.server_address[1]
            if self.headers.get("Host", "") not in [f"{name}:{port}" for name in NAMES]:
                self._send(HTTPStatus.FORBIDDEN, b"only for this machine", "text/plain")
                return
            if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
                self._send(HTTPStatus.FORBIDDEN, b"only for its own page", "text/plain")
                return
            url = urlsplit(self.path)
            query = {key: values[0] for key, values in parse_qs(url.query).items()}
            try:
                body, mime = answer(library, url.path, query)
            except Missing as error:
                self._send(HTTPStatus.NOT_FOUND, str(error).encode(), "text/plain")
            except UserError as error:
                self._send(HTTPStatus.INTERNAL_SERVER_ERROR, str(error).encode(), "text/plain")
            else:
                self._send(HTTPStatus.OK, body, mime)

        def _send(self, status: HTTPStatus, body: bytes, mime: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", f"{mime}; charset=utf-8" if mime.startswith("text") else mime)
            self.send_header("Content-Length", str(len(body)))
            for name, value in HEADERS.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Quiet: a line for every request would hide the address."""

    return Handler


def answer(library: Library, path: str, query: dict[str, str]) -> tuple[bytes, str]:
    """Body and type of one request.

    Raises:
        Missing: nothing there, or a request that makes no sense.
    """
    if path in FILES:
        name, mime = FILES[path]
        body = (files("pipeline.report") / "templates" / name).read_bytes()
        if path == "/":
            told = _json(library.about())[0].replace(b"<", b"\\u003c")  # so that no name ends its element
            body = body.replace(ABOUT + b"{}", ABOUT + told)
        return (theme.css().encode() + body if name.endswith(".css") else body), mime
    if path == "/about":
        return _json(library.about())
    split = query.get("split", "")
    if path == "/rows":
        numbers = [_number(text) for text in query.get("of", "").split(",", MOST_ROWS)[:MOST_ROWS]]
        return _json({"rows": library.rows(split, numbers)})
    if path == "/search":
        return _json(library.search(split, query.get("q", "").strip()[:200]))
    index = _number(query.get("index", ""))
    if path == "/example":
        return _json(library.describe(split, index))
    if path == "/maps":
        words, maps, states, ranges = library.maps(split, index, query.get("kind", ""), query.get("name", ""))
        data = base64.b64encode(np.ascontiguousarray(maps, dtype=np.uint8).tobytes()).decode()
        return _json({"words": [list(word) for word in words], "maps": data, "status": states, "range": ranges})
    if path == "/image":
        one = library.example(split, index)
        if one.image is None:
            raise Missing("this example has no image")
        return one.image, MIME.get(one.ext, "application/octet-stream")
    raise Missing(f"no page {path}")


def _number(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 12:
        raise Missing(f"no example '{text[:20]}'")
    return int(text)


def _json(content: dict) -> tuple[bytes, str]:
    return json.dumps(content, ensure_ascii=False).encode(), "application/json"
