"""Tars of other programs: an index of their members that notices when a tar ends too early.

Python's tarfile, like WebDataset, takes a tar that is cut off for one that ends there; here the difference is told.
"""

import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

from pipeline.sources.base import Failure


@dataclass(frozen=True)
class Member:
    """Where the data of a file lies in its tar."""

    name: str
    offset: int
    size: int


def read_index(path: Path) -> tuple[list[Member], Failure | None]:
    """All regular files of a tar in order, and what is wrong with it, if anything."""
    members: list[Member] = []
    size = path.stat().st_size
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                end = info.offset_data + -(-info.size // 512) * 512
                if info.offset_data + info.size > size:
                    return members, Failure("damaged_tar", f"{path.name} ends inside {info.name}")
                if info.isfile():
                    members.append(Member(info.name, info.offset_data, info.size))
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        return members, Failure("damaged_tar", f"{path.name}: {error}")
    with path.open("rb") as file:
        file.seek(end)
        if file.read(1024) != bytes(1024):
            last = members[-1].name if members else "its beginning"
            return members, Failure("damaged_tar", f"{path.name} ends or is damaged after {last}")
    return members, None


def read_member(path: Path, member: Member) -> bytes:
    """The bytes of a file in a tar."""
    handle = os.open(path, os.O_RDONLY)
    try:
        return os.pread(handle, member.size, member.offset)
    finally:
        os.close(handle)


def by_key(members: list[Member]) -> dict[str, dict[str, Member]]:
    """Members of each sample by extension, as WebDataset groups them: a key ends at the first dot of the file name."""
    groups: dict[str, dict[str, Member]] = {}
    for member in members:
        folder, _, name = member.name.rpartition("/")
        stem, dot, ext = name.partition(".")
        if dot and stem:
            groups.setdefault(f"{folder}/{stem}" if folder else stem, {})[ext.lower()] = member
    return groups
