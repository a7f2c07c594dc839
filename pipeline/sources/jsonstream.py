"""JSON too large to load: lists, objects and JSON lines read element by element, from any record on.

In JSON lines a broken line is a failed input; in a list or an object nothing after a syntax error can be trusted, so
it is refused, naming the line.
"""

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.sources.base import Failure

_BLOCK = 1 << 20
_STRIDE = 500  # records between two offsets of the index
_SPACE = re.compile(r"[\s,]*")
_BLANK = re.compile(r"\s*")
_COLON = re.compile(r"\s*:\s*")


@dataclass(frozen=True)
class Index:
    """Where records start: byte offset and line of every `_STRIDE`-th one."""

    kind: str  # list, object or lines
    count: int
    offsets: tuple[tuple[int, int], ...]


def build_index(path: Path, objects: bool = False) -> Index:
    """One pass over the file.

    Args:
        objects: a file that begins with a brace is one large object, not JSON lines.

    Raises:
        UserError: not JSON, or broken JSON in a list; the line is named.
    """
    with path.open("rb") as handle:
        head = handle.read(4096).lstrip(codecs.BOM_UTF8).lstrip()
    if head[:1] not in (b"[", b"{"):
        raise UserError(f"{path}: is neither a JSON list nor JSON lines: check data.path")
    kind = "list" if head[:1] == b"[" else "object" if objects else "lines"
    offsets, count = [], 0
    for offset, line, _ in _read(path, kind, 0, 1):
        if count % _STRIDE == 0:
            offsets.append((offset, line))
        count += 1
    return Index(kind, count, tuple(offsets))


def records(path: Path, index: Index, start: int, stop: int) -> Iterator[tuple[int, Any]]:
    """Records `start:stop` with their numbers: elements of a list, (name, value) pairs of an object, lines.

    A broken line of JSON lines comes as a Failure.
    """
    if start >= stop:
        return
    offset, line = index.offsets[start // _STRIDE]
    number = start // _STRIDE * _STRIDE
    for _, where, value in _read(path, index.kind, offset, line):
        if number >= stop:
            return
        if number >= start:
            yield number, _parse_line(value, where) if index.kind == "lines" else value
        number += 1


def _read(path: Path, kind: str, offset: int, line: int) -> Iterator[tuple[int, int, Any]]:
    if kind == "lines":
        return _lines(path, offset, line)
    return _elements(path, offset, line, keyed=kind == "object")


def _parse_line(data: bytes, line: int) -> Any:
    try:
        return json.loads(data)
    except UnicodeDecodeError as error:
        return Failure("bad_json", f"line {line}: not UTF-8 ({error.reason})")
    except json.JSONDecodeError as error:
        return Failure("bad_json", f"line {line}: {error.msg} at character {error.pos}")
    except RecursionError:
        return Failure("bad_json", f"line {line}: nested too deeply")


def _lines(path: Path, offset: int, line: int) -> Iterator[tuple[int, int, bytes]]:
    with path.open("rb") as handle:
        handle.seek(offset)
        for data in handle:
            record = data if offset else data.removeprefix(codecs.BOM_UTF8)
            if record.strip():
                yield offset, line, record
            offset += len(data)
            line += 1


def _elements(path: Path, offset: int, line: int, keyed: bool = False) -> Iterator[tuple[int, int, Any]]:
    """Elements of a JSON list or, `keyed`, pairs of an object, with the byte offset and the line where each starts."""
    decoder = json.JSONDecoder()
    closing = "}" if keyed else "]"

    def parse(position: int) -> tuple[Any, int]:
        value, end = decoder.raw_decode(text, position)
        if not keyed:
            return value, end
        colon = _COLON.match(text, end)
        if colon is None:
            raise json.JSONDecodeError("Expecting ':' delimiter", text, end)
        name = value
        value, end = decoder.raw_decode(text, colon.end())
        return (name, value), end

    decode = codecs.getincrementaldecoder("utf-8")()
    text, position, ended = "", 0, False
    told = 0  # `offset` and `line` are those of this place of the text

    def broken(reason: str, where: int) -> UserError:
        here = line + text.count("\n", told, where)
        return UserError(f"{path}: broken JSON in line {here}: {reason}: repair the file")

    def advance() -> None:
        """Moves `offset` and `line` on to `position`, a record at a time: from the beginning would be quadratic."""
        nonlocal offset, line, told
        passed = text[told:position]
        offset += len(passed.encode())
        line += passed.count("\n")
        told = position

    with path.open("rb") as handle:
        handle.seek(offset)

        def more() -> bool:
            nonlocal text, position, told, ended
            block = handle.read(_BLOCK)
            try:
                fresh = decode.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise broken(f"not UTF-8 ({error.reason})", len(text)) from error
            advance()
            text, position, told = text[position:] + fresh, 0, 0
            ended = not block
            return not ended

        at_start = offset == 0
        more()
        if at_start:
            position = len(text) - len(text.lstrip("\ufeff \t\r\n")) + 1  # build_index has seen the bracket
        while True:
            position = _SPACE.match(text, position).end()
            if position == len(text):
                if not more():
                    raise broken("the list does not end", len(text))
                continue
            if text[position] == closing:
                position += 1
                while (position := _BLANK.match(text, position).end()) == len(text) and more():
                    pass
                if position < len(text):  # a second list, say, which would be lost without a word
                    raise broken(f"something follows the {'object' if keyed else 'list'}", position)
                return
            try:
                value, end = parse(position)
                cut = end == len(text)
            except json.JSONDecodeError as error:
                # Near the end of what was read the rest may be on its way; elsewhere it is a real error.
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(text) - 16
                if not cut or ended:
                    raise broken(error.msg, error.pos) from error
                value, end = None, position
            except RecursionError as error:
                raise broken("nested too deeply", position) from error
            if cut and not ended:
                more()
                continue
            advance()
            yield offset, line, value
            position = end
