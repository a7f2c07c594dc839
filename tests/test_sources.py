"""Sources: every input is accounted for, in the same order, from any position."""

import json
from types import SimpleNamespace

import pytest
from PIL import Image
from quick_disk import quick_disk  # noqa: F401 (used by every test)

from pipeline.errors import UserError
from pipeline.examples import InvalidExample
from pipeline.sources import jsonstream, open_source
from pipeline.sources.base import RawItem, read_image
from pipeline.sources.config import DataConfig


def record(number, **more):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"Thing {number}."}]
    return {"id": f"r{number}", "image": f"{number}.png", "conversations": turns, **more}


def opened(tmp_path, text, **settings):
    file = tmp_path / "list.json"
    if isinstance(text, bytes):
        file.write_bytes(text)
    else:
        file.write_text(text, encoding="utf-8")
    return open_source(DataConfig(name="t", kind="llava_json", path=str(file), **settings), None)


FORMS = {
    "list": lambda records: json.dumps(records),
    "indented": lambda records: json.dumps(records, indent=2, ensure_ascii=False),
    "lines": lambda records: "\n\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n",
    "mark": lambda records: "\ufeff" + json.dumps(records),
}


@pytest.mark.parametrize("form", FORMS)
def test_any_part_of_a_list_is_the_same(tmp_path, form, monkeypatch):
    monkeypatch.setattr(jsonstream, "_BLOCK", 97)  # so that records, and characters, lie across blocks
    monkeypatch.setattr(jsonstream, "_STRIDE", 3)
    records = [record(n, note="é日👍" * (n % 5)) for n in range(20)]
    source = opened(tmp_path, FORMS[form](records))
    assert source.count("train") == 20
    whole = list(source.items("train"))
    assert [item.record for item in whole] == records
    assert whole[3].image == tmp_path / "3.png"
    for start, stop in [(0, 3), (2, 9), (9, 9), (17, 40), (19, 20)]:
        assert [item.id for item in source.items("train", start, stop)] == [f"r{n}" for n in range(20)[start:stop]]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('[{"id": 1},\n{"id": 2},\n{"id": 3 "x"}]', "line 3"),
        ('[{"id": 1},\n{"id": 2}\n', "line 3.*does not end"),
        ('[{"id": 1},\n{"id', "line 2"),
        (b'[{"id": 1},\n\n{"id": "\xff\xfe"}]', "line .*UTF-8"),
        ("[" + "[" * 100_000, "line 1"),
        ('[{"id": 1}]\n\n[{"id": 2}]', "line 3.*something follows"),
        ('[{"id": 1}]' + " " * 3_000_000 + "\n]", "line 2.*something follows"),
    ],
)
def test_a_broken_list_is_refused_with_its_line(tmp_path, text, line):
    with pytest.raises(UserError, match=line):
        opened(tmp_path, text).count("train")


def test_a_broken_list_is_refused_early(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonstream, "_BLOCK", 64)
    text = '[{"id": 1},\n{"id" 2},\n' + ",\n".join(['{"id": 3}'] * 500) + "]"
    with pytest.raises(UserError, match="line 2"):
        opened(tmp_path, text).count("train")


def test_a_broken_line_is_one_failed_input(tmp_path):
    lines = [json.dumps(record(0)).encode(), b'{"id": ', b"[1]", b'"\xff"', json.dumps(record(4)).encode()]
    items = list(opened(tmp_path, b"\n".join(lines)).items("train"))
    assert [item.failure.status if item.failure else item.id for item in items] == [
        "r0", "bad_json", "bad_record", "bad_json", "r4",
    ]  # fmt: skip
    assert "line 2" in items[1].failure.reason


def test_odd_records(tmp_path):
    records = [
        record(0, image=["a.png", "b.png"]),
        record(1, image=["a.png"]),
        record(2, image=None),
        record(3, image=7),
        record(4, image="a\0b"),
        record(5, video="a.mp4"),
        {"conversations": []},
        record(7, id=7),
        record(8, id="half \ud83d"),
    ]
    items = list(opened(tmp_path, json.dumps(records)).items("train"))
    assert [item.failure and item.failure.status for item in items] == [
        "unsupported", None, None, "bad_record", "outside_root", "unsupported", None, None, None,
    ]  # fmt: skip
    assert items[1].image == tmp_path / "a.png"
    assert items[2].image is None
    assert [items[6].id, items[7].id, items[8].id] == ["#6", "7", "half ?"]


def test_what_is_not_there_is_named(tmp_path):
    for settings, match in [
        ({}, "data.path"),
        ({"path": str(tmp_path / "no.json")}, "no.json"),
        ({"path": str(tmp_path), "splits": {"val": "v.json"}}, "split val"),
        ({"kind": "nonsense"}, "choose one of"),
    ]:
        with pytest.raises(UserError, match=match):
            open_source(DataConfig(**{"name": "t", "kind": "llava_json", **settings}), None)
    with pytest.raises(UserError, match="neither"):
        opened(tmp_path, "hello").count("train")
    with pytest.raises(UserError, match="image folder"):
        opened(tmp_path, "[]", images=str(tmp_path / "no"))


def test_the_fingerprint_follows_the_content(tmp_path):
    source = opened(tmp_path, json.dumps([record(0)]))
    stamp = tmp_path / "shards" / "source.json"
    first = source.fingerprint(stamp)
    assert source.fingerprint(stamp) == first
    assert source.fingerprint(tmp_path / "elsewhere.json") == first
    assert opened(tmp_path, json.dumps([record(1)])).fingerprint(stamp) != first


def test_images_stay_in_their_folder(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    Image.new("RGB", (2, 2)).save(root / "in.png")
    (tmp_path / "out.png").write_bytes(b"secret")
    (root / "link.png").symlink_to(tmp_path / "out.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "inner.png").symlink_to(root / "in.png")
    (root / "empty.png").touch()

    def status(name, **more):
        try:
            read_image(RawItem("x", root / name, {}), root, more.get("follow", False))
        except InvalidExample as error:
            return error.status
        return "ok"

    assert status("in.png") == status("inner.png") == status("../images/in.png") == "ok"
    assert status("../out.png") == status("/etc/passwd") == status("link.png") == "outside_root"
    assert status("link.png", follow=True) == "ok"
    assert status("no.png") == "missing_image"
    assert status("loop.png") == status("a" * 300) == status(".") == "unreadable_image"
    assert status("empty.png") == "empty_image"


def test_a_linked_root_is_fine(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.png").write_bytes(b"x")
    (tmp_path / "root").symlink_to(tmp_path / "real")
    assert read_image(RawItem("x", tmp_path / "root" / "a.png", {}), tmp_path / "root", False) == b"x"


def test_easy_vqa_is_complete():
    source = open_source(DataConfig(name="easy_vqa", kind="easy_vqa"), None)
    assert {split: source.count(split) for split in source.splits()} == {"train": 3500, "val": 500, "test": 1000}
    items = [item for split in source.splits() for item in source.items(split)]
    assert sum(len(item.record["conversations"]) for item in items) == 2 * 48_248
    assert len({item.id for item in items}) == 5000
    assert all(item.image.is_file() for item in items[::100])
    assert items[0].record["conversations"][0]["value"].startswith("<image>\n")


def test_the_world_is_drawn_once(tmp_path):
    layout = SimpleNamespace(source_dir=tmp_path / "source")
    data = DataConfig(sizes={"train": 3, "val": 2})
    first = open_source(data, layout)
    drawn = (tmp_path / "source" / "train.json").stat().st_mtime_ns
    assert [first.count(split) for split in first.splits()] == [3, 2]
    assert all(item.image.is_file() for item in first.items("train"))
    assert open_source(data, layout).fingerprint(tmp_path) == first.fingerprint(tmp_path)
    assert (tmp_path / "source" / "train.json").stat().st_mtime_ns == drawn
    other = open_source(DataConfig(sizes={"train": 3, "val": 2}, seed=1), layout)
    assert other.fingerprint(tmp_path) != first.fingerprint(tmp_path)
    with pytest.raises(UserError, match="sizes"):
        open_source(DataConfig(), layout)
