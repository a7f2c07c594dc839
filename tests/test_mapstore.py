"""The map store: what goes in comes out, and damage never reads as maps."""

import multiprocessing
import pickle
import shutil

import numpy as np
import pytest
import zarr
from quick_disk import quick_disk  # noqa: F401 (used by every test)

from benchmarks.data import smooth_maps, world_profiles
from pipeline import receipts
from pipeline.examples import Word
from pipeline.mapstore import chunks
from pipeline.mapstore.read import Group, MapStore
from pipeline.mapstore.schema import PROFILES, SIDE, STATUS, ExampleMaps, example_maps, pack, unpack
from pipeline.mapstore.write import write_shard


@pytest.fixture(params=["zarrs", "by hand"])
def reader(request, monkeypatch):
    """Both ways to decode chunks; what a test says holds for either."""
    if request.param == "zarrs":
        pytest.importorskip("zarrs")
    else:
        monkeypatch.setattr(chunks, "installed", lambda: False)
    monkeypatch.setattr("pipeline.mapstore.read._FEW", 0)
    monkeypatch.setattr(chunks, "cores", lambda: 2)
    return request.param


def blobs(rng, count):
    y, x = np.mgrid[:SIDE, :SIDE]
    centre, width = rng.uniform(0, SIDE, (2, count, 1, 1)), rng.uniform(2, 9, (count, 1, 1))
    return np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / width**2).astype(np.float32) * 0.01


def rows(shard="00000", sizes=(3, 0, 70, 1, 40)):
    rng = np.random.default_rng(int(shard))
    found = []
    for number, size in enumerate(sizes):
        words = [Word(1, 4 * n, 4 * n + 3) for n in range(size)]
        known = np.arange(size) % 5 != 4
        found.append(example_maps(f"{shard}{number:05d}", words, blobs(rng, size), known))
    return found


def store(folder, shards=("00000", "00001"), profile="exact"):
    made = []
    for name in shards:
        write_shard(folder / f"{name}.zarr", rows(name), attrs={"teacher": "t"}, profile=profile)
        path = folder / f"{name}.json"
        receipts.write(path, stage="precompute", settings={}, files=[folder / f"{name}.zarr"])
        made.append(path)
    receipts.write(folder / "manifest.json", stage="precompute", settings={}, children=made)
    return MapStore(folder)


def restamp(folder, name="00000"):
    """A receipt for the bytes as they are now, so that only the store's own checks can find the damage."""
    path = folder / f"{name}.json"
    receipts.write(path, stage="precompute", settings={}, files=[folder / f"{name}.zarr"])
    receipts.write(
        folder / "manifest.json", stage="precompute", settings={}, children=sorted(folder.glob("[0-9]*.json"))
    )
    return MapStore(folder)


@pytest.mark.parametrize("profile", PROFILES)
def test_maps_come_back(tmp_path, profile, reader):
    maps = store(tmp_path, profile=profile)
    assert maps.shards == ["00000", "00001"]
    for name in maps.shards:
        for row, loaded in zip(rows(name), maps.group(name).load(), strict=True):
            found = maps.get(row.key)
            for other in (found, loaded):
                assert other.words == row.words
                assert np.array_equal(other.status, row.status)
                assert np.array_equal(other.range, row.range)
                assert np.abs(other.unit() - row.unit()).max(initial=0) <= (0 if profile == "exact" else 0.0334)
            assert np.array_equal(found.maps, loaded.maps)
    assert maps.get("0000000099") is None
    assert maps.get("0000700000") is None
    assert maps.keys == [row.key for name in maps.shards for row in rows(name)]
    assert pickle.loads(pickle.dumps(maps)).get("0000100002").words == rows("00001")[2].words
    assert maps.group("00000").attrs["teacher"] == "t"


def test_any_zarr_reader_reads_it(tmp_path):
    maps = store(tmp_path)
    group = zarr.open_group(str(tmp_path / "00000.zarr"), mode="r")
    assert {name: (array.shape, str(array.dtype)) for name, array in group.arrays() if name != "key"} == {
        "maps": ((114, 32, 32), "uint8"), "range": ((114, 2), "float32"), "status": ((114,), "uint8"),
        "turn": ((114,), "int32"), "start": ((114,), "int32"), "end": ((114,), "int32"), "offsets": ((6,), "int64"),
    }  # fmt: skip
    assert list(group["key"][:]) == maps.group("00000").keys
    assert np.array_equal(group["maps"][3:73], maps.get("0000000002").maps)
    assert "crc32c" in str(group["maps"].metadata.to_dict()["codecs"])


def test_raw_values_come_back():
    raw = blobs(np.random.default_rng(0), 4)
    stored = example_maps("0000000000", [Word(0, n, n + 1) for n in range(4)], raw)
    assert np.abs(stored.raw() - raw).max() <= 0.01 / 255
    assert stored.unit().min(axis=(1, 2)).tolist() == [0] * 4
    assert stored.unit().max(axis=(1, 2)).tolist() == [1] * 4


def test_status():
    words = [Word(0, n, n + 1) for n in range(3)]
    raw = blobs(np.random.default_rng(0), 3)
    raw[1] = 0.5
    raw[2] = np.nan
    stored = example_maps("0000000000", words, raw, np.array([True, True, False]))
    assert stored.status.tolist() == [STATUS["ok"], STATUS["constant"], STATUS["no_window"]]
    assert not stored.maps[1:].any()
    with pytest.raises(ValueError, match="not finite"):
        example_maps("0000000000", words, raw)


def test_every_level_survives_packing():
    levels = np.arange(256, dtype=np.uint8).repeat(4).reshape(1, SIDE, SIDE)
    assert np.array_equal(unpack(pack(levels, "exact"), "exact"), levels)
    compact = pack(levels, "compact")
    assert compact.shape == (1, SIDE, SIDE // 2)
    assert np.abs(unpack(compact, "compact").astype(int) - levels).max() == 8


def test_the_compact_profile_keeps_its_promise(tmp_path):
    """At most 300 bytes a map, everything counted, and at most 0.035 off, on maps as smooth as attention is."""
    raw = smooth_maps(600, seed=0)
    words = [Word(1, n, n + 1) for n in range(60)]
    made = [example_maps(f"000000000{n}", words, raw[60 * n : 60 * n + 60]) for n in range(10)]
    write_shard(tmp_path / "00000.zarr", made, profile="compact")
    size = sum(path.stat().st_size for path in (tmp_path / "00000.zarr").rglob("*") if path.is_file())
    assert size / 600 <= 300
    found = Group(tmp_path / "00000.zarr", "00000").load()
    assert max(np.abs(a.unit() - b.unit()).max() for a, b in zip(found, made, strict=True)) <= 0.035


@pytest.mark.full
def test_the_compact_profile_keeps_its_promise_on_maps_of_the_bundled_teacher(tmp_path):
    found = world_profiles(16, tmp_path)
    assert found["world_maps"] > 150
    assert found["world_compact_bytes_per_map"] <= 300
    assert 0 < found["world_compact_max_error"] <= 0.035
    assert found["world_exact_max_error"] == 0


def test_the_bytes_are_the_same_every_time(tmp_path):
    for name in ("a", "b"):
        store(tmp_path / name, ["00000"])
    files = [
        {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("c/**/*")
            if path.is_file()
        }
        for name in ("a", "b")
    ]
    assert files[0] == files[1]
    assert MapStore(tmp_path / "a").digest == MapStore(tmp_path / "b").digest
    assert not list(tmp_path.rglob("*.tmp"))


def test_wrong_rows_are_refused(tmp_path):
    good = rows()[0]
    for wrong in (
        [good, good],
        [ExampleMaps(good.key, good.words[:2], good.maps, good.range, good.status)],
        [ExampleMaps(good.key, good.words, good.unit(), good.range, good.status)],
    ):
        with pytest.raises(ValueError, match=r"twice|do not fit"):
            write_shard(tmp_path / "00000.zarr", wrong)
    with pytest.raises(ValueError, match="profile"):
        write_shard(tmp_path / "00000.zarr", [good], profile="tiny")
    assert not list(tmp_path.iterdir())


def test_an_empty_shard(tmp_path):
    write_shard(tmp_path / "00000.zarr", [])
    write_shard(tmp_path / "00001.zarr", rows("00001", (0, 0)))
    receipts.write(tmp_path / "00001.json", stage="precompute", settings={}, files=[tmp_path / "00001.zarr"])
    maps = MapStore(tmp_path, partial=True)
    assert maps.shards == ["00001"]
    assert maps.get("0000100001").maps.shape == (0, SIDE, SIDE)


@pytest.mark.parametrize("profile", PROFILES)
def test_every_flipped_bit_is_found(tmp_path, profile, reader):
    store(tmp_path, ["00000"], profile)
    rng = np.random.default_rng(1)
    files = sorted(file for file in (tmp_path / "00000.zarr").rglob("*") if file.is_file() and file.name != "zarr.json")
    for _ in range(40):
        file = files[rng.integers(len(files))]
        sound = file.read_bytes()
        position = int(rng.integers(len(sound)))
        file.write_bytes(
            sound[:position] + bytes([sound[position] ^ 1 << int(rng.integers(8))]) + sound[position + 1 :]
        )
        with pytest.raises(receipts.Damaged, match=r"00000\.zarr"):
            Group(tmp_path / "00000.zarr", "00000").load()
        file.write_bytes(sound)
    Group(tmp_path / "00000.zarr", "00000").load()


def test_a_changed_description_is_found(tmp_path):
    store(tmp_path, ["00000"])
    for file in (tmp_path / "00000.zarr").rglob("zarr.json"):
        sound = file.read_bytes()
        file.write_bytes(sound.replace(b":", b" ", 1))
        with pytest.raises(receipts.Damaged, match=r"zarr\.json"):
            MapStore(tmp_path)
        file.write_bytes(sound)


def test_missing_empty_and_swapped_chunks_are_found(tmp_path, reader):
    folder = tmp_path / "store"
    store(folder)
    file = folder / "00000.zarr" / "maps" / "c" / "0" / "0" / "0"
    sound = file.read_bytes()
    other = (folder / "00001.zarr" / "maps" / "c" / "0" / "0" / "0").read_bytes()
    index = np.frombuffer(sound[-36:-4], "<u8").reshape(2, 2)
    first, second = (sound[offset : offset + length] for offset, length in index.tolist())
    assert len(first) != len(second)

    def reindexed(entries):
        import google_crc32c

        tail = np.array(entries, "<u8").tobytes()
        return sound[:-36] + tail + google_crc32c.value(tail).to_bytes(4, "little")

    nothing = [2**64 - 1, 2**64 - 1]
    for changed in (b"", sound[:10], other, reindexed(index[::-1]), reindexed([nothing, index[1]]), None):
        if changed is None:
            file.unlink()
        else:
            file.write_bytes(changed)
        maps = restamp(folder)
        with pytest.raises(receipts.Damaged, match=r"00000\.zarr.*0000000002"):
            maps.get("0000000002")
    file.write_bytes(sound)
    shutil.copytree(folder / "00001.zarr", folder / "00000.zarr", dirs_exist_ok=True)
    with pytest.raises(receipts.Damaged, match="is not shard 00000"):
        restamp(folder).get("0000000002")


def test_presence_proves_nothing(tmp_path):
    store(tmp_path)
    (tmp_path / "00001.json").unlink()
    with pytest.raises(receipts.Damaged, match=r"00001\.json"):
        MapStore(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(receipts.Damaged, match=r"manifest\.json"):
        MapStore(tmp_path)
    assert MapStore(tmp_path, partial=True).shards == ["00000"]


def test_damage_after_a_chunk_was_read_once_is_found(tmp_path, reader):
    """A chunk that was found to belong where it lies is not compared with its digest again, but still checked."""
    made = rows("00000", (64, 64, 64))
    write_shard(tmp_path / "00000.zarr", made)
    file = tmp_path / "00000.zarr" / "maps" / "c" / "0" / "0" / "0"
    sound = file.read_bytes()
    (a, n), (b, m), _ = np.frombuffer(sound[-52:-4], "<u8").reshape(-1, 2).tolist()
    for damaged in (
        sound[: a + n // 2] + bytes([sound[a + n // 2] ^ 1]) + sound[a + n // 2 + 1 :],
        sound[:a] + sound[b : b + min(n, m)] + sound[a + min(n, m) :],
        sound[: a + 30],
    ):
        group = Group(tmp_path / "00000.zarr", "00000")
        assert all(np.array_equal(one.maps, row.maps) for one, row in zip(group.load(), made, strict=True))
        assert all(np.array_equal(one.maps, row.maps) for one, row in zip(group.load(), made, strict=True))
        with file.open("r+b") as out:
            out.write(damaged)
            out.truncate()
        with pytest.raises(receipts.Damaged, match=made[0].key):
            group.load()
        file.write_bytes(sound)


def test_memory_of_a_forgotten_shard_is_used_again_unless_somebody_looks_at_it(tmp_path):
    store(tmp_path)
    direct, maps = MapStore(tmp_path), MapStore(tmp_path, cache_bytes=1 << 30)
    keys = [key for key in direct.keys if len(direct.get(key).words)]
    held = maps.get(keys[0])
    before = held.maps.copy()
    maps.forget()
    assert not maps._spare, "a map of it is still in use"
    for key in keys:
        assert np.array_equal(maps.get(key).maps, direct.get(key).maps)
    assert np.array_equal(held.maps, before)
    maps.forget()
    spare = {id(block) for block in maps._spare}
    assert spare
    for key in reversed(keys):
        found = maps.get(key)
        assert np.array_equal(found.maps, direct.get(key).maps)
    assert id(found.maps.base) in spare


# --- zarrs ---


def test_zarrs_reads_every_chunk(tmp_path, monkeypatch):
    pytest.importorskip("zarrs")
    store(tmp_path)
    monkeypatch.setattr("pipeline.mapstore.read._FEW", 0)
    monkeypatch.setattr(chunks, "cores", lambda: 2)
    monkeypatch.setattr(Group, "_read_by_hand", lambda *_: pytest.fail("read by hand"))
    group = MapStore(tmp_path).group("00000")
    for row, found in zip(rows("00000"), group.load(), strict=True):
        assert np.array_equal(found.maps, row.maps)
        assert np.array_equal(group.get(row.key).maps, row.maps)


def test_files_of_many_chunks(tmp_path, reader, monkeypatch):
    """Reads that lie across the files of the array."""
    monkeypatch.setattr("pipeline.mapstore.write.SHARD", 128)
    made = rows("00000", (100, 60, 200, 3))
    write_shard(tmp_path / "00000.zarr", made)
    assert len(list((tmp_path / "00000.zarr" / "maps" / "c").iterdir())) == 3
    for row in made:
        assert np.array_equal(Group(tmp_path / "00000.zarr", "00000").get(row.key).maps, row.maps)


def test_a_missing_chunk_of_zeros_is_not_taken_for_zeros(tmp_path, reader):
    words = [Word(0, n, n + 1) for n in range(64)]
    nothing = np.zeros((64, SIDE, SIDE), np.float32)
    made = [
        example_maps("0000000000", words, blobs(np.random.default_rng(0), 64)),
        example_maps("0000000001", words, nothing, np.zeros(64, bool)),
    ]
    write_shard(tmp_path / "00000.zarr", made)
    group = Group(tmp_path / "00000.zarr", "00000")
    assert not group.get("0000000001").maps.any()
    file = tmp_path / "00000.zarr" / "maps" / "c" / "0" / "0" / "0"
    sound = file.read_bytes()
    index = np.frombuffer(sound[-36:-4], "<u8").copy()
    index[2:] = 2**64 - 1  # as Zarr marks a chunk that was never written
    import google_crc32c

    tail = index.tobytes()
    file.write_bytes(sound[:-36] + tail + google_crc32c.value(tail).to_bytes(4, "little"))
    assert not zarr.open_array(str(tmp_path / "00000.zarr" / "maps"), mode="r")[64:].any()  # the trap
    with pytest.raises(receipts.Damaged, match=r"00000\.zarr.*0000000001"):
        Group(tmp_path / "00000.zarr", "00000").get("0000000001")


def test_a_fork_reads_too(tmp_path, monkeypatch):
    """The threads of zarrs do not come along with a fork, and it would wait for them for ever."""
    monkeypatch.setattr("pipeline.mapstore.read._FEW", 0)
    monkeypatch.setattr(chunks, "cores", lambda: 2)
    store(tmp_path)
    maps = MapStore(tmp_path)
    expected = maps.get("0000000002").maps
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(
        target=lambda: results.put(
            [np.array_equal(s.get("0000000002").maps, expected) for s in (MapStore(tmp_path), maps)]
        )
    )
    child.start()
    assert results.get(timeout=60) == [True, True]
    child.join()
    assert chunks.usable() == chunks.installed()  # here nothing has changed
