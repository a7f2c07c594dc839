"""Every kind of bad or odd input in one data set, through the shard stage: each has its row and its reason."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from quick_disk import quick_disk  # noqa: F401 (used by every test)

from pipeline.archive.read import Archive, read_table
from pipeline.archive.stage import shard
from pipeline.config import Config
from pipeline.engine import EngineConfig
from pipeline.examples import decode
from pipeline.sources.config import DataConfig

NOISE = np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.fromarray(NOISE), "JPEG", exif=exif)


RGB = Image.fromarray(NOISE)
# Name -> the file's bytes, the status, and the size in which models see it.
IMAGES = {
    "sound.jpg": (encoded(RGB, "JPEG"), "ok", (48, 32)),
    "truncated.jpg": (encoded(RGB, "JPEG")[:900], "bad_image", None),
    "corrupt.png": (encoded(RGB, "PNG")[:100] + b"\0" * 400, "bad_image", None),
    "zero.png": (b"", "empty_image", None),
    "wrong_extension.png": (encoded(RGB, "WEBP"), "ok", (48, 32)),
    "cmyk.jpg": (encoded(RGB.convert("CMYK"), "JPEG"), "ok", (48, 32)),
    "palette.gif": (encoded(RGB.convert("P"), "GIF"), "ok", (48, 32)),
    "16bit.png": (encoded(Image.fromarray(NOISE[:, :, 0].astype(np.uint16) * 257), "PNG"), "ok", (48, 32)),
    "alpha.png": (encoded(RGB.convert("RGBA"), "PNG"), "ok", (48, 32)),
    "animated.gif": (encoded(RGB, "GIF", save_all=True, append_images=[RGB.rotate(90)]), "ok", (48, 32)),
    "exif.jpg": (turned(), "ok", (32, 48)),
    "huge.png": (encoded(Image.new("1", (2000, 1000)), "PNG"), "bad_image", None),
    "../outside.png": (encoded(RGB, "PNG"), "outside_root", None),
    "missing.png": (None, "missing_image", None),
}
USER, ANSWER = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}
TALKS = {
    "empty": ([], "empty_conversation"),
    "order": ([ANSWER, USER], "bad_conversation"),
    "nul": ([USER, {"from": "gpt", "value": "a\0b"}], "bad_text"),
    "half a character": ([USER, {"from": "gpt", "value": "a\ud83d"}], "bad_text"),
    "long": ([USER, {"from": "gpt", "value": "x" * 5000}], "bad_text"),
    "odd unicode": ([USER, {"from": "gpt", "value": "e\u0301 \u202ea\u202c \u200b\ufeff日本 👩‍👩‍👧"}], "ok"),
}


@pytest.fixture
def made(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    records = []
    for name, (data, _, _) in IMAGES.items():
        if data is not None:
            (root / name).write_bytes(data)
        records.append({"id": name, "image": name, "conversations": [USER, ANSWER]})
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    records.append({"id": "link", "image": "link.png", "conversations": [USER, ANSWER]})
    records += [{"id": name, "image": "sound.jpg", "conversations": talk} for name, (talk, _) in TALKS.items()]
    records += [{"id": "twice", "image": "sound.jpg", "conversations": [USER, ANSWER]}] * 2
    lines = [json.dumps(record) for record in records] + ['{"id": "broken", ']
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    data = DataConfig(
        name="d", kind="llava_json", path=str(tmp_path / "list.jsonl"), images=str(root),
        max_failed=1, max_pixels=1_000_000, max_chars=4000,
    )  # fmt: skip
    result = shard(Config(data=data, engine=EngineConfig(workers=1), shards_dir=str(tmp_path / "shards")))
    folder = tmp_path / "shards/d/examples/train"
    return result, read_table(folder / "00000.parquet"), Archive(folder)


def test_every_one_is_accounted_for(made, capsys):
    result, rows, archive = made
    found = {row["id"]: row["status"] for row in rows}
    expected = {name: status for name, (_, status, _) in IMAGES.items()}
    expected |= {"link": "outside_root", **{name: status for name, (_, status) in TALKS.items()}}
    expected |= {"twice": "ok", f"#{len(rows) - 1}": "bad_json"}
    assert found == expected
    assert all(bool(row["reason"]) == (row["status"] != "ok") for row in rows)
    assert f"line {len(rows)}" in rows[-1]["reason"]
    assert len(rows) == result.counts["inputs"] == len(IMAGES) + 1 + len(TALKS) + 2 + 1
    assert result.counts["repeated"]["ids"] == 1
    assert len(archive) == result.counts["examples"] == sum(row["status"] == "ok" for row in rows)


def test_what_is_kept_is_unchanged_and_seen_upright(made):
    _, rows, archive = made
    by_name = {example.meta["id"]: example for example in archive}
    sizes = {row["id"]: (row["width"], row["height"]) for row in rows}
    for name, (data, status, size) in IMAGES.items():
        if status == "ok":
            assert by_name[name].image == data
            image = decode(data)
            assert (image.size, image.mode) == (size, "RGB")
            assert sizes[name] == size
    assert by_name["wrong_extension.png"].ext == "webp"
    assert by_name["odd unicode"].turns[1].text == TALKS["odd unicode"][0][1]["value"]
    upright, flat = decode(IMAGES["exif.jpg"][0]), decode(IMAGES["sound.jpg"][0])
    assert np.abs(np.asarray(upright, int) - np.asarray(flat.transpose(Image.Transpose.ROTATE_270), int)).max() <= 2
