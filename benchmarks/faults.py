"""What happens to the caches when things go wrong: `make faults`.

    python -m benchmarks.faults --kills 20 --flips 200 --json out.json

Each campaign does damage to the shards or maps of a small world, then either goes on from there and compares every
byte with an uninterrupted run, or shows that the damage is noticed before anything of it is used:

    kills       kill -9 at random moments of shard and of precompute, then the same again until it is done
    flips       single bits, with the file's time set back, in every kind of file
    truncated   at every boundary that a reader might take for an end
    deleted     each kind of file
    full disk   a limit on the size of files
    two         a second process on the same output
    failing     a task that raises now and then
    dying       a worker process of Dask that dies now and then
    repaired    a bit of each kind of file, then what `make verify ARGS=repair=true` does

The last line is `RESULT {...}`; the exit code is 1 if anything came out differently.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from dask import threaded
from google_crc32c import value

from pipeline import receipts, verify
from pipeline.archive import write
from pipeline.archive.read import Archive
from pipeline.archive.stage import shard
from pipeline.config import Config, compose
from pipeline.errors import UserError
from pipeline.layout import Layout
from pipeline.mapstore.read import MapStore

FORK = multiprocessing.get_context("fork")
SIZES = "{train: 40, val: 6, test: 4, ood_pairs: 3, ood_count: 3, ood_background: 3}"
PATIENCE = 300  # seconds for a cluster whose workers die
WORLD = ("data=world", f"data.sizes={SIZES}", "data.shard_size=8", "engine.workers=2")


def settings(folder: Path, *overrides: str) -> Config:
    """The small world with its caches in `folder`."""
    return compose([*WORLD, f"shards_dir={folder}/shards", f"runs_dir={folder}/runs", *overrides])


def precompute(cfg: Config) -> None:
    """The precompute stage; imported here because it brings in torch."""
    from pipeline.teacher.stage import precompute as run

    run(cfg)


def contents(folder: Path) -> dict[str, bytes]:
    """Every byte that must not depend on what happened: tars, tables and Zarr groups."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (path.suffix in (".tar", ".parquet") or any(p.suffix == ".zarr" for p in path.parents))
    }


# --- processes ---


def child(function: Callable[[], object], limit: int = 0) -> multiprocessing.Process:
    """Starts a forked process: everything is imported already, so that a kill hits work and not imports."""

    def body() -> None:
        with (
            Path(os.devnull).open("w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            if limit:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            # The threads of Dask's pools did not come along with the fork, so the pools must not be used.
            threaded.pools.clear()
            threaded.default_pool = None
            try:
                function()
            except UserError:
                os._exit(2)
            except Exception:  # noqa: BLE001 (the campaign tells a traceback from a clear error by the code)
                os._exit(1)
            os._exit(0)

    process = FORK.Process(target=body)
    process.start()
    return process


def finish(process: multiprocessing.Process) -> int:
    """The exit code of a process."""
    process.join()
    return process.exitcode


def kills(
    stage: Callable[[Config], object], begin: Callable[[Path], Config], count: int, rng: random.Random
) -> tuple[int, int]:
    """Kills a stage at random moments and goes on, until `count` kills have been done.

    Args:
        begin: prepares a folder for the stage and returns its settings.

    Returns:
        Kills, and how many of them led to the bytes of an uninterrupted run in the end.
    """
    with workspace() as folder:
        cfg = begin(folder / "whole")
        start = time.monotonic()
        assert finish(child(lambda: stage(cfg))) == 0, "the stage fails without any fault"
        seconds = time.monotonic() - start
        whole = contents(folder / "whole")
        done = identical = run = 0
        while done < count:
            run += 1
            place = folder / f"run{run}"
            cfg = begin(place)
            here = 0
            while True:
                process = child(lambda cfg=cfg: stage(cfg))
                process.join(rng.uniform(0, seconds) if done + here < count else None)
                if process.exitcode is not None:
                    break
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                here += 1
            done += here
            identical += here * (process.exitcode == 0 and contents(place) == whole)
            shutil.rmtree(place)
    return done, identical


# --- damage ---

KINDS = {
    "tar": "examples/train/*.tar",
    "table": "examples/train/*.parquet",
    "receipt": "examples/train/[0-9]*.json",
    "manifest": "examples/train/manifest.json",
    "maps": "maps/*/train/*.zarr/maps/c/*/*/*",
    "small arrays": "maps/*/train/*.zarr/*/c/*",
    "descriptions": "maps/*/train/*.zarr/**/zarr.json",
    "maps receipt": "maps/*/train/[0-9]*.json",
    "maps manifest": "maps/*/train/manifest.json",
    "stage manifest": "examples/manifest.json",
}


def noticed(cfg: Config) -> bool:
    """Reads every example and map; True if that was refused."""
    layout = Layout(cfg)
    try:
        receipts.load(layout.examples_dir() / "manifest.json")
        for example in Archive(layout.examples_dir("train")):
            del example
        store = MapStore(layout.maps_split_dir("train"))
        for name in store.shards:
            store.group(name).load()
    except receipts.Damaged:
        return True
    return False


@contextlib.contextmanager
def changed(path: Path, data: bytes | None) -> Iterator[None]:
    """A file with other content (None: gone) and the old time, for a while."""
    sound, stat = path.read_bytes(), path.stat()
    if data is None:
        path.unlink()
    else:
        path.write_bytes(data)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    try:
        yield
    finally:
        path.write_bytes(sound)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def files(cfg: Config, kind: str) -> list[Path]:
    """The files of one kind."""
    return [path for path in sorted(Layout(cfg).shards.glob(KINDS[kind])) if path.is_file()]


def flips(cfg: Config, count: int, rng: random.Random) -> dict[str, tuple[int, int]]:
    """Flips `count` random bits in each kind of file, one at a time."""
    found = {}
    for kind in KINDS:
        candidates = files(cfg, kind)
        detected = 0
        for _ in range(count):
            path = rng.choice(candidates)
            data = bytearray(path.read_bytes())
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            with changed(path, bytes(data)):
                detected += noticed(cfg)
        found[kind] = (count, detected)
    return found


def truncations(cfg: Config) -> tuple[int, int]:
    """Cuts a file of each kind at its beginning, end and in between; a tar around every header and member."""
    done = detected = 0
    for kind in KINDS:
        path = files(cfg, kind)[0]
        data = path.read_bytes()
        cuts = {0, 1, len(data) // 2, len(data) - 1, len(data) - 4, len(data) - 36}
        if kind == "tar":
            cuts |= {
                512,
                511,
                len(data) - 10240,
                len(data) - 1024,
                *range(512, len(data), max(512, len(data) // 40960 * 512)),
            }
        if kind == "maps":
            cuts |= ends_of_chunks(data)
        for cut in sorted(cut for cut in cuts if 0 <= cut < len(data)):
            with changed(path, data[:cut]):
                done += 1
                detected += noticed(cfg)
    return done, detected


def ends_of_chunks(data: bytes) -> set[int]:
    """Where the chunks of a file of the sharded array end, by its index."""
    count = next(n for n in range(1, 65) if value(data[-16 * n - 4 : -4]) == int.from_bytes(data[-4:], "little"))
    index = np.frombuffer(data[-16 * count - 4 : -4], "<u8").reshape(-1, 2)
    return {int(offset + length) for offset, length in index if length < 1 << 32}


def deletions(cfg: Config) -> tuple[int, int]:
    """Deletes the first and the last file of each kind."""
    done = detected = 0
    for kind in KINDS:
        for path in {files(cfg, kind)[0], files(cfg, kind)[-1]}:
            with changed(path, None):
                done += 1
                detected += noticed(cfg)
    return done, detected


# --- other ends ---


def full_disk(stage: Callable[[Config], object], begin: Callable[[Path], Config]) -> tuple[int, int]:
    """Limits the size of files at several sizes; the error must be clear, and going on must give the same bytes."""
    with workspace() as folder:
        cfg = begin(folder / "whole")
        before = contents(folder / "whole").keys()
        assert finish(child(lambda: stage(cfg))) == 0
        whole = contents(folder / "whole")
        largest = max(len(data) for name, data in whole.items() if name not in before)
        done = same = 0
        for part in (0.02, 0.3, 0.9):
            place = folder / str(part)
            cfg = begin(place)
            code = finish(child(lambda cfg=cfg: stage(cfg), limit=int(part * largest)))
            again = finish(child(lambda cfg=cfg: stage(cfg)))
            done += 1
            same += code == 2 and again == 0 and contents(place) == whole
    return done, same


def two_processes(stage: Callable[[Config], object], begin: Callable[[Path], Config]) -> tuple[int, int]:
    """Starts the stage twice on one output: one of them does the work, the other says who holds it."""
    with workspace() as folder:
        whole, cfg = begin(folder / "whole"), begin(folder / "two")
        assert finish(child(lambda: stage(whole))) == 0
        codes = sorted(finish(process) for process in [child(lambda: stage(cfg)) for _ in range(2)])
        same = codes in ([0, 2], [0, 0]) and contents(folder / "two") == contents(folder / "whole")
    return 1, int(same)


def die_once(job: write.Job) -> receipts.Receipt:
    """Writes a shard; in the middle of every third one its process dies, the first time."""
    mark = job.folder / f"died-{job.stem}"
    if job.number % 3 == 1 and not mark.exists():
        mark.touch()
        (job.folder / f".{job.stem}.tar.{os.getpid()}.tmp").write_bytes(b"part")
        os.kill(os.getpid(), signal.SIGKILL)
    return write.write_rows(job, write._read(job))


def dying_workers(begin: Callable[[Path], Config]) -> tuple[int, int]:
    """Worker processes of a Dask cluster die; the stage comes to its end all the same, in one run."""
    sound = write.write_shard
    with workspace() as folder:
        shard(begin(folder / "whole"))
        cfg = begin(folder / "dying")
        cfg.engine.kind = "processes"
        write.write_shard = die_once
        process = child(lambda: shard(cfg))
        write.write_shard = sound
        process.join(PATIENCE)
        if process.exitcode is None:
            process.kill()
        deaths = len(list(folder.rglob("died-*")))
        same = process.exitcode == 0 and contents(folder / "dying") == contents(folder / "whole")
    return max(deaths, 1), deaths * same


def repairs(cfg: Config, rng: random.Random) -> tuple[int, int]:
    """Damages each kind of file in turn; repair must name it, bring back every byte, and touch no sound shard."""
    folder = Layout(cfg).shards
    whole = contents(folder)
    done = same = 0
    for kind in KINDS:
        path = rng.choice(files(cfg, kind))
        times = {name: (folder / name).stat().st_mtime_ns for name in whole}
        data, stat = bytearray(path.read_bytes()), path.stat()
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        code = finish(child(lambda: verify.repair(cfg)))
        stems = {part.partition(".")[0] for part in path.relative_to(folder).parts}
        touched = [
            name
            for name, time_ns in times.items()
            if (folder / name).stat().st_mtime_ns != time_ns and not stems & set(name.replace(".", "/").split("/"))
        ]
        done += 1
        same += code == 0 and contents(folder) == whole and not touched and not noticed(cfg)
    return done, same


def failing_tasks(begin: Callable[[Path], Config], rng: random.Random) -> tuple[int, int]:
    """Tasks raise now and then; the stage stops with the error and goes on when it is run again."""
    with workspace() as folder:
        shard(begin(folder / "whole"))
        cfg = begin(folder / "failing")
        sound, stops = write.write_shard, 0

        def attempt(chance: random.Random) -> None:
            def sometimes(job):
                if chance.random() < 0.3:
                    raise RuntimeError("a task that fails now and then")
                return sound(job)

            write.write_shard = sometimes  # in the child only
            shard(cfg)

        while finish(child(lambda: attempt(random.Random(rng.random())))) != 0 and stops < 200:
            stops += 1
            rng.random()  # the child drew from a copy
        same = contents(folder / "failing") == contents(folder / "whole")
    return stops, stops * same


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """A folder for one campaign."""
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def campaign(kill_count: int, flip_count: int, seed: int, say: Callable[[str], object] = print) -> dict[str, list[int]]:
    """All campaigns; (done, as it should be) by name."""
    rng = random.Random(seed)
    found: dict[str, tuple[int, int]] = {}

    def note(name: str, result: tuple[int, int], word: str) -> None:
        found[name] = result
        say(f"{name} {result[0]} {word} {result[1]}")

    def sharded(folder: Path) -> Config:
        cfg = settings(folder)
        with quiet():
            shard(cfg)
        return cfg

    note("shard kills", kills(shard, settings, kill_count, rng), "identical")
    note("precompute kills", kills(precompute, sharded, kill_count, rng), "identical")
    note("kills", both(found["shard kills"], found["precompute kills"]), "identical")
    with workspace() as folder, quiet():
        cfg = sharded(folder)
        precompute(cfg)
        assert not noticed(cfg), "sound caches are refused"
        bits, cut, gone = flips(cfg, flip_count, rng), truncations(cfg), deletions(cfg)
        again = repairs(cfg, rng)
    for kind, result in bits.items():
        note(f"flips in {kind}", result, "detected")
    note("flips", tuple(map(sum, zip(*bits.values(), strict=True))), "detected")
    note("truncated", cut, "detected")
    note("deleted", gone, "detected")
    note("repaired", again, "identical")
    with quiet():
        ends = {
            "full disks": both(full_disk(shard, settings), full_disk(precompute, sharded)),
            "two processes": both(two_processes(shard, settings), two_processes(precompute, sharded)),
            "failing tasks": failing_tasks(settings, rng),
            "dying workers": dying_workers(settings),
        }
    for name, result in ends.items():
        note(name, result, "identical")
    return {name: list(result) for name, result in found.items()}


def both(first: tuple[int, int], second: tuple[int, int]) -> tuple[int, int]:
    """The sums of two results."""
    return first[0] + second[0], first[1] + second[1]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the stages' own lines."""
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each stage")
    parser.add_argument("--flips", type=int, default=200, help="in each kind of file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the result")
    given = parser.parse_args()
    found = campaign(given.kills, given.flips, given.seed)
    wrong = [name for name, (done, right) in found.items() if done != right]
    result = {**{name: f"{right}/{done}" for name, (done, right) in found.items()}, "ok": not wrong}
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"RESULT {json.dumps(result)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
