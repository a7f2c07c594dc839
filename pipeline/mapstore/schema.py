"""What a group of the map store holds, and how a chunk is packed and vouched for.

::

    maps   (W, 32, 32) u1   one word's attention over the whole image, min-max to 0..255  (profile `exact`)
           (W, 32, 16) u1   the same in steps of 17, two cells to a byte, even column low  (profile `compact`)
    range  (W, 2) f4        minimum and maximum before the scaling, so that raw values can be had again
    status (W,) u1          see STATUS
    turn, start, end (W,) i4   the word: characters start:end of a turn
    offsets (N+1,) i8       words of example n are rows offsets[n]:offsets[n+1]
    key    (N,) string      keys of the examples, in the tar's order

Every chunk is Blosc (zstd; bitshuffle but for nibbles) with a CRC-32C behind it, inside the shard for `maps`. Group
attributes hold for every chunk a digest of its decoded bytes, salted with shard, array and position: a chunk that is
sound in itself but lies in the wrong place does not pass.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import google_crc32c
import numpy as np

from pipeline.examples import Word
from pipeline.receipts import Damaged

SIDE = 32
SCHEMA = 1
ATTRIBUTE = "lavender"
PROFILES = ("exact", "compact")
STATUS = {"ok": 0, "no_window": 1, "constant": 2, "failed": 3}
CHUNK = 64  # maps per chunk: an example reads one or two
SHARD = 4096  # maps per file
INDEX_ENTRY = 16  # bytes per chunk in the index of a Zarr shard: offset and length
LEVEL = 5
_RESIDUE = 0x48674BC7
_as_word = partial(tuple.__new__, Word)  # what Word._make does, three times as fast


class Spans(Sequence[Word]):
    """Words as an array holds them, (W, 3) turn, start and end; a `Word` is made of one when it is looked at."""

    __slots__ = ("_spans_W3",)

    def __init__(self, spans_W3: np.ndarray):
        self._spans_W3 = spans_W3

    def __len__(self) -> int:
        return len(self._spans_W3)

    def __getitem__(self, place):
        found = self._spans_W3[place].tolist()
        return list(map(_as_word, found)) if isinstance(place, slice) else _as_word(found)

    def __iter__(self) -> Iterator[Word]:
        return map(_as_word, self._spans_W3.tolist())

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Sequence) else NotImplemented

    __hash__ = None  # as of a list

    def __repr__(self) -> str:
        return repr(list(self))


@dataclass(frozen=True)
class ExampleMaps:
    """The maps of one example.

    Args:
        words: W words, each a span of a turn; repeats are different words.
        maps: (W, 32, 32) uint8; zeros where the status is not ok.
        range: (W, 2) float32, minimum and maximum of the raw map.
        status: (W,) uint8, values of STATUS.
    """

    key: str
    words: Sequence[Word]
    maps: np.ndarray
    range: np.ndarray
    status: np.ndarray

    def unit(self) -> np.ndarray:
        """(W, 32, 32) float32 in 0..1, each map min-max scaled."""
        return self.maps.astype(np.float32) / 255

    def raw(self) -> np.ndarray:
        """(W, 32, 32) float32, the attention itself, as exact as the stored levels allow."""
        low, high = self.range[:, 0, None, None], self.range[:, 1, None, None]
        return low + self.unit() * (high - low)


def example_maps(
    key: str, words: Sequence[Word], raw_WHW: np.ndarray, known_W: np.ndarray | None = None
) -> ExampleMaps:
    """Maps as stored, from raw attention.

    Args:
        raw_WHW: (W, 32, 32) float; rows that no teacher window covers may hold anything.
        known_W: (W,) bool, False where the teacher had no window for a word.

    Raises:
        ValueError: a known map is not finite.
    """
    raw = np.asarray(raw_WHW, np.float32).reshape(len(words), SIDE, SIDE)
    known = np.ones(len(words), bool) if known_W is None else np.asarray(known_W, bool)
    if not np.isfinite(raw[known]).all():
        raise ValueError(f"example {key} has a map that is not finite")
    raw = np.where(known[:, None, None], raw, np.float32(0))
    low, high = raw.min(axis=(1, 2), initial=np.inf), raw.max(axis=(1, 2), initial=-np.inf)
    span = np.where(high > low, high - low, 1).astype(np.float32)
    levels = np.rint((raw - low[:, None, None]) / span[:, None, None] * 255).astype(np.uint8)
    status = np.where(known, np.where(high > low, STATUS["ok"], STATUS["constant"]), STATUS["no_window"])
    return ExampleMaps(
        key, list(words), levels, np.stack([low, high], axis=1).astype(np.float32), status.astype(np.uint8)
    )


# --- profiles -------------------------------------------------------------------------------------------------------


def pack(maps_WHW: np.ndarray, profile: str) -> np.ndarray:
    """Levels as the profile stores them."""
    if profile == "exact":
        return maps_WHW
    nibbles = ((maps_WHW.astype(np.uint16) + 8) // 17).astype(np.uint8)
    return nibbles[:, :, 0::2] | nibbles[:, :, 1::2] << 4


def unpack(stored_WHX: np.ndarray, profile: str) -> np.ndarray:
    """Levels 0..255 from what the profile stores."""
    if profile == "exact":
        return stored_WHX
    maps = np.empty((*stored_WHX.shape[:2], SIDE), np.uint8)
    np.multiply(stored_WHX & 15, 17, out=maps[:, :, 0::2])
    np.multiply(stored_WHX >> 4, 17, out=maps[:, :, 1::2])
    return maps


def stored_width(profile: str) -> int:
    """Bytes per row of a stored map."""
    return SIDE if profile == "exact" else SIDE // 2


# --- chunks ---------------------------------------------------------------------------------------------------------


def salted_digest(shard: str, array: str, position: int, data: bytes | np.ndarray) -> int:
    """CRC-32C of a chunk's decoded bytes, begun with the chunk's place."""
    return google_crc32c.extend(google_crc32c.value(f"{shard}/{array}/{position}".encode()), data)


def is_sound(encoded: bytes) -> bool:
    """Whether a chunk fits the CRC-32C behind it: any bytes with their own behind them have the same one."""
    return len(encoded) >= 20 and google_crc32c.value(encoded) == _RESIDUE


def decode_chunk(encoded: bytes, where: str, into: np.ndarray | None = None) -> bytes | np.ndarray:
    """The decoded bytes of a chunk, in an array if one is given.

    Raises:
        Damaged: the CRC-32C behind it does not fit, or its size is not that of `into`; `where` is named.
    """
    from numcodecs import blosc

    # The checksum stays behind the chunk, for a copy without it would cost as much; Blosc's header says where it ends.
    if not is_sound(encoded):
        raise Damaged(f"{where}: the chunk is damaged: run precompute again")
    if into is None:
        return blosc.decompress(encoded)
    if int.from_bytes(encoded[4:8], "little") != into.nbytes:  # the size that Blosc's header states
        raise Damaged(f"{where}: the chunk has the wrong size: run precompute again")
    return blosc.decompress(encoded, into)
