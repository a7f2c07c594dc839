"""A full check names what is damaged, repair rebuilds only that, and maps go to the authors' layout and back."""

import json
import os

import numpy as np
import pytest
from PIL import Image
from quick_disk import quick_disk  # noqa: F401 (used by every test)

from pipeline import receipts, verify
from pipeline.archive.read import Archive
from pipeline.archive.stage import shard
from pipeline.config import Config
from pipeline.engine import EngineConfig
from pipeline.errors import UserError
from pipeline.layout import Layout
from pipeline.mapstore.exchange import export, import_maps
from pipeline.mapstore.read import MapStore
from pipeline.mapstore.schema import STATUS, example_maps
from pipeline.mapstore.write import write_shard
from pipeline.sources.config import DataConfig


@pytest.fixture
def cfg(tmp_path):
    records = []
    for number in range(6):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"{number}.png")
        turns = [
            {"from": "human", "value": "The red or the_blue?"},
            {"from": "gpt", "value": f"The red one, e.g. {number}."},
        ]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (tmp_path / "list.json").write_text(json.dumps(records))
    data = DataConfig(name="d", kind="llava_json", path=str(tmp_path / "list.json"), shard_size=2)
    made = Config(
        data=data, engine=EngineConfig(workers=1), shards_dir=str(tmp_path / "s"), runs_dir=str(tmp_path / "r")
    )
    shard(made)
    return made


def folder(cfg):
    return Layout(cfg).examples_dir("train")


def damage(path, position=-2000):
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    stat = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # what only a full check finds


def test_all_is_well(cfg, capsys):
    finding = verify.verify(cfg)
    assert (finding.receipts, finding.damaged) == (5, {})
    assert "0 damaged" in capsys.readouterr().out


def test_damage_is_named_and_only_that_is_rebuilt(cfg, capsys):
    tars = sorted(folder(cfg).glob("*.tar"))
    before = {path: path.read_bytes() for path in tars}
    times = {path: path.stat().st_mtime_ns for path in tars}
    damage(tars[1])
    (folder(cfg) / "00002.json").write_text("{}")
    with pytest.raises(UserError, match="2 places"):
        verify.verify(cfg)
    printed = capsys.readouterr().out
    assert "00001.tar: its content has changed" in printed
    assert "00002.json: the receipt is damaged" in printed
    verify.repair(cfg)
    assert {path: path.read_bytes() for path in tars} == before
    assert tars[0].stat().st_mtime_ns == times[tars[0]]
    assert not verify.verify(cfg).damaged


def test_the_names_of_the_folders_above_play_no_part(cfg, tmp_path):
    moved = tmp_path / "source" / "old.zarr" / "s"
    moved.parent.mkdir(parents=True)
    (tmp_path / "s").rename(moved)
    cfg.shards_dir = str(moved)
    assert verify.verify(cfg).receipts == 5
    damage(folder(cfg) / "00001.tar")
    with pytest.raises(UserError, match="1 places"):
        verify.verify(cfg)


def test_what_has_no_receipt_is_named(cfg, tmp_path):
    (folder(cfg) / "00000.json").unlink()
    with pytest.raises(UserError):
        verify.verify(cfg)
    lines = verify.examine(folder(cfg)).lines
    assert any("00000.tar: has no receipt" in line for line in lines)
    assert any("00000.json: is missing" in line for line in lines)
    verify.repair(cfg)
    verify.verify(cfg)
    cfg.shards_dir = str(tmp_path / "none")
    with pytest.raises(UserError, match="nothing to verify"):
        verify.verify(cfg)


def test_damaged_chunks_of_maps_are_named(cfg, tmp_path):
    output = tmp_path / "maps"
    store(cfg, output)
    chunk = next(path for path in (output / "00001.zarr").rglob("c/*") if path.is_file())
    damage(chunk, 0)
    (output / "00000.zarr" / "more").touch()
    lines = verify.examine(output).lines
    assert len(lines) == 2
    assert f"{chunk}: its content has changed" in lines
    assert any("more: does not belong there" in line for line in lines)


def test_as_commands(cfg, command, tmp_path):
    """What `make verify`, `make verify ARGS=repair=true` and `make shard ARGS=data.retry_failed=true` start."""
    settings = ["data=llava_json", "data.name=d", f"data.path={tmp_path}/list.json", "data.shard_size=2",
                "data.licence=unknown", f"shards_dir={tmp_path}/s", f"runs_dir={tmp_path}/r"]  # fmt: skip
    tar = folder(cfg) / "00001.tar"
    sound = tar.read_bytes()
    damage(tar)
    found = command("verify", *settings)
    assert found.returncode == 2
    assert f"{tar}: its content has changed" in found.stdout
    assert found.stderr.startswith("error: 1 damaged") and "repair=true" in found.stderr
    assert command("verify", *settings, "repair=true").returncode == 0
    assert tar.read_bytes() == sound
    assert "0 damaged" in command("verify", *settings).stdout

    (tmp_path / "3.png").rename(tmp_path / "away.png")
    other = [word for word in settings if not word.startswith("shards_dir")] + [f"shards_dir={tmp_path}/t"]
    told = command("shard", *other)
    assert told.returncode == 2
    assert "1 of 6 inputs failed" in told.stderr and "3.png does not exist" in told.stderr
    assert command("shard", *other, "data.max_failed=0.5").returncode == 0
    (tmp_path / "away.png").rename(tmp_path / "3.png")
    told = command("shard", *other, "data.retry_failed=true")
    assert (told.returncode, told.stderr) == (0, "")
    assert "6 inputs, 6 examples in 3 shards" in told.stdout
    assert (tmp_path / "t/d/examples/train/00001.tar").read_bytes() == sound


# --- the authors' layout ---


def store(cfg, output):
    archive = Archive(folder(cfg))
    y, x = np.mgrid[:32, :32]
    made = []
    for number, tar in enumerate(archive.shards):
        rows = []
        for example in archive.shard(number):
            words = example.words()
            maps = np.stack([np.exp(-((y - 3 * n) ** 2 + (x - 9) ** 2) / 60) for n in range(len(words))])
            rows.append(example_maps(example.key, words, maps, np.arange(len(words)) != 1))
        write_shard(output / f"{tar.stem}.zarr", rows)
        made.append(output / f"{tar.stem}.json")
        receipts.write(made[-1], stage="t", settings={}, files=[output / f"{tar.stem}.zarr"])
    receipts.write(output / "manifest.json", stage="t", settings={}, children=made)
    return archive, MapStore(output)


def test_export_and_import(cfg, tmp_path):
    archive, maps = store(cfg, tmp_path / "maps")
    told = export(archive, maps, tmp_path / "authors")
    assert archive[0].words()[1] == (0, 4, 7)
    assert [archive[0].word_text(word) for word in archive[0].words()] == [
        "The", "red", "or", "the_blue", "The", "red", "one", "e.g", "0",
    ]  # fmt: skip
    names = sorted(path.name for path in (tmp_path / "authors" / "lpm_attention" / "0").iterdir())
    assert names == [f"attention_{word}.jpg" for word in ("0", "one", "or", "red", "the")]
    assert dict(told.lost) == {"words without a map": 6, "words with _ . or /": 12, "repeats of a word": 6}
    assert "6 repeats of a word" in told.summary

    back = import_maps(archive, tmp_path / "authors", tmp_path / "back")
    found = MapStore(tmp_path / "back")
    for example in archive:
        first, second = maps.get(example.key), found.get(example.key)
        assert second.words == first.words
        assert second.status.tolist() == [STATUS["ok"]] * 3 + [STATUS["no_window"]] + [0, 0, 0, STATUS["no_window"], 0]
        for row in (0, 2, 5, 6, 8):
            assert np.abs(second.maps[row].astype(int) - first.maps[row]).max() <= 0.04 * 255
        assert np.array_equal(second.maps[0], second.maps[4])  # one file for both
    assert back.lost["words without a file"] == 12
    assert not verify.examine(tmp_path / "back").damaged


def test_examples_of_one_image_share_a_folder_and_what_that_loses_is_counted(cfg, tmp_path):
    records = json.loads((tmp_path / "list.json").read_text())
    for record in records:
        record["image"] = "0.png"
    (tmp_path / "list.json").write_text(json.dumps(records))
    cfg.data.name = "e"
    shard(cfg)
    told = export(*store(cfg, tmp_path / "maps"), tmp_path / "authors")
    assert dict(told.lost) == {"words without a map": 6, "words with _ . or /": 12, "repeats of a word": 6 + 5 * 4}
    assert told.maps == len(list((tmp_path / "authors").rglob("*.jpg"))) == 10


def test_import_of_nothing(cfg, tmp_path):
    archive = Archive(folder(cfg))
    with pytest.raises(UserError, match="lpm_attention"):
        import_maps(archive, tmp_path / "empty", tmp_path / "back")
    bad = tmp_path / "bad" / "lpm_attention" / "0"
    bad.mkdir(parents=True)
    (bad / "attention_red.jpg").write_bytes(b"no")
    with pytest.raises(UserError, match="not a readable map"):
        import_maps(archive, tmp_path / "bad", tmp_path / "back")
