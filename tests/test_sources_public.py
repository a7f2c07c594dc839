"""Sources of the public data sets, each on a few inputs in the form its authors publish."""

import io
import json
import tarfile
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from quick_disk import quick_disk  # noqa: F401 (used by every test)

from pipeline import receipts
from pipeline.archive import status
from pipeline.archive.read import Archive, read_table
from pipeline.archive.stage import shard
from pipeline.config import Config, choices, compose
from pipeline.engine import EngineConfig
from pipeline.errors import UserError
from pipeline.layout import Layout
from pipeline.sources import KINDS, open_source
from pipeline.sources.config import DataConfig


def png(value=0):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def items(split="train", **settings):
    source = open_source(DataConfig(name="d", **settings), SimpleNamespace(source_dir=Path("never-drawn")))
    found = list(source.items(split))
    assert len(found) == source.count(split)
    for start in range(len(found)):
        part = list(source.items(split, start, start + 2))
        assert [item.id for item in part] == [item.id for item in found[start : start + 2]]
    return found


def texts(item):
    return [turn.get("value", turn.get("content")) for turn in item.record["conversations"]]


def table(path, rows, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


# --- Flickr30k ---


@pytest.fixture
def flickr(tmp_path):
    entries = [
        {
            "filename": f"{n}.jpg",
            "split": split,
            "imgid": n,
            "sentences": [{"raw": f"Caption {n} {c}."} for c in range(3)],
        }
        for n, split in enumerate(["train", "restval", "test", "val", "train"])
    ]
    entries[4]["sentences"] = []
    for n in range(5):
        (tmp_path / f"{n}.jpg").write_bytes(png(n))
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"images": entries, "dataset": "flickr30k"}))
    return {"kind": "flickr30k", "path": str(tmp_path)}


def test_flickr30k(flickr):
    found = items(**flickr)
    assert [item.id for item in found] == ["0.jpg#0", "1.jpg#0", "4.jpg#0"]
    assert texts(found[0]) == ["Describe the image.", "Caption 0 0."]
    assert found[2].failure.status == "empty_conversation"
    assert [item.id for item in items("test", **flickr)] == ["2.jpg#0"]
    assert len(items(captions="all", prompt="What?", **flickr)) == 7
    with pytest.raises(UserError, match="captions"):
        items(captions="some", **flickr)


def test_flickr30k_of_another_form(tmp_path):
    (tmp_path / "x.json").write_text('{"pictures": []}')
    with pytest.raises(UserError, match="Karpathy"):
        items(kind="flickr30k", path=str(tmp_path / "x.json"))


# --- tars: img2dataset and WebDataset ---


def tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def laion(folder, shards=2):
    for shard_number in range(shards):
        stem = f"{shard_number:05d}"
        keys = [f"{stem}{n:04d}" for n in range(4)]
        rows = [
            {"key": key, "url": f"http://x/{key}", "caption": f"A {key}", "status": "success", "error_message": None}
            for key in keys
        ]
        rows[1] |= {"status": "failed_to_download", "error_message": "HTTP Error 404"}
        table(folder / f"{stem}.parquet", rows)
        tar(
            folder / f"{stem}.tar",
            [m for key in (keys[0], keys[2]) for m in ((f"{key}.jpg", png()), (f"{key}.txt", b"x"))],
        )
    return {"kind": "laion", "path": str(folder)}


def test_laion(tmp_path):
    settings = laion(tmp_path)
    found = items(**settings)
    assert [item.failure and item.failure.status for item in found] == [
        None,
        "not_downloaded",
        None,
        "missing_image",
    ] * 2
    assert "404" in found[1].failure.reason
    assert found[0].image == png()
    assert texts(found[2])[1] == "A 000000002"
    whole = (tmp_path / "00000.tar").read_bytes()
    (tmp_path / "00000.tar").write_bytes(whole[:2000])  # cut off: what it no longer reaches is missing, and told
    from pipeline.sources import laion as module

    module._members.cache_clear()
    assert [item.failure and item.failure.status for item in items(**settings)][2] == "missing_image"


def test_laion_as_files(tmp_path):
    laion(tmp_path, 1)
    (tmp_path / "00000.tar").unlink()
    (tmp_path / "00000").mkdir()
    (tmp_path / "00000" / "000000000.webp").write_bytes(png())
    found = items(kind="laion", path=str(tmp_path))
    assert found[0].image == tmp_path / "00000" / "000000000.webp"
    assert found[2].failure.status == "missing_image"


def test_webdataset(tmp_path):
    llava = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "licence": "L"}
    members = [
        ("a/0.jpg", png()), ("a/0.json", json.dumps(llava).encode()),
        ("a/1.png", png()), ("a/1.txt", b"a caption"),
        ("a/2.json", json.dumps({"q": "Why?", "a": "So."}).encode()), ("a/2.jpg", png()),
        ("a/3.jpg", png()), ("a/4.jpg", png()), ("a/4.json", b"{"),
        ("a/5.0.jpg", png()), ("a/5.1.jpg", png()), ("a/5.txt", b"two"),
    ]  # fmt: skip
    path = tar(tmp_path / "00000.tar", members)
    settings = {"kind": "webdataset", "path": str(tmp_path), "columns": {"question": "q", "answer": "a"}}
    found = items(**settings)
    assert [item.failure.status if item.failure else texts(item)[1] for item in found] == [
        "A", "a caption", "So.", "missing_text", "bad_json", "unsupported",
    ]  # fmt: skip
    assert found[0].record["licence"] == "L"
    whole = path.read_bytes()
    for cut, last in ((len(whole) - 10240, "a/5"), (512 * 5 + 100, "a/")):
        from pipeline.sources import webdataset

        webdataset.samples.cache_clear()
        path.write_bytes(whole[:cut])
        assert items(**settings)[-1].failure.status == "damaged_tar", last


def test_our_own_tars_come_back(tmp_path, flickr):
    cfg = config(tmp_path, **flickr, max_failed=1)
    shard(cfg)
    found = items(kind="webdataset", path=str(tmp_path / "shards/d/examples/train"))
    assert texts(found[0]) == ["Describe the image.", "Caption 0 0."]


# --- tables ---


def test_rlaif_v_in_its_forms(tmp_path):
    rows = [
        {"image": {"bytes": png(n)}, "question": f"Q{n}?", "chosen": f"A{n}", "idx": n, "origin_dataset": "VQA"}
        for n in range(5)
    ]
    table(tmp_path / "a" / "RLAIF-V.parquet", rows, row_group_size=2)
    found = items(kind="rlaif_v", path=str(tmp_path / "a"))
    assert [item.id for item in found] == list("01234")
    assert (texts(found[3]), found[3].image) == (["Q3?", "A3"], png(3))
    assert found[3].record["meta"] == {"origin": "VQA"}
    share = [{"conversations": [{"from": "human", "value": "<image>Q?"}], "chosen": {"from": "gpt", "value": "A"},
              "rejected": {"from": "gpt", "value": "B"}, "images": [{"bytes": png(), "path": None}]}]  # fmt: skip
    table(tmp_path / "b" / "x.parquet", share)
    found = items(kind="rlaif_v", path=str(tmp_path / "b"))
    assert (texts(found[0]), found[0].image) == (["<image>Q?", "A"], png())
    share[0]["images"] = ["0.png"]
    (tmp_path / "x.json").write_text(json.dumps(share))
    found = items(kind="rlaif_v", path=str(tmp_path / "x.json"))
    assert (texts(found[0]), found[0].image) == (["<image>Q?", "A"], tmp_path / "0.png")


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("flickr30k_entities", {"prompt": "What?"}),
        ("flickr30k_entities", {"captions": "all"}),
        ("rlaif_v", {"columns": {"image": "picture"}}),
    ],
)
def test_shards_of_other_readings_are_refused(tmp_path, kind, change):
    before, after = (status.settings(config(tmp_path, kind=kind, **more)) for more in ({}, change))
    assert before != after


def test_any_table(tmp_path):
    rows = [
        {"picture": png(), "q": "Q?", "a": "A"},
        {"picture": None, "q": "text only?", "a": "yes"},
        {"picture": b"", "q": "empty?", "a": None},
    ]
    table(tmp_path / "data" / "train-0.parquet", rows)
    table(tmp_path / "data" / "test-0.parquet", rows[:1])
    columns = {"image": "picture", "question": "q", "answer": "a"}
    splits = {"train": "data/train-*.parquet", "test": "data/test-*.parquet"}
    settings = {"kind": "hf", "path": str(tmp_path), "columns": columns, "splits": splits}
    found = items(**settings)
    assert [item.image for item in found] == [png(), None, b""]
    assert len(items("test", **settings)) == 1
    cfg = config(tmp_path, **settings, max_failed=1)
    counts = shard(cfg).counts["status"]
    assert counts == {"bad_conversation": 1, "no_image": 1, "ok": 2}
    with pytest.raises(UserError, match="picture"):
        items(**{**settings, "columns": {"image": "photo"}})
    (tmp_path / "bad.parquet").write_bytes(b"no")
    with pytest.raises(UserError, match="not a readable parquet"):
        items(kind="hf", path=str(tmp_path / "bad.parquet"))
    with pytest.raises(UserError, match=r"no/such|does not exist"):
        items(kind="hf", path="no/such/thing")


def arrow(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    found = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, found.schema) as writer:
        writer.write_table(found, max_chunksize=2)
    return path


ROWS = [{"picture": f"{n}.png", "q": f'Q{n}, "odd"\nindeed?', "a": f"0{n}"} for n in range(5)]
COLUMNS = {"image": "picture", "question": "q", "answer": "a"}


def as_csv(path, rows, separator=","):
    import csv

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)


FORMATS = {
    "parquet": lambda path: table(path / "x.parquet", ROWS, row_group_size=2),
    "arrow": lambda path: arrow(path / "x.arrow", ROWS),
    "json": lambda path: (path / "x.json").write_text(json.dumps(ROWS)),
    "jsonl": lambda path: (path / "x.jsonl").write_text("\n".join(map(json.dumps, ROWS))),
    "csv": lambda path: as_csv(path / "x.csv", ROWS),
    "tsv": lambda path: as_csv(path / "x.tsv", ROWS, "\t"),
}


@pytest.mark.parametrize("form", FORMATS)
def test_tables_of_every_format(tmp_path, form):
    FORMATS[form](tmp_path)
    found = items(kind="hf", path=str(tmp_path), columns=COLUMNS)
    assert [item.image for item in found] == [tmp_path / f"{n}.png" for n in range(5)]
    assert [texts(item) for item in found] == [[row["q"], row["a"]] for row in ROWS]
    with pytest.raises(UserError, match=r"photo.*columns picture, q, a"):
        items(kind="hf", path=str(tmp_path), columns={"image": "photo"})
    (tmp_path / f"x.{form}").write_bytes(b'\xff"{')
    with pytest.raises(UserError, match=rf"x\.{form}"):
        items(kind="hf", path=str(tmp_path / f"x.{form}"), columns=COLUMNS)


def test_a_broken_line_of_a_table_is_one_failed_input(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"question": "Q", "answer": "A"}\n{"question": \n[1]\n')
    found = items(kind="hf", path=str(tmp_path))
    assert [item.failure and item.failure.status for item in found] == [None, "bad_json", "bad_record"]
    assert "line 2" in found[1].failure.reason


def test_odd_values_of_a_table_are_failed_inputs(tmp_path):
    fine = {"question": "Q?", "answer": "A"}
    rows = [
        {"id": "\ud800", **fine},
        {"id": "number", "image": 7, **fine},
        {"id": "map", "image": {"bytes": 3}, **fine},
        {"id": "no turns", "turns": 3},
        {"id": "other turns", "turns": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A"}]},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    meta = {"meta": {"when": datetime(2020, 1, 2), "what": b"x"}}
    table(tmp_path / "b" / "a.parquet", [{**fine, **meta}])
    shard(config(tmp_path, kind="hf", path=str(tmp_path / "a.jsonl"), max_failed=1, shard_size=9))
    found = {row["id"]: row["status"] for row in read_table(tmp_path / "shards/d/examples/train/00000.parquet")}
    expected = {"?": "no_image", "number": "bad_record", "map": "bad_record"}
    assert found == {**expected, "no turns": "empty_conversation", "other turns": "no_image"}
    shard(config(tmp_path, name="e", kind="hf", path=str(tmp_path / "b")))
    assert Archive(tmp_path / "shards/e/examples/train")[0].meta["when"] == "2020-01-02 00:00:00"


def test_a_damaged_table_is_named(tmp_path):
    file = table(tmp_path / "a.parquet", [{"question": "Q? " * 99, "answer": "A" * n} for n in range(99)])
    sound = file.read_bytes()
    file.write_bytes(sound[:8] + b"\xff" * 8 + sound[16:])
    with pytest.raises(UserError, match=r"a\.parquet: is not a readable parquet \(rows 0 to 98\)"):
        shard(config(tmp_path, kind="hf", path=str(file)))


def test_names_of_files_tell_their_split(tmp_path):
    """As `DatasetDict.save_to_disk` and the hub lay them out; held-out files must not become train."""
    saved = tmp_path / "saved"
    for number, split in enumerate(("train", "validation", "test")):
        arrow(saved / split / "data-00000-of-00001.arrow", ROWS[number : number + 1])
        (saved / split / "dataset_info.json").write_text("{}")
        table(tmp_path / "hub" / f"{split}-00000-of-00001.parquet", ROWS[number : number + 1])
    (saved / "dataset_dict.json").write_text("{}")
    for folder in (saved, tmp_path / "hub"):
        settings = {"kind": "hf", "path": str(folder), "columns": COLUMNS}
        assert open_source(DataConfig(name="d", **settings), None).splits() == ["train", "test", "val"]
        assert [texts(items(split, **settings)[0])[1] for split in ("train", "val", "test")] == ["00", "01", "02"]
    table(tmp_path / "plain" / "0.parquet", ROWS)
    assert len(items(kind="hf", path=str(tmp_path / "plain"), columns=COLUMNS)) == 5


def test_a_folder_of_images(tmp_path):
    for name in ("cats/train/black_cat/0.png", "cats/train/dog/1.png", "cats/test/dog/2.png", "cats/train/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png())
    found = items(kind="hf", path=str(tmp_path / "cats"), prompt="What is it?")
    assert [item.failure.status if item.failure else texts(item) for item in found] == [
        "missing_text", ["What is it?", "black cat"], ["What is it?", "dog"],
    ]  # fmt: skip
    assert [item.id for item in items("test", kind="hf", path=str(tmp_path / "cats"))] == ["test/dog/2.png"]
    long = "n" * 300
    rows = [{"file_name": name, "caption": text} for name, text in (("dog/1.png", "A dog."), (long, "None."))]
    as_csv(tmp_path / "cats/train/metadata.csv", rows)
    found = items(kind="hf", path=str(tmp_path / "cats"))
    assert [(item.image.relative_to(tmp_path / "cats").as_posix(), texts(item)[1]) for item in found] == [
        ("train/dog/1.png", "A dog."), (long, "None."),
    ]  # fmt: skip
    (tmp_path / "shown" / "dog").mkdir(parents=True)
    (tmp_path / "shown" / "dog" / "1.png").write_bytes(png())
    shown = {"kind": "hf", "path": str(tmp_path / "shown")}
    shard(config(tmp_path, **shown))
    (tmp_path / "shown" / "dog").rename(tmp_path / "shown" / "cow")
    with pytest.raises(receipts.Stale, match="names"):
        shard(config(tmp_path, **shown))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither tables"):
        items(kind="hf", path=str(tmp_path / "empty"))


def test_a_data_set_of_the_hub(tmp_path, monkeypatch):
    """What the hub answers is made up here; there is no network."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError, RevisionNotFoundError

    asked = []

    def snapshot_download(name, repo_type, revision, allow_patterns):
        asked.append((name, repo_type, revision, allow_patterns[0]))
        if revision:
            raise RevisionNotFoundError("no such branch", response=SimpleNamespace(headers={}, request=None))
        (tmp_path / "snapshot").mkdir(exist_ok=True)
        if "*.jsonl" in allow_patterns:
            FORMATS["jsonl"](tmp_path / "snapshot")
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    found = items(kind="hf", path="owner/name", columns=COLUMNS)
    assert len(found) == 5
    assert asked[:2] == [
        ("owner/name", "dataset", None, "*.parquet"), ("owner/name", "dataset", "refs/convert/parquet", "*.parquet")
    ]  # fmt: skip

    def offline(*_, **__):
        raise LocalEntryNotFoundError("cannot reach the hub\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"'owner/name' cannot be fetched from the hub: cannot reach the hub$"):
        items(kind="hf", path="owner/name")


# --- OCR-VQA ---


def test_ocrvqa(tmp_path):
    books = {
        f"b{n}": {
            "imageURL": f"http://x/{n}.gif",
            "questions": ["Who?", "What?"],
            "answers": ["Me", "It"],
            "split": split,
        }
        for n, split in enumerate([1, 3, 1, 2, 1])
    }
    books["b4"] = {"split": 1}
    books |= {f"b{n}": {**books["b0"], "questions": odd} for n, odd in ((5, "Q?"), (6, [None, "Q?"]))}
    (tmp_path / "dataset.json").write_text(json.dumps(books, indent=1))
    (tmp_path / "images").mkdir()
    settings = {"kind": "ocrvqa", "path": str(tmp_path)}
    found = items(**settings)
    assert [item.id for item in found] == ["b0", "b2", "b4", "b5", "b6"]
    assert found[0].image == tmp_path / "images" / "b0.gif"
    assert texts(found[0]) == ["<image>\nWho?", "Me", "What?", "It"]
    assert [found[place].failure.status for place in (2, 3)] == ["bad_record", "bad_record"]
    assert texts(found[4])[0] is None
    assert [item.id for item in items("test", **settings)] == ["b1"]
    (tmp_path / "dataset.json").write_text(json.dumps(books)[:-1])
    with pytest.raises(UserError, match="line 1"):
        items(**settings)


def test_ocrvqa_as_the_authors_list(tmp_path):
    record = {"id": "0", "image": {"<image_00>": "0.png"}, "conversations": [
        {"role": "user", "content": "<image_00>\nWho?"}, {"role": "assistant", "content": "Me"}]}  # fmt: skip
    (tmp_path / "list.json").write_text(json.dumps([record]))
    (tmp_path / "0.png").write_bytes(png())
    settings = {"kind": "ocrvqa", "path": str(tmp_path / "list.json")}
    assert items(**settings)[0].image == tmp_path / "0.png"
    cfg = config(tmp_path, **settings)
    shard(cfg)
    assert Archive(tmp_path / "shards/d/examples/train")[0].turns[0].text == "Who?"


# --- mixture ---


def config(tmp_path, **settings):
    return Config(
        data=DataConfig(**{"name": "d", "shard_size": 3, **settings}),
        engine=EngineConfig(workers=1),
        shards_dir=str(tmp_path / "shards"),
    )


@pytest.fixture
def mixture(tmp_path, flickr):
    folder = tmp_path / "laion"
    laion(folder)
    parts = {
        "f": {**flickr, "weight": 2, "licence": "F"},
        "l": {"kind": "laion", "path": str(folder), "limit": 6, "weight": 0.5},
    }
    return {"kind": "mixture", "parts": parts, "max_failed": 1}


def test_a_mixture(tmp_path, mixture, capsys):
    found = items(**mixture)
    names = [item.source for item in found]
    assert (names.count("f"), names.count("l")) == (6, 3)
    assert names[:5].count("l") >= 1
    assert sorted(item.id for item in found if item.source == "f") == sorted(
        2 * ["f/0.jpg#0", "f/1.jpg#0", "f/4.jpg#0"]
    )
    assert [item.id for item in found if item.source == "l"] == ["l/000000000", "l/000000002", "l/000010000"]
    result = shard(config(tmp_path, **mixture))
    archive = Archive(tmp_path / "shards/d/examples/train")
    assert {(example.source, example.licence) for example in archive} == {("f", "F"), ("l", "unknown")}
    assert result.counts["repeated"]["images"] > 0
    assert "repeated" in capsys.readouterr().out


def test_wrong_parts(mixture):
    for parts, match in [
        ({}, "parts"),
        ({"a": {"kind": "laion", "path": "x", "colour": 1}}, "colour"),
        ({"a": {"kind": "laion", "path": "x", "max_pixels": 1}}, "max_pixels: no setting of a part"),
        ({"a": {"kind": "laion", "path": "x", "limit": "few"}}, "data.parts.a.limit: .*few"),
        ({"a": {"kind": "laion", "path": "x", "weight": "much"}}, "weight is much"),
        ({"a": {"kind": "laion", "path": "x", "weight": float("nan")}}, "weight is nan"),
        ({"a": {"path": "x"}}, "needs a kind"),
        ({"a": "laion"}, "kind: "),
        ({"a/b": {"kind": "laion", "path": "x"}}, "cannot name a part"),
        ({"a": {"kind": "laion", "path": ""}}, "path"),
        ({"a": {"kind": "laion", "path": "/no"}}, "/no"),
    ]:
        with pytest.raises(UserError, match=match):
            items(kind="mixture", parts=parts)


def test_parts_of_one_kind_keep_apart(tmp_path):
    """Two worlds are drawn in folders of their own, whatever their names; two lists were never at risk."""
    turns = [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A"}]
    parts = {
        "w.1": {"kind": "world", "sizes": {"train": 4}},
        "w.2": {"kind": "world", "sizes": {"train": 2}, "seed": 1},
    }
    for name, count in (("l", 3), ("m", 1)):
        (tmp_path / f"{name}.json").write_text(json.dumps([{"id": n, "conversations": turns} for n in range(count)]))
        parts[name] = {"kind": "llava_json", "path": str(tmp_path / f"{name}.json")}
    cfg = config(tmp_path, kind="mixture", parts=parts)
    assert shard(cfg).counts["status"] == {"no_image": 4, "ok": 6}
    found = [(example.source, example.image) for example in Archive(tmp_path / "shards/d/examples/train")]
    assert [[source for source, _ in found].count(name) for name in parts] == [4, 2, 3, 1]
    first, second = ({image for source, image in found if source == name} for name in ("w.1", "w.2"))
    assert not first & second
    assert shard(cfg).written == 0


def test_evaluation_images_are_refused(tmp_path, flickr):
    held = tmp_path / "held"
    held.mkdir()
    (held / "same.png").write_bytes(png(1))
    with pytest.raises(UserError, match=r"1 image.*1\.jpg"):
        shard(config(tmp_path, **flickr, evaluation=[str(held)], max_failed=1))
    (held / "same.png").write_bytes(png(200))
    shard(config(tmp_path, **flickr, evaluation=[str(held)], max_failed=1))


def test_the_papers_mixture_keeps_its_test_images_out(tmp_path, flickr, capsys):
    """The config itself, on four tiny parts; one of them holds an image of Flickr30k's test split."""
    laion(tmp_path / "laion")
    rows = [{"image": {"bytes": png(n)}, "question": "Q?", "chosen": "A", "idx": n} for n in (50, 51)]
    table(tmp_path / "rlaif" / "a.parquet", rows)
    book = {"imageURL": "x.png", "questions": ["Who?"], "answers": ["Me"], "split": 1}
    (tmp_path / "ocr" / "images").mkdir(parents=True)
    (tmp_path / "ocr" / "images" / "b.png").write_bytes(png(60))
    (tmp_path / "ocr" / "dataset.json").write_text(json.dumps({"b": book}))
    folders = {
        "flickr30k": tmp_path,
        "laion": tmp_path / "laion",
        "rlaif_v": tmp_path / "rlaif",
        "ocrvqa": tmp_path / "ocr",
    }
    given = [f"data.parts.{name}.path={folder}" for name, folder in folders.items()]
    cfg = compose(["data=lavender130k", *given, "data.max_failed=1", f"shards_dir={tmp_path}/shards"])
    assert shard(cfg).counts["status"]["ok"] == 11
    told = capsys.readouterr().out
    for line in (
        "flickr30k: 5 inputs (train 3, test 1, val 1) of 31783 expected, 31778 fewer; weight 1; licence Flickr terms",
        "laion: 8 inputs (train 8) of 50000 expected, 49992 fewer; weight 1; licence CC-BY-4.0",
        "rlaif_v: 2 inputs (train 2) of 83132 expected, 83130 fewer; weight 1; licence CC-BY-NC-4.0",
        "ocrvqa: 1 inputs (train 1) of 30000 expected, 29999 fewer; weight 1; licence research only",
    ):
        assert line in told
    licences = {example.source: example.licence for example in Archive(tmp_path / "shards/lavender130k/examples/train")}
    assert licences == {name: cfg.data.parts[name]["licence"] for name in folders}
    cfg.data.parts["rlaif_v"]["expected"] = 2
    assert "rlaif_v: 2 inputs (train 2) of 2 expected; weight" in "\n".join(open_source(cfg.data, Layout(cfg)).report())
    table(tmp_path / "rlaif" / "a.parquet", [{**rows[0], "image": {"bytes": png(2)}}, rows[1]])
    cfg.overwrite = True
    with pytest.raises(UserError, match=r"1 image of data.evaluation.*rlaif_v/50"):
        shard(cfg)


# --- what was told before can be tried again ---


def test_only_failed_inputs_are_tried_again(tmp_path, flickr):
    moved = tmp_path / "moved.jpg"
    (tmp_path / "0.jpg").rename(moved)
    cfg = config(tmp_path, **flickr, max_failed=1)
    assert shard(cfg).counts["status"]["missing_image"] == 1
    moved.rename(tmp_path / "0.jpg")
    (tmp_path / "1.jpg").unlink()  # was good, so nobody looks at it again
    assert shard(cfg).written == 0
    cfg.data.retry_failed = True
    result = shard(cfg)
    assert result.counts["status"] == {"empty_conversation": 1, "ok": 4}
    folder = tmp_path / "shards/d/examples/train"
    assert [example.meta["id"] for example in Archive(folder)] == ["0.jpg#0", "1.jpg#0"]
    assert [row["status"] for row in read_table(folder / "00000.parquet")] == ["ok", "ok", "empty_conversation"]
    cfg.data.retry_failed = False
    assert shard(cfg).written == 0
    fresh = config(tmp_path / "fresh", **flickr, max_failed=1)
    (tmp_path / "1.jpg").write_bytes(png(1))
    shard(fresh)
    again = tmp_path / "fresh/shards/d/examples/train/00000.tar"
    assert again.read_bytes() == (folder / "00000.tar").read_bytes()


# --- configs ---


BUNDLED = ("easy_vqa", "world")
GIVEN = ("flickr30k", "hf", "laion", "llava_json", "ocrvqa", "rlaif_v", "webdataset")


@pytest.mark.parametrize("name", [*BUNDLED, *GIVEN, "lavender130k"])
def test_every_config_composes(name):
    data = compose([f"data={name}"]).data
    assert (data.name, data.kind in KINDS) == (name, True)
    if name in BUNDLED:
        return
    with pytest.raises(UserError, match=r"path"):
        open_source(data, None)
    if name in GIVEN:
        with pytest.raises(UserError, match="/nowhere"):
            open_source(compose([f"data={name}", "data.path=/nowhere"]).data, None)


def test_every_config_fills_shards(tmp_path, flickr):
    """Each file of conf/data with a few inputs; the four that are not here are sharded in tests of their own."""
    turns = [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A"}]
    (tmp_path / "list.json").write_text(json.dumps([{"image": "0.jpg", "conversations": turns}]))
    laion(tmp_path / "laion", 1)
    table(tmp_path / "hf" / "x.parquet", [{"image": png(), "question": "Q?", "answer": "A"}])
    table(tmp_path / "rlaif" / "x.parquet", [{"image": {"bytes": png()}, "question": "Q?", "chosen": "A"}])
    tar(tmp_path / "wds" / "0.tar", [("a.png", png()), ("a.json", json.dumps({"conversations": turns}).encode())])
    (tmp_path / "ocr").mkdir()
    (tmp_path / "ocr" / "b.png").write_bytes(png())
    book = {"imageURL": "x.png", "questions": ["Who?"], "answers": ["Me"], "split": 1}
    (tmp_path / "ocr" / "dataset.json").write_text(json.dumps({"b": book}))
    paths = {
        "easy_vqa": (["data.limit=2"], 6), "flickr30k": ([f"data.path={tmp_path}"], 4),
        "hf": ([f"data.path={tmp_path}/hf"], 1), "laion": ([f"data.path={tmp_path}/laion"], 2),
        "llava_json": ([f"data.path={tmp_path}/list.json"], 1), "ocrvqa": ([f"data.path={tmp_path}/ocr"], 1),
        "rlaif_v": ([f"data.path={tmp_path}/rlaif"], 1), "webdataset": ([f"data.path={tmp_path}/wds"], 1),
        "world": (["data.sizes={train: 2, val: 1, test: 1, ood_pairs: 1, ood_count: 1, ood_background: 1}"], 7),
    }  # fmt: skip
    elsewhere = {"flickr30k_entities", "lavender130k", "pope", "worldmedqa"}
    assert set(paths) == set(choices("data")) - elsewhere
    for name, (given, examples) in paths.items():
        cfg = compose([f"data={name}", *given, "data.max_failed=1", f"shards_dir={tmp_path}/shards"])
        assert shard(cfg).counts["examples"] == examples, name
        first = Archive(tmp_path / "shards" / name / "examples" / "train")[0]
        assert (first.source, first.licence) == (name, cfg.data.licence)
