"""What the whole pipeline talks about: an example, its turns, the words of a turn, and its image as models see it."""

import io
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import regex
from PIL import Image, ImageOps, UnidentifiedImageError

IMAGE_MARKER = "<image>"
VIDEO_MARKER = "<video>"
MAX_PIXELS = 64_000_000  # below Pillow's own warning, far above any training image
MAX_CHARS = 100_000

OK = "ok"
NO_IMAGE = "no_image"  # text only: trains the language loss
UNSUPPORTED = "unsupported"  # several images or video: counted, never a failure
KEPT = (OK, NO_IMAGE)
NOT_FAILED = (OK, NO_IMAGE, UNSUPPORTED)

ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


class InvalidExample(ValueError):
    """An input that cannot become an example: `status` is a short name for counting, the message says why."""

    def __init__(self, status: str, reason: str):
        super().__init__(reason)
        self.status = status
        self.reason = reason

    def __reduce__(self):
        return type(self), (self.status, self.reason)


class ImageError(ValueError):
    """Bytes that are not a readable still image within the bounds."""


class Turn(NamedTuple):
    """One utterance; `role` is system, user or assistant, `text` holds no image marker and no outer space."""

    role: str
    text: str


class Word(NamedTuple):
    """Characters `start:end` of the text of turn number `turn`."""

    turn: int
    start: int
    end: int


@dataclass(frozen=True)
class Example:
    """One conversation about at most one image.

    Args:
        key: `{shard:05d}{index:05d}`.
        image: the encoded image as it was given, or None for a text-only example.
        ext: the image's format by content (jpg, png, webp, ...), empty without an image.
        meta: anything the source knows; `meta["id"]` is its own name of the example, `meta["image"]` that of the image
            file, `meta["regions"]` the true regions of words where known: `{turn, start, end}` and `rle` or `boxes`
            (see `pipeline.regions`).
    """

    key: str
    image: bytes | None
    ext: str
    turns: tuple[Turn, ...]
    source: str
    split: str
    licence: str
    meta: dict[str, Any] = field(default_factory=dict)

    def words(self, roles: Sequence[str] = ("user", "assistant")) -> list[Word]:
        """The words of the turns with these roles, in reading order."""
        return [
            Word(number, start, end)
            for number, turn in enumerate(self.turns)
            if turn.role in roles
            for start, end in words(turn.text)
        ]

    def word_text(self, word: Word) -> str:
        """The characters of a word."""
        return self.turns[word.turn].text[word.start : word.end]


# --- words ----------------------------------------------------------------------------------------------------------

_BOUNDARY = regex.compile(r"(?w)\b")  # (?w): the default word boundaries of Unicode, UAX #29
_LETTER = regex.compile(r"[\p{L}\p{N}]")
_HAN = regex.compile(r"\p{Han}")
# Tags, chat control tokens and character entities are markup; "a < b" is not, nor is "x <3".
_MARKUP = regex.compile(r"<[/!|]?\p{L}[^<>\n]*>|&(?:\p{L}+|\#\d+|\#x[0-9A-Fa-f]+);")
_HYPHENS = frozenset("-\u2010\u2011")
_KEYCAP = "\u20e3"  # a digit under it is an emoji


def words(text: str) -> list[tuple[int, int]]:
    """Spans (start, end) of the words of a text: the only segmenter of the pipeline.

    Word boundaries are those of Unicode UAX #29. A contraction is one word, so is a hyphenated one ("well-known");
    each CJK ideograph is one; punctuation, emoji and markup are none. Scripts that UAX #29 leaves to dictionaries
    (Thai, Khmer) fall into their characters.
    """
    edges = [match.start() for match in _BOUNDARY.finditer(text)]
    if not edges:
        return []
    markup = [match.span() for match in _MARKUP.finditer(text)] if "<" in text or "&" in text else []
    spans: list[tuple[int, int]] = []
    for start, end in zip(edges, [*edges[1:], len(text)], strict=True):
        segment = text[start:end]
        if not _LETTER.search(segment) or _KEYCAP in segment:
            continue
        if any(low < end and start < high for low, high in markup):
            continue
        # UAX #29 keeps underscores inside a word; at its ends they are emphasis, not letters.
        start, end = start + len(segment) - len(segment.lstrip("_")), end - len(segment) + len(segment.rstrip("_"))
        if spans and _hyphenated(text, spans[-1], start, end):
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((start, end))
    return spans


def _hyphenated(text: str, before: tuple[int, int], start: int, end: int) -> bool:
    """Whether exactly one hyphen joins the span `before` to `start:end`, neither side being an ideograph."""
    return (
        start == before[1] + 1
        and text[before[1]] in _HYPHENS
        and not _HAN.search(text, start, end)
        and not _HAN.search(text, *before)
    )


# --- conversations --------------------------------------------------------------------------------------------------

_MARKER = regex.compile(r"\s*<image>\s*")
_NUMBERED_MARKER = regex.compile(r"<image_\d+>")
_BAD_CHARACTER = regex.compile("[\\x00\ud800-\udfff]")


def parse_turns(conversation: Any, has_image: bool, max_chars: int = MAX_CHARS) -> tuple[Turn, ...]:
    """Turns from a list of `{"from": ..., "value": ...}` or `{"role": ..., "content": ...}`.

    An optional system turn comes first, then user and assistant alternate and the assistant has the last word. The
    image marker may stand anywhere in the first user turn or be absent; it is removed with the space around it.

    Raises:
        InvalidExample: with status `empty_conversation`, `bad_conversation`, `bad_text`, `missing_image` (a marker
            without an image) or `unsupported` (several images, video).
    """
    if not isinstance(conversation, list) or not conversation:
        raise InvalidExample("empty_conversation", "the conversation is empty or not a list")
    raw = [_role_and_text(number, turn) for number, turn in enumerate(conversation)]
    if sum(len(text) for _, text in raw) > max_chars:
        raise InvalidExample("bad_text", f"the conversation is longer than {max_chars} characters")
    _check_order([role for role, _ in raw])
    markers = [text.count(IMAGE_MARKER) for _, text in raw]
    first_user = next(number for number, (role, _) in enumerate(raw) if role == "user")
    if any(VIDEO_MARKER in text for _, text in raw):
        raise InvalidExample(UNSUPPORTED, "the conversation is about a video")
    if sum(markers) > 1:
        raise InvalidExample(UNSUPPORTED, f"{sum(markers)} image markers: only one image is supported")
    if sum(markers) > markers[first_user]:
        raise InvalidExample(UNSUPPORTED, f"the image marker is in turn {markers.index(1)}, not in the first user turn")
    if markers[first_user] and not has_image:
        raise InvalidExample("missing_image", "the text has an image marker but the input names no image")
    turns = tuple(Turn(role, _without_marker(text)) for role, text in raw)
    for number, turn in enumerate(turns):
        bare_image = turn.role == "user" and number == first_user and has_image
        if not turn.text and not bare_image:
            raise InvalidExample("empty_conversation", f"turn {number} ({turn.role}) has no text")
    return turns


def _role_and_text(number: int, turn: Any) -> tuple[str, str]:
    if not isinstance(turn, Mapping):
        raise InvalidExample("bad_conversation", f"turn {number} is not an object")
    name = turn.get("from", turn.get("role"))
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise InvalidExample("bad_conversation", f"turn {number} has the unknown role {name!r}")
    text = turn.get("value", turn.get("content"))
    if isinstance(text, list):  # chat messages made of parts
        text = _join_parts(number, text)
    if not isinstance(text, str):
        raise InvalidExample("bad_conversation", f"turn {number} ({role}) has no text")
    text = _NUMBERED_MARKER.sub(IMAGE_MARKER, text) if "<image_" in text else text
    if bad := _BAD_CHARACTER.search(text):
        raise InvalidExample("bad_text", f"turn {number} has U+{ord(bad.group()):04X} at character {bad.start()}")
    return role, text


def _join_parts(number: int, parts: list) -> str:
    texts: list[str] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image", "image_url"):
            texts.append(IMAGE_MARKER)
        elif kind in ("video", "audio"):
            raise InvalidExample(UNSUPPORTED, f"turn {number} holds {kind}")
        else:
            raise InvalidExample("bad_conversation", f"turn {number} has a part of unknown type {kind!r}")
    return "\n".join(texts)


def _check_order(roles: list[str]) -> None:
    spoken = roles[1:] if roles[0] == "system" else roles
    for number, role in enumerate(spoken):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            turn = number + len(roles) - len(spoken)
            raise InvalidExample("bad_conversation", f"turn {turn} is from {role} where {expected} is expected")
    if len(spoken) % 2 or not spoken:
        raise InvalidExample("bad_conversation", "the conversation does not end with an answer")


def _without_marker(text: str) -> str:
    if IMAGE_MARKER in text:
        text = _MARKER.sub(lambda match: "\n" if "\n" in match.group() else " ", text)
    return text.strip()


# --- images ---------------------------------------------------------------------------------------------------------

# Only formats that Pillow decodes itself: others start programs (EPS) or fetch things (WMF).
_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif",
            "PPM": "ppm", "AVIF": "avif"}  # fmt: skip
_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)  # orientations that swap width and height
_NO_RANGE = "floating-point pixels have no fixed range"
# What Pillow raises on bytes that are not what they claim to be; anything else is a fault of the program.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, MemoryError,
           ZeroDivisionError, NotImplementedError, AssertionError, struct.error, zlib.error,
           Image.DecompressionBombError, Image.DecompressionBombWarning)  # fmt: skip


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image as every model and viewer gets it: first frame, upright by EXIF, alpha on white, 8-bit RGB.

    Raises:
        ImageError: not an image, an unknown format, truncated, or more than `max_pixels` pixels.
    """
    with _guarded():
        image = _open(data, max_pixels)
        image.load()
        # Without an orientation exif_transpose would only copy.
        return _to_rgb(image if _orientation(image) == 1 else ImageOps.exif_transpose(image))


def inspect_image(data: bytes, max_pixels: int = MAX_PIXELS, whole: bool = True) -> tuple[str, int, int]:
    """Extension by content, width and height (upright, in pixels) of an image.

    Args:
        whole: decode all of it; otherwise only its header is read.

    Raises:
        ImageError: as `decode`.
    """
    with _guarded():
        image = _open(data, max_pixels)
        width, height = image.size[::-1] if _orientation(image) in _TURNED else image.size
        if whole:
            # A JPEG is decoded at an eighth of its size, in grey: every bit of its data is read as for the whole image,
            # and whatever is wrong shows there; what is left out (transform, upsampling, colours) cannot fail.
            image.draft("L", (max(image.width // 8, 1), max(image.height // 8, 1)))
            image.load()
        if image.mode == "F":
            raise ImageError(_NO_RANGE)
        return _FORMATS[image.format], width, height


@contextmanager
def _guarded() -> Iterator[None]:
    """Turns whatever Pillow raises on broken bytes into ImageError."""
    try:
        yield
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError("not an image of a known format") from error
    except _BROKEN as error:
        # Reasons end up in tables that must not differ between runs, and an address would.
        reason = regex.sub(r" at 0x[0-9A-Fa-f]+", "", f"{type(error).__name__}: {error}".partition("\n")[0])
        raise ImageError(reason[:200]) from error


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """The image with its header read only."""
    if not data:
        raise ImageError("zero bytes")
    image = Image.open(io.BytesIO(data), formats=_readable())
    if image.width * image.height > max_pixels:
        raise ImageError(f"{image.width}x{image.height} pixels: more than {max_pixels}")
    return image


def _orientation(image: Image.Image) -> int:
    return image.getexif().get(_ORIENTATION, 1)


@cache
def _readable() -> tuple[str, ...]:
    """The formats this build of Pillow can open; MPO is opened as JPEG."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits per pixel; Pillow would clip instead of scaling
        image = image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
    if image.mode == "F":
        raise ImageError(_NO_RANGE)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
