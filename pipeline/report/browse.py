"""A local page over shards, maps and students: pick an example, point at a word, see where it looks.

Only the example that is asked for is read, by its offset, so the size of the data does not matter. Listens on the
loopback address only and answers only requests that name it, so no other site's page can read the data through a
browser.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from threading import Lock
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

import numpy as np

from pipeline import receipts
from pipeline.errors import UserError
from pipeline.layout import Layout

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.examples import Example, Word

HOST = "127.0.0.1"
MIME = {"jpg": "image/jpeg", "png": "image/png", "webp": "image/webp", "gif": "image/gif", "bmp": "image/bmp"}
FILES = {
    "/": ("browse.html", "text/html"),
    "/browse.js": ("browse.js", "text/javascript"),
    "/browse.css": ("browse.css", "text/css"),
}


class Missing(LookupError):
    """A request for something that is not there."""


class Library:
    """What the page can show of one configuration: examples by split, maps by teacher, attention by student.

    Raises:
        UserError: the data has no shards.
    """

    def __init__(self, cfg: Config):
        self.cfg, self.layout = cfg, Layout(cfg)
        folder = self.layout.examples_dir()
        self.splits = sorted((path.parent.name for path in folder.glob("*/manifest.json")), key=lambda s: s != "train")
        if not self.splits:
            raise UserError(f"{folder}: has no shards to browse: run make shard DATA={cfg.data.name}")
        self._archives: dict = {}
        self._stores: dict = {}
        self._students: dict = {}
        self._lock = Lock()  # one student at a time: its tap is not made for several threads

    def about(self) -> dict:
        """Names and sizes for the page's controls."""
        counts = {
            s: receipts.load(self.layout.examples_dir(s) / "manifest.json").counts["examples"] for s in self.splits
        }
        return {"data": self.cfg.data.name, "splits": counts, "students": [name for name, _ in self._runs()]}

    def example(self, split: str, index: int) -> Example:
        """One example.

        Raises:
            Missing: no such split or number.
        """
        from pipeline.archive import Archive

        if split not in self.splits:
            raise Missing(f"no split {split}")
        with self._lock:
            if split not in self._archives:
                self._archives[split] = Archive(self.layout.examples_dir(split))
        archive = self._archives[split]
        if not 0 <= index < len(archive):
            raise Missing(f"{split} has {len(archive)} examples")
        return archive[index]

    def describe(self, split: str, index: int) -> dict:
        """Turns, words with the places where they stand, and the teachers that have maps of the example."""
        one = self.example(split, index)
        return {
            "key": one.key,
            "source": one.source,
            "licence": one.licence,
            "image": one.image is not None,
            "turns": [{"role": turn.role, "text": turn.text} for turn in one.turns],
            "words": [list(word) for word in one.words()],
            "teachers": [name for name in self._teachers() if self._store(name, split) is not None],
            "meta": {key: value for key, value in one.meta.items() if key != "regions"},
        }

    def _teachers(self) -> list[str]:
        folder = self.layout.shards / "maps"
        return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []

    def _store(self, teacher: str, split: str):
        from pipeline.mapstore import MapStore

        place = self.layout.shards / "maps" / teacher / split
        if (teacher, split) not in self._stores:
            self._stores[teacher, split] = MapStore(place) if (place / "manifest.json").is_file() else None
        return self._stores[teacher, split]

    def _runs(self) -> list[tuple[str, object]]:
        from pipeline.evaluate.arms import find

        return [(run.name, run) for run in find(self.cfg)]

    def maps(self, split: str, index: int, kind: str, name: str) -> dict:
        """Every word's map of a teacher or a student: words and base64 of (W, 32, 32) bytes, 0 lowest and 255 highest.

        Raises:
            Missing: no such teacher, student or example.
        """
        one = self.example(split, index)
        if kind == "teacher":
            if name not in self._teachers() or (store := self._store(name, split)) is None:
                raise Missing(f"no maps of teacher {name} for {split}")
            found = store.get(one.key)
            words, maps = ([], np.zeros((0, 32, 32), np.uint8)) if found is None else (found.words, found.maps)
            states = [] if found is None else [int(state) for state in found.status]
        else:
            words, maps = self._student(name, one)
            states = [0] * len(words)
        return {
            "words": [list(word) for word in words],
            "maps": base64.b64encode(np.ascontiguousarray(maps, dtype=np.uint8).tobytes()).decode(),
            "status": states,
        }

    def _student(self, name: str, one: Example) -> tuple[list[Word], np.ndarray]:
        import torch

        from pipeline.evaluate.arms import load
        from pipeline.evaluate.attention import as_bytes
        from pipeline.student.batch import EncodeError
        from pipeline.student.capture import AttentionTap, student_maps

        run = dict(self._runs()).get(name)
        if run is None:
            raise Missing(f"no student {name}")
        with self._lock:
            if name not in self._students:
                self._students[name] = load(self.cfg, run, "cpu")
            student = self._students[name]
            try:
                batch = student.family.encode([one], train=False)
            except EncodeError as error:
                raise Missing(f"{name} cannot take this example: {error}") from error
            with AttentionTap(student.model, student.family) as tap, torch.inference_mode():
                tap.rows(batch.words)
                student.model(**batch.inputs)
                maps_WHW = student_maps(tap, batch).mean((1, 2)).numpy()
        maps = [as_bytes(map_HW) for map_HW in maps_WHW]
        return list(batch.words.word), np.stack(maps) if maps else np.zeros((0, 32, 32), np.uint8)


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
    with server:
        ready(f"http://{HOST}:{server.server_port}/")
        server.serve_forever()


def handler(library: Library) -> type[BaseHTTPRequestHandler]:
    """The request handler over a library."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            host = self.headers.get("Host", "").rpartition(":")[0]
            if host not in (HOST, "localhost"):
                self._send(HTTPStatus.FORBIDDEN, b"only for this machine", "text/plain")
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
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Content-Security-Policy", "default-src 'self'; img-src 'self' data:")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Quiet: a line for every hovered word would hide the address."""

    return Handler


def answer(library: Library, path: str, query: dict[str, str]) -> tuple[bytes, str]:
    """Body and type of one request.

    Raises:
        Missing: nothing there, or a request that makes no sense.
    """
    if path in FILES:
        name, mime = FILES[path]
        return (files("pipeline.report") / "templates" / name).read_bytes(), mime
    if path == "/about":
        return _json(library.about())
    split, number = query.get("split", ""), query.get("index", "")
    if not number.isdecimal() or len(number) > 12:
        raise Missing(f"no example '{number}'")
    index = int(number)
    if path == "/example":
        return _json(library.describe(split, index))
    if path == "/maps":
        return _json(library.maps(split, index, query.get("kind", ""), query.get("name", "")))
    if path == "/image":
        one = library.example(split, index)
        if one.image is None:
            raise Missing("this example has no image")
        return one.image, MIME.get(one.ext, "application/octet-stream")
    raise Missing(f"no page {path}")


def _json(content: dict) -> tuple[bytes, str]:
    return json.dumps(content, ensure_ascii=False).encode(), "application/json"
