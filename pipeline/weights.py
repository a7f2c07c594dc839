"""Names for the content of model directories. No torch here: the light status checks use it too."""

import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path

WHOLE = 64 << 20  # larger files are digested by samples
READ = (".json", ".txt", ".model", ".safetensors", ".bin", ".pt", ".jinja")  # what loading a model reads


def directory_digest(path: Path, files: Iterable[Path] | None = None) -> str:
    """sha256 over the configs, vocabularies and weights of a model directory, by their paths inside it.

    Weights of more than 64 MiB are digested by their size, their beginning (which holds every tensor's name, type and
    place) and 64 evenly spaced samples, so that billions of parameters take milliseconds.

    Args:
        files: the files that count; None takes every one with an ending that loaders read.
    """
    total = hashlib.sha256()
    for file in sorted(path.rglob("*") if files is None else files):
        if file.is_file() and file.suffix in READ:
            stat = file.stat()
            name = file.relative_to(path).as_posix()
            total.update(f"{name}:{_file_digest(file, stat.st_size, stat.st_mtime_ns)}\n".encode())
    return total.hexdigest()


@functools.lru_cache(maxsize=1024)
def _file_digest(file: Path, size: int, _mtime: int) -> str:
    found = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        if size <= WHOLE:
            found.update(stream.read())
        else:
            found.update(stream.read(1 << 20))
            for number in range(64):
                stream.seek(number * (size - (1 << 16)) // 63)
                found.update(stream.read(1 << 16))
    return found.hexdigest()
