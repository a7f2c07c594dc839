"""The shard stage and its archive: nothing lost, nothing silently wrong, the same bytes every time."""

import io
import json
import pickle
import tarfile

import pytest
import webdataset
from PIL import Image
from quick_disk import quick_disk  # noqa: F401 (used by every test)

from pipeline import receipts
from pipeline.archive.order import Order
from pipeline.archive.read import Archive, read_table
from pipeline.archive.stage import shard
from pipeline.archive.status import up_to_date
from pipeline.config import Config
from pipeline.engine import EngineConfig
from pipeline.errors import UserError
from pipeline.sources.config import DataConfig

COUNT = 11


def turns(number):
    return [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": f"Number {number}."}]


@pytest.fixture
def data(tmp_path):
    """Eleven inputs in shards of four, of which four are no examples."""
    folder = tmp_path / "data"
    folder.mkdir()
    records = [{"id": f"r{n}", "image": f"{n}.png", "conversations": turns(n)} for n in range(COUNT)]
    for number in range(COUNT):
        Image.new("RGB", (6, 4), (number, 0, 0)).save(folder / f"{number}.png")
    (folder / "2.png").unlink()
    (folder / "3.png").write_bytes(b"no image")
    records[5]["conversations"] = []
    records[6] = {"id": "r6", "conversations": [{**turns(6)[0], "value": "Hello"}, turns(6)[1]]}
    records[7]["image"] = ["7.png", "8.png"]
    (folder / "list.json").write_text(json.dumps(records))
    return folder


def config(data, tmp_path, shards="shards", engine=None, overwrite=False, **settings):
    defaults = {"name": "d", "kind": "llava_json", "path": str(data / "list.json"), "shard_size": 4, "max_failed": 0.5}
    return Config(
        data=DataConfig(**{**defaults, **settings}),
        engine=engine or EngineConfig(workers=2),
        shards_dir=str(tmp_path / shards),
        overwrite=overwrite,
    )


def folder(tmp_path, shards="shards"):
    return tmp_path / shards / "d" / "examples" / "train"


def contents(path):
    return {file.name: file.read_bytes() for file in sorted(path.glob("*.tar")) + sorted(path.glob("*.parquet"))}


def test_every_input_has_a_row(data, tmp_path, capsys):
    result = shard(config(data, tmp_path))
    assert result.written == 3
    assert result.counts["inputs"] == COUNT
    assert result.counts["status"] == {
        "bad_image": 1, "empty_conversation": 1, "missing_image": 1, "no_image": 1, "ok": 6, "unsupported": 1,
    }  # fmt: skip
    assert (result.counts["examples"], result.counts["failed"]) == (7, 3)
    rows = [row for file in sorted(folder(tmp_path).glob("*.parquet")) for row in read_table(file)]
    assert [row["id"] for row in rows] == [f"r{n}" for n in range(COUNT)]
    assert rows[2]["reason"] == "2.png does not exist"
    assert rows[4]["key"] == "0000100000"
    assert (rows[0]["width"], rows[0]["height"], rows[0]["ext"]) == (6, 4, "png")
    assert "1 missing_image" in capsys.readouterr().out


def test_examples_come_back(data, tmp_path):
    shard(config(data, tmp_path))
    archive = Archive(folder(tmp_path))
    assert archive.keys == [
        "0000000000",
        "0000000001",
        "0000100000",
        "0000100002",
        "0000200000",
        "0000200001",
        "0000200002",
    ]
    assert len(archive) == 7
    assert archive[0].image == (data / "0.png").read_bytes()
    assert archive[3].image is None
    assert archive[3].turns == (("user", "Hello"), ("assistant", "Number 6."))
    assert archive[-1].meta == {"id": "r10", "image": "10.png"}
    assert [archive.shard_of(n) for n in range(7)] == [0, 0, 1, 1, 2, 2, 2]
    assert [example.key for example in archive] == archive.keys
    assert pickle.loads(pickle.dumps(archive))[4] == archive[4]
    with pytest.raises(IndexError):
        archive[7]


def test_any_webdataset_reader_reads_the_tars(data, tmp_path):
    shard(config(data, tmp_path))
    paths = [str(path) for path in Archive(folder(tmp_path)).shards]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == Archive(folder(tmp_path)).keys
    assert json.loads(samples[0]["json"])["turns"][1]["text"] == "Number 0."
    with tarfile.open(paths[0]) as tar:
        assert {(member.mtime, member.uid, member.gid, member.mode) for member in tar} == {(0, 0, 0, 0o644)}


def test_bytes_do_not_depend_on_workers_or_interruption(data, tmp_path):
    shard(config(data, tmp_path))
    shard(config(data, tmp_path, "one", EngineConfig(workers=1)))
    assert contents(folder(tmp_path)) == contents(folder(tmp_path, "one"))
    digest = Archive(folder(tmp_path)).digest
    before = {path: path.stat().st_mtime_ns for path in folder(tmp_path).glob("*.tar")}
    (folder(tmp_path) / "00001.json").unlink()  # killed before the receipt
    (folder(tmp_path) / ".00001.tar.77.tmp").write_bytes(b"part")
    result = shard(config(data, tmp_path))
    assert (result.written, result.reused) == (1, 2)
    changed = [path.name for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert changed == ["00001.tar"]
    assert contents(folder(tmp_path)) == contents(folder(tmp_path, "one"))
    assert Archive(folder(tmp_path)).digest == digest
    assert not list(folder(tmp_path).glob(".*.tmp"))


def test_a_second_run_does_nothing(data, tmp_path, capsys):
    shard(config(data, tmp_path))
    assert up_to_date(config(data, tmp_path))
    capsys.readouterr()
    assert shard(config(data, tmp_path)).written == 0
    assert "up to date" in capsys.readouterr().out


def test_other_settings_are_refused(data, tmp_path):
    assert not up_to_date(config(data, tmp_path))
    shard(config(data, tmp_path))
    with pytest.raises(receipts.Stale, match="shard_size"):
        shard(config(data, tmp_path, shard_size=5))
    shard(config(data, tmp_path, shard_size=5, max_failed=1, overwrite=True))
    assert [path.name for path in Archive(folder(tmp_path)).shards] == ["00000.tar", "00001.tar", "00002.tar"]
    shard(config(data, tmp_path, shard_size=8, overwrite=True))
    assert sorted(contents(folder(tmp_path))) == ["00000.parquet", "00000.tar", "00001.parquet", "00001.tar"]
    (data / "list.json").write_text(json.dumps([{"id": "a", "image": "0.png", "conversations": turns(0)}]))
    with pytest.raises(receipts.Stale, match=r"inputs\.train\.sha256"):
        shard(config(data, tmp_path, shard_size=8))


def test_too_many_failures_stop_the_stage(data, tmp_path):
    with pytest.raises(UserError, match=r"3 of 11 inputs failed.*r2: missing_image"):
        shard(config(data, tmp_path, max_failed=0.2))
    with pytest.raises(UserError, match="no such receipt"):
        Archive(folder(tmp_path))
    assert shard(config(data, tmp_path, max_failed=0.3)).written == 0


def test_a_changed_byte_is_found(data, tmp_path):
    shard(config(data, tmp_path))
    archive = Archive(folder(tmp_path))
    assert len(list(archive)) == 7
    tar = folder(tmp_path) / "00000.tar"
    sound = tar.read_bytes()
    where = sound.index((data / "1.png").read_bytes()) + 20
    with tar.open("r+b") as file:  # while it is open
        file.seek(where)
        file.write(bytes([sound[where] ^ 1]))
    with pytest.raises(receipts.Damaged, match=r"00000\.tar.*0000000001"):
        archive[1]
    with pytest.raises(receipts.Damaged, match=r"00000\.tar"):
        Archive(folder(tmp_path))
    assert not up_to_date(config(data, tmp_path))
    shard(config(data, tmp_path))
    assert tar.read_bytes() == sound
    table = folder(tmp_path) / "00001.parquet"
    table.write_bytes(table.read_bytes()[:-9] + b"012345678")
    with pytest.raises(receipts.Damaged, match=r"00001\.parquet"):
        Archive(folder(tmp_path))


def test_nothing_is_read_into_the_folder_of_another_process(data, tmp_path):
    with (
        receipts.hold(tmp_path / "shards" / "d" / "examples"),
        pytest.raises(UserError, match="being written by process"),
    ):
        shard(config(data, tmp_path))


def test_dry_run_and_limit(data, tmp_path, capsys):
    cfg = config(data, tmp_path, limit=2)
    cfg.dry_run = True
    shard(cfg)
    assert "would write 1 of 1 shards (2 inputs)" in capsys.readouterr().out
    assert not list(folder(tmp_path).glob("*.tar"))
    cfg.dry_run = False
    assert shard(cfg).counts["inputs"] == 2


def test_an_empty_list_is_refused(data, tmp_path):
    (data / "list.json").write_text("[]")
    with pytest.raises(UserError, match="empty"):
        shard(config(data, tmp_path))


@pytest.mark.full
def test_processes_write_the_same_bytes(data, tmp_path):
    shard(config(data, tmp_path))
    shard(config(data, tmp_path, "processes", EngineConfig(kind="processes", workers=2)))
    assert contents(folder(tmp_path)) == contents(folder(tmp_path, "processes"))


# --- order ---


def test_order_is_a_function_of_position():
    sizes = [5, 3, 8, 1, 6]
    order = Order(sizes, seed=3, window=2)
    total = sum(sizes)
    run = order.indices(0, 3 * total)
    for epoch in range(3):
        assert sorted(run[epoch * total : (epoch + 1) * total]) == list(range(total))
    assert run[:total] != run[total : 2 * total]
    for position in (0, 7, total - 1, total, 2 * total + 3):
        assert Order(sizes, seed=3, window=2).indices(position, 9) == run[position : position + 9]
    assert pickle.loads(pickle.dumps(order)).indices(4, 20) == run[4:24]
    assert Order(sizes, seed=4, window=2).indices(0, total) != run[:total]


def test_order_stays_inside_its_window():
    sizes = [4] * 6
    order = Order(sizes, seed=0, window=2)
    run = order.indices(0, 24)
    for block in range(3):
        shards = {index // 4 for index in run[block * 8 : block * 8 + 8]}
        assert shards == set(order.shards(block * 8))
        assert len(shards) == 2


def test_order_of_one_number():
    order = Order(10, seed=1, window=0)
    assert sorted(order.indices(10, 10)) == list(range(10))
    assert order.indices(0, 10) == [8, 4, 5, 2, 6, 9, 7, 3, 0, 1] or len(set(order.indices(0, 10))) == 10
    with pytest.raises(ValueError, match="at least one"):
        Order([0, 0], seed=1)


def test_image_bytes_pass_unchanged(data, tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4)).save(buffer, "JPEG", quality=31)
    (data / "0.png").write_bytes(buffer.getvalue())  # a wrong extension as well
    shard(config(data, tmp_path))
    example = Archive(folder(tmp_path))[0]
    assert (example.image, example.ext) == (buffer.getvalue(), "jpg")
