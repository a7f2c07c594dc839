"""To and from the layout of the Lavender authors: `<image>/lpm_attention/<stem>/attention_<word>.jpg`, one per word.

That layout keeps 8 bits of a JPEG per word and names maps by the word's text alone. What it cannot hold is counted
on the way out, and what cannot be known is counted on the way in.
"""

import io
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline import receipts
from pipeline.archive.read import Archive
from pipeline.errors import UserError
from pipeline.examples import Example
from pipeline.mapstore.read import MapStore
from pipeline.mapstore.schema import SIDE, STATUS, ExampleMaps
from pipeline.mapstore.write import write_shard

FOLDER = "lpm_attention"
QUALITY = 95
_LOST = re.compile(r"[_./\\\x00]")  # characters that the authors' reader cannot find again, or a file name cannot have


@dataclass
class Exchange:
    """What happened to the words."""

    maps: int = 0
    examples: int = 0
    lost: Counter = field(default_factory=Counter)

    @property
    def summary(self) -> str:
        """One line for people."""
        lost = ", ".join(f"{count} {why}" for why, count in sorted(self.lost.items()))
        return f"{self.maps} maps of {self.examples} examples{f'; not kept: {lost}' if lost else ''}"


def export(archive: Archive, maps: MapStore, folder: Path) -> Exchange:
    """Writes a JPEG for every word that the layout can hold; the stem is that of the image's name, or else the key.

    Lost are repeats of a word, also in another example of the same image (the first stays), words with an underscore,
    dot or slash, the case of letters, the raw range, and status other than ok; everything kept is rounded by JPEG.
    """
    result = Exchange()
    written: dict[Path, str] = {}  # the words of each folder, joined by NUL: sets of them would be ten times as large
    for example in archive:
        stored = maps.get(example.key)
        if stored is None:
            result.lost["examples without maps"] += 1
            continue
        result.examples += 1
        target = _folder(folder, example)
        target.mkdir(parents=True, exist_ok=True)
        seen = set(written.get(target, "").split("\0"))
        for row, word in enumerate(stored.words):
            text = example.word_text(word).lower()
            why = _cannot_hold(text, seen, int(stored.status[row]))
            if why:
                result.lost[why] += 1
                continue
            seen.add(text)
            (target / f"attention_{text}.jpg").write_bytes(to_jpeg(stored.maps[row]))
            result.maps += 1
        written[target] = "\0".join(seen)
    return result


def _cannot_hold(text: str, seen: set[str], status: int) -> str:
    if status != STATUS["ok"]:
        return "words without a map"
    if _LOST.search(text):
        return "words with _ . or /"
    if len(f"attention_{text}.jpg".encode()) > 255:
        return "words longer than a file name"
    return "repeats of a word" if text in seen else ""


def import_maps(archive: Archive, folder: Path, output: Path) -> Exchange:
    """Reads such a folder into a map store for an archive, one group per tar, closed by its manifest.

    Every occurrence of a word gets the word's one map; words without a file have status `no_window`. The raw range is
    unknown and becomes 0 to 1, and the words of a file that no example has are told.

    Raises:
        UserError: no example of the archive has a folder there.
    """
    result = Exchange()
    output.mkdir(parents=True, exist_ok=True)
    made: list[Path] = []
    with receipts.hold(output):
        for number, tar in enumerate(archive.shards):
            rows = [_import_example(example, folder, result) for example in archive.shard(number)]
            write_shard(output / f"{tar.stem}.zarr", rows, attrs={"imported": FOLDER})
            made.append(output / f"{tar.stem}.json")
            receipts.write(
                made[-1],
                stage="import",
                settings={"layout": FOLDER},
                inputs={"examples": receipts.load(tar.with_suffix(".json")).digest},
                files=[output / f"{tar.stem}.zarr"],
                counts={"examples": len(rows), "words": sum(len(row.words) for row in rows)},
                durable=True,
            )
        if not result.examples:
            raise UserError(f"{folder}: has no <image>/{FOLDER}/<stem>/ for any example of {archive.folder}")
        receipts.write(
            output / "manifest.json",
            stage="import",
            settings={"layout": FOLDER},
            inputs={"examples": archive.digest},
            counts={"examples": len(archive), "maps": result.maps},
            children=made,
        )
    return result


def _import_example(example: Example, folder: Path, result: Exchange) -> ExampleMaps:
    words = example.words()
    maps_WHW = np.zeros((len(words), SIDE, SIDE), np.uint8)
    status_W = np.full(len(words), STATUS["no_window"], np.uint8)
    source = _folder(folder, example)
    files = {path.stem.removeprefix("attention_"): path for path in sorted(source.glob("attention_*.jpg"))}
    result.examples += bool(files)
    used: set[str] = set()
    for row, word in enumerate(words):
        text = example.word_text(word)
        name = next((form for form in (text, text.lower()) if form in files), None)
        if name is None:
            result.lost["words without a file"] += 1
            continue
        used.add(name)
        maps_WHW[row] = from_jpeg(files[name])
        flat = maps_WHW[row].max() == maps_WHW[row].min()
        status_W[row] = STATUS["constant" if flat else "ok"]
        result.maps += 1
    result.lost["files of no word"] += len(files.keys() - used)
    result.lost += Counter()  # drops zeros
    range_W2 = np.tile(np.array([0, 1], np.float32), (len(words), 1))
    return ExampleMaps(example.key, words, maps_WHW, range_W2, status_W)


def _folder(folder: Path, example: Example) -> Path:
    """Where the maps of an example lie: below its image's folder, under the stem of the image's name.

    Raises:
        UserError: the name would leave the folder.
    """
    name = str(example.meta.get("image") or example.key)
    parts = Path(name).parts
    if ".." in parts or Path(name).is_absolute():
        raise UserError(f"example {example.key}: its image name {name!r} leads out of {folder}")
    return folder.joinpath(*parts[:-1], FOLDER, Path(name).stem)


def to_jpeg(map_HW: np.ndarray) -> bytes:
    """One map as the authors store it."""
    buffer = io.BytesIO()
    Image.fromarray(map_HW).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def from_jpeg(path: Path) -> np.ndarray:
    """The (32, 32) uint8 map of a file; another size is resized.

    Raises:
        UserError: not a readable image.
    """
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            grey = image.convert("L")
            if grey.size != (SIDE, SIDE):
                grey = grey.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
            return np.asarray(grey)
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{path}: is not a readable map: {error}") from error
