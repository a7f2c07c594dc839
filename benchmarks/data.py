"""How fast the data layer is, each rate beside a simpler way on the same bytes: `make bench-data`.

    python -m benchmarks.data --examples 2000 --scale 130000 --json out.json

Sides of a ratio take turns in one process, and the ratio is the median of those of the turns, so that a slow moment
hits both. Above 1 is faster than the other way.

    shard_vs_bare          the shard stage on one core against a bare loop on the same core that reads, checks (decodes)
                           and writes the same images and texts and flushes them to the disk, as the stage does
    shard_vs_unflushed     ... against the same loop without the flush: what it wrote may not be on the disk yet
    shard_vs_same_check    ... against the same loop with the stage's own check (`inspect_image`) in place of decoding,
                           which finds the same faults in less time: what is left are hashes, tars, tables, receipts
    shard_vs_webdataset    ... against webdataset's ShardWriter in such a loop, without a flush
    stream_vs_raw          examples with maps in training order against reading the same bytes and decoding the same
                           chunks in file order
    stream_vs_webdataset   examples alone in training order against webdataset streaming the tars
    maps_vs_jpeg           maps of random examples from the store against one JPEG per word
    world_*                bytes per map and error of both profiles on maps of the bundled teacher
    *_bytes_per_map        on disk, files of the JPEG layout in blocks of 4 KiB
    resume_seconds         from nothing to the first batch in the middle of an epoch, at `--scale` examples
    scale_*                `--scale` small examples, and a tenth of them before and after in the same run: seconds to
                           shard and open them, and peak memory of that process; scale_growth is seconds per example
                           divided by those of the tenth: at most 1 is linear or better

The last line is `RESULT {...}`.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline import receipts
from pipeline.archive.read import Archive
from pipeline.archive.stage import shard
from pipeline.archive.stream import Stream
from pipeline.config import Config
from pipeline.engine import EngineConfig
from pipeline.examples import inspect_image
from pipeline.mapstore.exchange import to_jpeg
from pipeline.mapstore.read import Group, MapStore
from pipeline.mapstore.schema import CHUNK, PROFILES, SIDE, example_maps
from pipeline.mapstore.write import write_shard
from pipeline.sources.config import DataConfig

BLOCK = 4096  # what a small file takes on most file systems
ANSWER = "A large dog with a red collar runs over the wet grass, and behind it a man in a yellow coat is laughing."


def conversation(number: int) -> list[dict]:
    """Twenty-four words or so."""
    return [{"from": "human", "value": "<image>\nWhat is going on?"}, {"from": "gpt", "value": f"{ANSWER} {number}"}]


def photographs(folder: Path, count: int, side: int) -> Path:
    """JPEG files of smooth noise, which compresses like a photograph, and a LLaVA list; returns the list."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    records = []
    for number in range(count):
        small = Image.fromarray(rng.integers(0, 255, (side // 8, side // 8, 3), np.uint8))
        small.resize((side, side), Image.Resampling.BICUBIC).save(folder / "images" / f"{number}.jpg", quality=90)
        records.append({"id": str(number), "image": f"images/{number}.jpg", "conversations": conversation(number)})
    (folder / "list.json").write_text(json.dumps(records))
    return folder / "list.json"


def config(source: Path, shards: Path, **data) -> Config:
    """The shard stage on one worker, so that cores are equal."""
    settings = DataConfig(**{"name": "d", "kind": "llava_json", "path": str(source), **data})
    return Config(data=settings, engine=EngineConfig(workers=1), shards_dir=str(shards))


def rates(
    sides: dict[str, Callable[[], int]], repeat: int, settle: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Items per second of each side in every turn, after one for warming up; `settle` is called after each, untimed."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeat + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            count = run()
            seconds = time.perf_counter() - start
            if turn:
                taken[name].append(count / seconds)
            settle()
    return taken


def ratio(found: dict[str, list[float]], one: str, other: str) -> float:
    """The median over the turns of one side's rate divided by the other's."""
    return statistics.median(a / b for a, b in zip(found[one], found[other], strict=True))


# --- shard ---


def shard_rates(source: Path, folder: Path, repeat: int) -> dict[str, list[float]]:
    """All on one core, so that no side has help. Between the sides everything is flushed, untimed: otherwise the stage,
    which waits for the disk, would wait for what the loops before it left behind."""
    records = json.loads(source.read_text())

    def ours() -> int:
        shutil.rmtree(folder / "ours", ignore_errors=True)
        with quiet():
            return shard(config(source, folder / "ours")).counts["examples"]

    def decoded(data: bytes) -> None:
        with Image.open(io.BytesIO(data)) as image:
            image.convert("RGB")

    def read(record: dict, check: Callable[[bytes], object] = decoded) -> bytes:
        data = (source.parent / record["image"]).read_bytes()
        check(data)
        return data

    def bare(flush: bool, check: Callable[[bytes], object] = decoded) -> int:
        with (folder / "bare.bin").open("wb") as file:
            for record in records:
                file.write(read(record, check))
                file.write(json.dumps(record["conversations"]).encode())
            if flush:
                file.flush()
                os.fsync(file.fileno())
        return len(records)

    def writer() -> int:
        import webdataset

        with webdataset.ShardWriter(str(folder / "wds-%05d.tar"), maxcount=1000, verbose=0) as sink:
            for number, record in enumerate(records):
                sink.write({"__key__": f"{number:09d}", "jpg": read(record), "json": record["conversations"]})
        return len(records)

    def settle() -> None:
        for file in (folder / "bare.bin", *folder.glob("wds-*.tar")):
            if file.exists():
                receipts.sync_tree(file)

    sides = {
        "ours": ours,
        "bare": lambda: bare(True),
        "unflushed": lambda: bare(False),
        "same_check": lambda: bare(True, inspect_image),
        "webdataset": writer,
    }
    with one_core():
        return rates(sides, repeat, settle)


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Keeps this process on the last of its cores."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the stage's own lines."""
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


# --- maps ---


def smooth_maps(count: int, seed: int) -> np.ndarray:
    """(count, 32, 32) sums of three blobs with a little noise, as attention looks."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE]
    total = 0.01 * rng.standard_normal((count, SIDE, SIDE))
    for _ in range(3):
        centre, width = rng.uniform(0, SIDE, (2, count, 1, 1)), rng.uniform(2, 8, (count, 1, 1))
        total += np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / (2 * width**2))
    return (0.01 * total).astype(np.float32)


def write_maps(archive: Archive, folder: Path, profile: str) -> MapStore:
    """Maps of every word of an archive."""
    made = []
    for number, tar in enumerate(archive.shards):
        rows = []
        for example in archive.shard(number):
            words = example.words()
            rows.append(example_maps(example.key, words, smooth_maps(len(words), int(example.key))))
        write_shard(folder / f"{tar.stem}.zarr", rows, profile=profile)
        made.append(folder / f"{tar.stem}.json")
        receipts.write(made[-1], stage="bench", settings={}, files=[folder / f"{tar.stem}.zarr"], durable=True)
    receipts.write(folder / "manifest.json", stage="bench", settings={}, children=made)
    return MapStore(folder, cache_bytes=1 << 30)


def bytes_per_map(store: MapStore) -> float:
    files = [path for path in store.folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    words = sum(len(store.group(name).status) for name in store.shards)
    return sum(path.stat().st_size for path in files) / words


def write_jpegs(store: MapStore, keys: list[str], folder: Path) -> dict[str, list[Path]]:
    """The authors' layout: a file per word."""
    found = {}
    for key in keys:
        place = folder / key
        place.mkdir(parents=True)
        found[key] = [place / f"attention_{row}.jpg" for row in range(len(store.get(key).words))]
        for path, levels in zip(found[key], store.get(key).maps, strict=True):
            path.write_bytes(to_jpeg(levels))
    return found


def map_rates(store: MapStore, jpegs: dict[str, list[Path]], repeat: int) -> dict[str, list[float]]:
    direct = MapStore(store.folder)
    keys = list(jpegs)
    np.random.default_rng(0).shuffle(keys)

    def ours() -> int:
        return sum(len(direct.get(key).maps) for key in keys)

    def files() -> int:
        count = 0
        for key in keys:
            for path in jpegs[key]:
                with Image.open(path) as image:
                    count += np.asarray(image).shape[0] == SIDE
        return count

    return rates({"ours": ours, "jpeg": files}, repeat)


def world_profiles(count: int, folder: Path) -> dict[str, float]:
    """Bytes per map, everything counted, and error of both profiles on maps of the bundled teacher.

    Args:
        count: examples of the world.
    """
    from pipeline.config import compose
    from pipeline.layout import Layout
    from pipeline.teacher.stage import precompute

    sizes = f"{{train: {count}, val: 1, test: 1, ood_pairs: 1, ood_count: 1, ood_background: 1}}"
    cfg = compose([f"shards_dir={folder}", f"data.sizes={sizes}", "teacher.splits=[train]", "engine.workers=1"])
    shard(cfg)
    precompute(cfg)
    stored = MapStore(Layout(cfg).maps_split_dir("train"))
    rows = [stored.get(key) for key in stored.keys]
    words = sum(len(row.words) for row in rows)
    found: dict[str, float] = {"world_maps": words}
    for profile in PROFILES:
        path = folder / profile / "00000.zarr"
        write_shard(path, rows, profile=profile)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        pairs = zip(Group(path, "00000").load(), rows, strict=True)
        found[f"world_{profile}_bytes_per_map"] = size / words
        found[f"world_{profile}_max_error"] = max(
            float(np.abs(one.unit() - row.unit()).max(initial=0)) for one, row in pairs
        )
    return found


# --- stream ---


def stream_rates(archive: Archive, store: MapStore, repeat: int) -> dict[str, list[float]]:
    batch = 32
    steps = len(archive) // batch
    joined = Stream([archive], [store], seed=0, batch_size=batch)
    alone = Stream([archive], [None], seed=0, batch_size=batch)

    def served(stream: Stream) -> Callable[[], int]:
        def run() -> int:
            store.forget()  # each epoch decodes its shards again
            batches = stream.batches(workers=0)
            return sum(len(next(batches).samples) for _ in range(steps))

        return run

    def raw() -> int:
        import google_crc32c
        from numcodecs import blosc

        for tar in archive.shards:
            with tar.open("rb") as file:
                while file.read(1 << 20):
                    pass
        for name in store.shards:
            group: Group = store.group(name)
            for position in range(len(group._digests["maps"])):
                file, inside = divmod(position, group._per_file // CHUNK)
                offset, length = group._file_index(file, "")[inside]
                data = os.pread(group._files[file], length, offset)
                packed = data[:-4]
                google_crc32c.value(packed)
                blosc.decompress(packed)
        return steps * batch

    def webdataset() -> int:
        from webdataset import WebDataset

        dataset = WebDataset([str(tar) for tar in archive.shards], shardshuffle=False).shuffle(1000)
        return sum(1 for sample in dataset if json.loads(sample["json"]))

    return rates({"joined": served(joined), "raw": raw, "alone": served(alone), "webdataset": webdataset}, repeat)


# --- scale ---


def scale(count: int, folder: Path) -> dict[str, float]:
    """Shards and opens `count` small examples in a process of its own."""
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.data", "--scale-only", str(count), "--folder", str(folder)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if run.returncode:
        raise RuntimeError(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


def scale_here(count: int, folder: Path) -> dict[str, float]:
    folder.mkdir(parents=True, exist_ok=True)
    images = []
    for number in range(16):
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16), (16 * number, 0, 0)).save(buffer, "PNG")
        (folder / f"{number}.png").write_bytes(buffer.getvalue())
        images.append(f"{number}.png")
    for name, number_of in (("warm", 100), ("list", count)):  # the first brings in what is imported late
        with (folder / f"{name}.jsonl").open("w") as file:
            for number in range(number_of):
                record = {"id": str(number), "image": images[number % 16], "conversations": conversation(number)}
                file.write(json.dumps(record) + "\n")
    shard(config(folder / "warm.jsonl", folder / "warm"))
    start = time.perf_counter()
    shard(config(folder / "list.jsonl", folder / "shards"))
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    archive = Archive(folder / "shards" / "d" / "examples" / "train")
    opened = time.perf_counter() - start
    start = time.perf_counter()
    archive = Archive(folder / "shards" / "d" / "examples" / "train")
    stream = Stream([archive], [None], seed=0, batch_size=32, window_bytes=1 << 28)
    samples = stream.batch(count // 2 * 3).samples
    resumed = time.perf_counter() - start
    assert len(samples) == 32
    # Not getrusage, which begins with the peak of the process that started this one.
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    return {"seconds": seconds, "open": opened, "resume": resumed, "peak_mb": peak}


def measure_scale(count: int, folder: Path) -> dict[str, float]:
    """The keys of RESULT that are about many examples. The tenth is measured on both sides of the whole, so that a
    machine that gets busier does not look like growth."""
    tenth, places = max(count // 10, 1), iter(range(3))
    before, whole, after = (scale(n, folder / f"scale-{next(places)}") for n in (tenth, count, tenth))
    small = (before["seconds"] + after["seconds"]) / 2
    return {
        "resume_seconds": whole["resume"],
        "scale_examples": count,
        f"scale_seconds_{count // 1000}k": whole["seconds"],
        "scale_open_seconds": whole["open"],
        "scale_seconds_tenth": small,
        "scale_growth": whole["seconds"] / count / (small / tenth),
        "scale_peak_mb": whole["peak_mb"],
        "scale_peak_mb_tenth": max(before["peak_mb"], after["peak_mb"]),
    }


def measure(examples: int, side: int, repeat: int, world: int, folder: Path) -> dict[str, float]:
    """The keys of RESULT that are rates and sizes."""
    source = photographs(folder / "photographs", examples, side)
    sharding = shard_rates(source, folder, repeat)
    archive = Archive(folder / "ours" / "d" / "examples" / "train")
    exact = write_maps(archive, folder / "exact", "exact")
    compact = write_maps(archive, folder / "compact", "compact")
    some = archive.keys[: max(1, min(len(archive), 100))]
    jpegs = write_jpegs(exact, some, folder / "jpeg")
    maps = map_rates(exact, jpegs, repeat)
    streaming = stream_rates(archive, exact, repeat)
    error = max(float(np.abs(compact.get(key).unit() - exact.get(key).unit()).max(initial=0)) for key in some)
    sizes = [path.stat().st_size for paths in jpegs.values() for path in paths]
    return {
        "examples": examples,
        "shard_per_second": statistics.median(sharding["ours"]),
        "shard_vs_bare": ratio(sharding, "ours", "bare"),
        "shard_vs_unflushed": ratio(sharding, "ours", "unflushed"),
        "shard_vs_same_check": ratio(sharding, "ours", "same_check"),
        "shard_vs_webdataset": ratio(sharding, "ours", "webdataset"),
        "stream_per_second": statistics.median(streaming["joined"]),
        "stream_vs_raw": ratio(streaming, "joined", "raw"),
        "stream_vs_webdataset": ratio(streaming, "alone", "webdataset"),
        "maps_per_second": statistics.median(maps["ours"]),
        "maps_vs_jpeg": ratio(maps, "ours", "jpeg"),
        "exact_bytes_per_map": bytes_per_map(exact),
        "compact_bytes_per_map": bytes_per_map(compact),
        "compact_max_error": error,
        "jpeg_bytes_per_map": float(np.mean([-(-size // BLOCK) * BLOCK for size in sizes])),
        **(world_profiles(world, folder / "world") if world else {}),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=2000, help="for the ratios")
    parser.add_argument("--side", type=int, default=384, help="pixels of an image's side")
    parser.add_argument("--world", type=int, default=200, help="examples of the world for its maps; 0 leaves them out")
    parser.add_argument("--scale", type=int, default=130_000, help="examples of the large set; 0 leaves it out")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--scale-only", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=None, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.scale_only:
        print(json.dumps(scale_here(given.scale_only, given.folder)))
        return 0
    with tempfile.TemporaryDirectory(prefix="bench-data-") as folder:
        found = measure(given.examples, given.side, given.repeat, given.world, Path(folder))
        if given.scale:
            found |= measure_scale(given.scale, Path(folder))
    result = {name: round(value, 4) if isinstance(value, float) else value for name, value in found.items()}
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    for name, value in result.items():
        print(f"{name:24} {value:,}")
    print(f"RESULT {json.dumps(result)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
