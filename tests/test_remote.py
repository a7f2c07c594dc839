"""Shards and maps travel to a URL and back; what arrives is what was sent, or it is not accepted."""

import json

import fsspec
import pytest
from PIL import Image
from quick_disk import quick_disk  # noqa: F401 (used by every test)
from test_mapstore import rows, store

from pipeline import receipts
from pipeline.archive.read import Archive
from pipeline.archive.stage import shard
from pipeline.config import Config
from pipeline.engine import EngineConfig
from pipeline.errors import UserError
from pipeline.mapstore.read import MapStore
from pipeline.remote import pull, push
from pipeline.sources.config import DataConfig


@pytest.fixture
def examples(tmp_path):
    records = []
    for number in range(5):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": str(number)}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (tmp_path / "list.json").write_text(json.dumps(records))
    data = DataConfig(name="d", kind="llava_json", path=str(tmp_path / "list.json"), shard_size=2)
    shard(Config(data=data, engine=EngineConfig(workers=1), shards_dir=str(tmp_path / "s")))
    return tmp_path / "s" / "d" / "examples"


@pytest.fixture
def url():
    yield "memory://bucket/d"
    fsspec.filesystem("memory").rm("/", recursive=True)


def test_examples_there_and_back(examples, url, tmp_path):
    sent = push(examples, url)
    assert sent == 3 * 3 + 2
    assert pull(url, tmp_path / "back") == 3
    assert list(Archive(tmp_path / "back" / "train")) == list(Archive(examples / "train"))
    receipts.check(tmp_path / "back" / "manifest.json", full=True)
    assert pull(url, tmp_path / "back") == 0
    (tmp_path / "back" / "train" / "00001.tar").unlink()
    assert pull(url, tmp_path / "back") == 1


def test_some_shards_only(examples, url, tmp_path):
    push(examples, url)
    assert pull(url, tmp_path / "back", shards=["00001"]) == 1
    assert not (tmp_path / "back" / "train" / "00000.tar").exists()


def test_maps_there_and_back(url, tmp_path):
    store(tmp_path / "maps")
    push(tmp_path / "maps", url)
    assert pull(url, tmp_path / "back") == 2
    row = rows()[2]
    assert MapStore(tmp_path / "back").get(row.key).words == row.words


def test_what_arrives_changed_is_refused(examples, url, tmp_path):
    push(examples, url)
    memory = fsspec.filesystem("memory")
    sound = memory.cat_file("/bucket/d/train/00001.tar")
    memory.pipe_file("/bucket/d/train/00001.tar", sound[:700] + b"!" + sound[701:])
    with pytest.raises(receipts.Damaged, match=r"00001\.tar"):
        pull(url, tmp_path / "back")
    assert not (tmp_path / "back" / "manifest.json").exists()
    assert not (tmp_path / "back" / "train" / "00001.tar").exists()
    memory.rm("/bucket/d/train/00001.tar")
    with pytest.raises(UserError, match=r"00001\.tar: cannot be fetched"):
        pull(url, tmp_path / "back")
    memory.pipe_file("/bucket/d/train/00001.tar", sound)
    assert pull(url, tmp_path / "back") == 2
    with pytest.raises(UserError, match="cannot be opened"):
        pull("nonsense://x", tmp_path / "back")


def test_nothing_is_written_outside_the_folder(examples, url, tmp_path):
    push(examples, url)
    receipts.write(tmp_path / "evil" / "x.json", stage="shard", settings={})
    receipts.write(
        tmp_path / "evil" / "a" / "manifest.json", stage="shard", settings={}, children=[tmp_path / "evil" / "x.json"]
    )
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bucket/d/manifest.json", (tmp_path / "evil" / "a" / "manifest.json").read_bytes())
    memory.pipe_file("/bucket/x.json", (tmp_path / "evil" / "x.json").read_bytes())
    with pytest.raises(UserError, match=r"outside its folder: \.\./x\.json"):
        pull(url, tmp_path / "back")
    assert not (tmp_path / "x.json").exists()


def test_damaged_shards_are_not_pushed(examples, url):
    (examples / "train" / "00000.tar").write_bytes(b"x")
    with pytest.raises(receipts.Damaged, match=r"00000\.tar"):
        push(examples, url)
    assert not fsspec.filesystem("memory").exists("/bucket/d")
