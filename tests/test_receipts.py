"""Receipts: what they vouch for, and that nothing slips past them."""

import os
import subprocess
import sys

import pytest

from pipeline import receipts
from pipeline.errors import UserError

SETTINGS = {"size": 3, "nested": {"a": 1, "b": [1, 2]}}


@pytest.fixture
def made(tmp_path):
    (tmp_path / "data.bin").write_bytes(b"0123456789" * 50)
    folder = tmp_path / "group"
    (folder / "inner").mkdir(parents=True)
    (folder / "a").write_bytes(b"aaa")
    (folder / "inner" / "b").write_bytes(b"bbb")
    path = tmp_path / "00000.json"
    receipts.write(
        path,
        stage="test",
        settings=SETTINGS,
        inputs={"source": "x"},
        files=[tmp_path / "data.bin", folder],
        counts={"n": 1},
    )
    return path


def test_write_and_check(made):
    receipt = receipts.check(made, SETTINGS, {"source": "x"}, full=True)
    assert receipt.counts == {"n": 1}
    assert receipt.stage == "test"
    assert receipts.is_current(made, SETTINGS)
    assert receipt.fingerprint == receipts.load(made).fingerprint
    assert not list(made.parent.glob(".*"))


def test_the_digest_is_that_of_the_content(made, tmp_path):
    first = receipts.load(made)
    again = receipts.write(
        made, stage="test", settings=SETTINGS, inputs={"source": "x"}, counts={"n": 1}, seconds=9.0,
        files=[tmp_path / "group", tmp_path / "data.bin"],
    )  # fmt: skip
    assert again.digest == first.digest
    (tmp_path / "data.bin").write_bytes(b"else")
    changed = receipts.write(made, stage="test", settings=SETTINGS, files=[tmp_path / "data.bin"])
    assert changed.digest != first.digest


def test_other_settings_are_named(made):
    with pytest.raises(receipts.Stale) as caught:
        receipts.check(made, {"size": 4, "nested": {"a": 1, "b": [1, 3]}, "new": None}, {"source": "y"})
    assert caught.value.fields == ["nested.b", "size", "inputs.source"]
    assert "size (3 -> 4)" in str(caught.value)
    assert "overwrite=true" in str(caught.value)
    assert receipts.is_current(made, {"size": 4}, overwrite=True) is False
    with pytest.raises(receipts.Stale):
        receipts.is_current(made, {"size": 4})


@pytest.mark.parametrize("name", ["data.bin", "group/a", "group/inner/b"])
def test_changed_missing_and_additional_files(made, tmp_path, name):
    path = tmp_path / name
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(receipts.Damaged, match=path.name):
        receipts.check(made)
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(receipts.Damaged, match="content"):
        receipts.check(made)  # another time of change, so it is hashed
    path.unlink()
    with pytest.raises(receipts.Damaged, match="missing"):
        receipts.check(made)
    assert receipts.is_current(made) is False


def test_an_additional_file_in_a_directory(made, tmp_path):
    (tmp_path / "group" / "extra").touch()
    with pytest.raises(receipts.Damaged, match="extra"):
        receipts.check(made)


def test_a_change_that_keeps_size_and_time_is_found_by_the_full_check(made, tmp_path):
    path = tmp_path / "data.bin"
    stat = path.stat()
    path.write_bytes(b"9" + path.read_bytes()[1:])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    receipts.check(made)
    with pytest.raises(receipts.Damaged):
        receipts.check(made, full=True)


def test_a_copy_is_hashed_once(made, tmp_path):
    os.utime(tmp_path / "data.bin", ns=(1, 1))
    digest = receipts.load(made).digest
    assert receipts.check(made).digest == digest
    assert receipts.load(made).files["data.bin"].mtime_ns == 1


def test_every_bit_of_a_receipt_counts(made):
    sound = made.read_bytes()
    for position in range(0, len(sound), 7):
        made.write_bytes(sound[:position] + bytes([sound[position] ^ 2]) + sound[position + 1 :])
        with pytest.raises(receipts.Damaged):
            receipts.load(made)
    for cut in (0, 1, len(sound) // 2, len(sound) - 3, len(sound) - 1):
        made.write_bytes(sound[:cut])
        with pytest.raises(receipts.Damaged):
            receipts.load(made)
    made.unlink()
    with pytest.raises(receipts.Damaged, match="no such receipt"):
        receipts.load(made)


def test_children(made, tmp_path):
    top = tmp_path / "manifest.json"
    receipts.write(top, stage="test", settings={}, children=[made])
    receipts.check(top, full=True)
    (tmp_path / "data.bin").unlink()
    with pytest.raises(receipts.Damaged, match=r"data\.bin"):
        receipts.check(top)
    receipts.write(made, stage="test", settings={"another": 1})
    with pytest.raises(receipts.Damaged, match="vouches"):
        receipts.check(top)


def test_a_read_back_that_differs_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"x" * 3_000_000)
    sound = receipts.Written(receipts.file_sha256(tmp_path / "x"), receipts.file_crc32c(tmp_path / "x"))
    (tmp_path / "x").write_bytes(b"x" * 2_999_999 + b"y")
    given = {"stage": "t", "settings": {}, "files": [tmp_path / "x"], "written": {"x": sound}}
    with pytest.raises(receipts.Damaged, match="reads back"):
        receipts.write(tmp_path / "r.json", **given)
    assert not (tmp_path / "r.json").exists()
    (tmp_path / "x").write_bytes(b"x" * 3_000_000)
    receipts.write(tmp_path / "r.json", **given)
    receipts.check(tmp_path / "r.json", full=True)


def test_commit_dir_replaces(tmp_path):
    for content in ("old", "new"):
        (tmp_path / ".d.tmp").mkdir()
        (tmp_path / ".d.tmp" / "f").write_text(content)
        receipts.commit_dir(tmp_path / ".d.tmp", tmp_path / "d")
    assert (tmp_path / "d" / "f").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_one_process_holds_a_folder(tmp_path):
    (tmp_path / ".left.tmp").write_text("of a killed run")
    code = "import sys, pathlib, pipeline.receipts as r\nwith r.hold(pathlib.Path(sys.argv[1])): pass"
    with receipts.hold(tmp_path):
        assert not (tmp_path / ".left.tmp").exists()
        run = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
        assert f"process {os.getpid()}" in run.stderr
        assert "UserError" in run.stderr
    with receipts.hold(tmp_path):
        pass
    assert issubclass(receipts.Damaged, UserError)
