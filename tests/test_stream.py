"""The training stream: one order, whatever the workers, ranks and interruptions."""

import io
import itertools
import pickle

import numpy as np
import pytest
from PIL import Image
from quick_disk import quick_disk  # noqa: F401 (used by every test)

from pipeline import receipts
from pipeline.archive.order import BatchPlan, Mixture, Order
from pipeline.archive.read import Archive
from pipeline.archive.stage import shard
from pipeline.archive.stream import Stream, shards_within
from pipeline.config import Config
from pipeline.engine import EngineConfig
from pipeline.examples import Word
from pipeline.mapstore.quality import QualityFilter, quality
from pipeline.mapstore.read import MapStore
from pipeline.mapstore.schema import example_maps
from pipeline.mapstore.write import write_shard
from pipeline.sources.config import DataConfig

COUNT, SHARD = 40, 8
WINDOW = 120_000  # bytes: some of the shards, not all


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Forty text-and-image examples in five shards, with maps for all but every seventh."""
    folder = tmp_path_factory.mktemp("stream")
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    (folder / "a.png").write_bytes(buffer.getvalue())
    records = [
        {"id": str(n), "image": "a.png", "conversations": [
            {"from": "human", "value": "Which?"}, {"from": "gpt", "value": "x" * (n % 9 + 1) + f" {n}"}]}
        for n in range(COUNT)
    ]  # fmt: skip
    (folder / "list.jsonl").write_text("\n".join(map(repr, records)).replace("'", '"'))
    data = DataConfig(name="d", kind="llava_json", path=str(folder / "list.jsonl"), shard_size=SHARD)
    shard(Config(data=data, engine=EngineConfig(workers=1), shards_dir=str(folder)))
    archive = Archive(folder / "d" / "examples" / "train")
    rng = np.random.default_rng(0)
    made = []
    for number, tar in enumerate(archive.shards):
        rows = [
            example_maps(key, [Word(1, 0, 1), Word(1, 2, 3)], rng.random((2, 32, 32)))
            for which, key in enumerate(archive.shard(number).keys)
            if (number * SHARD + which) % 7
        ]
        write_shard(folder / "maps" / f"{tar.stem}.zarr", rows)
        made.append(folder / "maps" / f"{tar.stem}.json")
        receipts.write(made[-1], stage="t", settings={}, files=[folder / "maps" / f"{tar.stem}.zarr"])
    receipts.write(folder / "maps" / "manifest.json", stage="t", settings={}, children=made)
    return folder


def stream(cache, stores=1, **options):
    archives = [Archive(cache / "d" / "examples" / "train") for _ in range(stores)]
    maps = [MapStore(cache / "maps", cache_bytes=1 << 22) for _ in range(stores)]
    return Stream(archives, maps, **{"seed": 5, "batch_size": 6, "window_bytes": WINDOW, **options})


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def run(batches, count):
    return [[sample.index for sample in batch.samples] for batch in itertools.islice(batches, count)]


def test_an_epoch_is_complete_and_shuffled_in_windows(cache):
    found = stream(cache)
    assert 1 < found.order.window < 5
    seen = flat(run(found.batches(workers=0), 20))
    assert sorted(seen[:COUNT]) == sorted(seen[COUNT : 2 * COUNT]) == list(range(COUNT))
    assert seen[:COUNT] != seen[COUNT : 2 * COUNT] != list(range(COUNT))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_resume_is_exact_with_any_number_of_workers(cache, workers):
    whole = run(stream(cache).batches(workers=0), 12)
    batches = stream(cache).batches(workers=workers)
    begun = [next(batches) for _ in range(5)]
    batches.close()
    resumed = stream(cache).batches(begun[-1].after, workers=workers)
    assert [[s.index for s in batch.samples] for batch in begun] + run(resumed, 7) == whole


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_ranks_share_the_same_global_batches(cache, ranks):
    parts = [run(stream(cache).batches(rank=rank, ranks=ranks, workers=0), 8) for rank in range(ranks)]
    joined = [flat(part[step] for part in parts) for step in range(8)]
    assert joined == run(stream(cache).batches(workers=0), 8)


def test_maps_are_joined_and_counted(cache):
    found = stream(cache)
    batch = found.batch(0)
    for sample in batch.samples:
        assert (sample.maps is None) == (sample.index % 7 == 0)
        if sample.maps:
            assert sample.maps.key == sample.example.key
            assert sample.usable.all()
    for index in range(COUNT):
        found[index]
    assert (found.counts.examples, found.counts.without_maps) == (46, 6 + sum(s.index % 7 == 0 for s in batch.samples))
    bare = Stream([found.archives[0]], [None], seed=5, batch_size=6, window_bytes=WINDOW)
    assert [s.index for s in bare.batch(0).samples] == [s.index for s in batch.samples]
    assert pickle.loads(pickle.dumps(found)).batch(0).samples[0].example == batch.samples[0].example


def test_decoded_shards_stay_within_their_bytes(cache):
    maps = MapStore(cache / "maps", cache_bytes=40_000)
    direct = MapStore(cache / "maps")
    for key in Archive(cache / "d" / "examples" / "train").keys:
        found, expected = maps.get(key), direct.get(key)
        assert (found is None) == (expected is None)
        assert found is None or np.array_equal(found.maps, expected.maps)
        assert sum(maps.group(name).decoded_bytes for name in maps._loaded) <= 40_000
    assert len(maps._loaded) == 2
    assert not direct._loaded


def test_quality(cache):
    y, x = np.mgrid[:32, :32]
    peaked = np.exp(-((y - 9) ** 2 + (x - 9) ** 2) / 8)
    flat = 0.5 + 0.001 * np.random.default_rng(0).random((32, 32))
    maps = example_maps("0000000000", [Word(0, 0, 1), Word(0, 2, 3), Word(0, 4, 5)], np.stack([peaked, flat, flat * 0]))
    peak, entropy = quality(maps)
    assert peak[0] > 30 > 1.1 > peak[1] > 1
    assert entropy[0] < 0.7 < 0.99 < entropy[1] < 1.0001
    assert QualityFilter().usable(maps).tolist() == [True, True, False]
    assert QualityFilter(min_peak=2).usable(maps).tolist() == [True, False, False]
    assert QualityFilter(max_entropy=0.9).usable(maps).tolist() == [True, False, False]
    filtered = stream(cache, quality=QualityFilter(min_peak=50))
    filtered.batch(0)
    assert filtered.counts.unusable_share == 1


def test_batches_of_similar_length(cache):
    found = stream(cache, bucket=True, window_bytes=1 << 30)
    lengths = np.concatenate([archive.lengths for archive in found.archives])
    batches = run(found.batches(workers=0), 7)
    assert sorted(flat(batches)) == list(range(COUNT))
    spread = [np.ptp(lengths[batch]) for batch in batches]
    assert np.mean(spread) < 4 < np.mean([np.ptp(lengths[b]) for b in run(stream(cache).batches(workers=0), 7)])
    limited = stream(cache, max_tokens=50)
    batches = list(itertools.islice(limited.batches(workers=0), 30))
    for batch in batches:
        indices = [sample.index for sample in batch.samples]
        assert len(indices) == 1 or lengths[indices].max() * len(indices) <= 50
    resumed = stream(cache, max_tokens=50).batches(batches[11].after, workers=2)
    assert run(resumed, 5) == [[sample.index for sample in batch.samples] for batch in batches[12:17]]
    with pytest.raises(ValueError, match="no batch begins"):
        stream(cache, max_tokens=50).batch(1 if batches[0].after != 1 else 2)


def test_an_overlong_example_makes_its_own_batch():
    plan = BatchPlan(Order(4, seed=0), 4, np.array([5, 100, 5, 5]), max_tokens=20)
    sizes, position = [], 0
    while position < 4:
        sizes.append(plan.batch(position))
        position += len(sizes[-1])
    assert [1] in sizes
    with pytest.raises(ValueError, match="lengths"):
        BatchPlan(Order(4, seed=0), 4, bucket=True)


def test_a_mixture_keeps_its_weights_and_its_place():
    orders = [Order([10, 10], seed=1, window=1), Order([np.arange(20, 50)], seed=2)]
    mixture = Mixture(orders, [3, 1], seed=9)
    seen = mixture.indices(0, 4000)
    assert sum(index < 20 for index in seen) == 3000
    first = [index for index in seen if index < 20]
    assert all(sorted(first[n : n + 20]) == list(range(20)) for n in range(0, 3000, 20))
    assert mixture.indices(1234, 50) == seen[1234:1284]
    assert pickle.loads(pickle.dumps(mixture)).indices(999, 3) == seen[999:1002]
    assert sum(index < 20 for index in Mixture(orders, [0, 1], seed=9).indices(0, 100)) == 0
    with pytest.raises(ValueError, match="weight"):
        Mixture(orders, [1], seed=0)


def test_a_weighted_stream(cache):
    found = stream(cache, stores=2, weights=[1, 3], batch_size=20)
    indices = flat(run(found.batches(workers=0), 50))
    assert sum(index >= COUNT for index in indices) == 750
    assert len(stream(cache, stores=2)) == 2 * COUNT
    assert sorted(stream(cache, stores=2, batch_size=80).plan.batch(0)) == list(range(80))


def test_shards_within():
    assert shards_within([10, 20, 30], 60) == 3
    assert shards_within([10, 20, 30], 59) == 2
    assert shards_within([10, 20, 30], 1) == 1


def test_any_position_of_a_large_set_is_found_at_once():
    order = Order([1000] * 130, seed=0, window=8)
    assert len(order.indices(98_765_432, 256)) == 256
