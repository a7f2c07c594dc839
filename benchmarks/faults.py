"""What happens to the caches when things go wrong: `make faults`.

    python -m benchmarks.faults --kills 20 --flips 200 --json out.json
    python -m benchmarks.faults --only "precompute kills" "dying workers" --json out.json    (adds to what is there)

Each campaign does damage to the shards or maps of a small world, then either goes on from there and compares every
byte with an uninterrupted run, or shows that the damage is noticed before anything of it is used:

    shard kills, precompute kills
                    kill -9 at random moments of a stage, then the same again until it is done
    flips           single bits, with the file's time set back, in every kind of file
    truncated       at every boundary that a reader might take for an end
    deleted         each kind of file
    repaired        a bit of each kind of file, then what `make verify ARGS=repair=true` does
    shard on a full disk, precompute on a full disk
                    a limit on the size of files
    two of shard, two of precompute
                    a second process on the same output
    failing tasks   a task that raises now and then, once so that it may pass (tried again) and once so that it may not
    dying workers   worker processes of Dask that die now and then, at once or in the middle of a shard

The last line is `RESULT {...}`; the exit code is 1 if anything came out differently.
"""

import argparse
import contextlib
import errno
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

from pipeline import engine, receipts, verify
from pipeline.archive import write
from pipeline.archive.read import Archive
from pipeline.archive.stage import shard
from pipeline.config import Config, compose
from pipeline.errors import UserError
from pipeline.layout import Layout
from pipeline.mapstore.read import MapStore

FORK = multiprocessing.get_context("fork")
SIZES = "{train: 40, val: 6, test: 4, ood_pairs: 3, ood_count: 3, ood_background: 3}"
PATIENCE = 400  # seconds for a process to end
WORLD = ("data=world", f"data.sizes={SIZES}", "data.shard_size=8", "engine.workers=2")


def settings(folder: Path, *overrides: str) -> Config:
    """The small world with its caches in `folder`."""
    return compose([*WORLD, f"shards_dir={folder}/shards", f"runs_dir={folder}/runs", *overrides])


def precompute(cfg: Config) -> None:
    """The precompute stage; imported here because it brings in torch."""
    from pipeline.teacher.stage import precompute as run

    run(cfg)


def import_teacher() -> None:
    """Imports what precompute needs, so that its kills hit work; nothing is computed here, so a fork may follow."""
    import diffusers
    import transformers

    from pipeline.teacher import stage

    lazy = {diffusers: ("UNet2DConditionModel", "AutoencoderKL", "DDIMScheduler"), transformers: ("CLIPTextModel",)}
    assert stage and all(getattr(module, name) for module, names in lazy.items() for name in names)


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
    """The exit code of a process; one that does not end in `PATIENCE` seconds is killed, which no campaign accepts."""
    process.join(PATIENCE)
    if process.exitcode is None:
        process.kill()
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
                if done + here == count:
                    finish(process)
                    break
                process.join(rng.uniform(0, seconds))
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
    """Writes a shard; the first time its process dies, with odd numbers at once and with others in the middle."""
    mark = job.folder / f"died-{job.stem}"
    if job.number in (1, 2, 3) and not mark.exists():
        mark.touch()
        if job.number == 2:
            (job.folder / f".{job.stem}.tar.{os.getpid()}.tmp").write_bytes(b"part")
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    return write.write_rows(job, write._read(job))


def dying_workers(begin: Callable[[Path], Config]) -> tuple[int, int]:
    """Worker processes of a Dask cluster die; the stage comes to its end all the same, in one run."""
    with workspace() as folder:
        shard(begin(folder / "whole"))
        cfg = begin(folder / "dying")
        cfg.engine.kind = "processes"

        def attempt() -> None:
            write.write_shard = die_once  # in the child only
            shard(cfg)

        code = finish(child(attempt))
        deaths = len(list(folder.rglob("died-*")))
        same = code == 0 and contents(folder / "dying") == contents(folder / "whole")
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
    """Tasks raise now and then. What may pass is tried again in the same run; any other error stops the stage, which
    goes on when it is run again."""
    with workspace() as folder:
        shard(begin(folder / "whole"))
        whole = contents(folder / "whole")
        cfg = begin(folder / "failing")
        sound, stops = write.write_shard, 0

        def attempt(chance: random.Random, error: Exception, share: float) -> None:
            failed = set()

            def sometimes(job):
                if job.receipt not in failed and chance.random() < share:
                    failed.add(job.receipt)
                    raise error
                return sound(job)

            write.write_shard, engine.PAUSE = sometimes, 0.01  # in the child only
            shard(cfg)

        wrong = RuntimeError("a task that fails now and then")
        while finish(child(lambda: attempt(random.Random(rng.random()), wrong, 0.3))) != 0 and stops < 200:
            stops += 1
            rng.random()  # the child drew from a copy
        same = contents(folder / "failing") == whole
        cfg = begin(folder / "passing")
        passing = OSError(errno.EIO, "a disk that fails for a moment")
        once = finish(child(lambda: attempt(random.Random(0), passing, 1.0))) == 0
        same = same and once and contents(folder / "passing") == whole
    return stops + 1, (stops + 1) * same


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """A folder for one campaign."""
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sharded(folder: Path) -> Config:
    """A world in `folder` with its examples, for precompute to begin with."""
    cfg = settings(folder)
    shard(cfg)
    return cfg


def damaged(damage: Callable[[Config], dict[str, tuple[int, int]]]) -> dict[str, tuple[int, int]]:
    """What `damage` does to sound examples and maps."""
    with workspace() as folder:
        cfg = sharded(folder)
        assert finish(child(lambda: precompute(cfg))) == 0  # torch must not be at work here before a fork
        assert not noticed(cfg), "sound caches are refused"
        return damage(cfg)


def campaigns(kill_count: int, flip_count: int, seed: int) -> dict[str, Callable[[], dict[str, tuple[int, int]]]]:
    """By name what each does; it returns (done, as it should be) by what is counted."""

    def rng(name: str) -> random.Random:
        return random.Random(f"{seed} {name}")

    def one(name: str, run: Callable[..., tuple[int, int]], *args) -> Callable[[], dict[str, tuple[int, int]]]:
        return lambda: {name: run(*args)}

    def bits(cfg: Config) -> dict[str, tuple[int, int]]:
        found = flips(cfg, flip_count, rng("flips"))
        total = tuple(map(sum, zip(*found.values(), strict=True)))
        return {**{f"flips in {kind}": result for kind, result in found.items()}, "flips": total}

    return {
        "shard kills": one("shard kills", kills, shard, settings, kill_count, rng("shard kills")),
        "precompute kills": one("precompute kills", kills, precompute, sharded, kill_count, rng("precompute kills")),
        "flips": lambda: damaged(bits),
        "truncated": lambda: damaged(lambda cfg: {"truncated": truncations(cfg)}),
        "deleted": lambda: damaged(lambda cfg: {"deleted": deletions(cfg)}),
        "repaired": lambda: damaged(lambda cfg: {"repaired": repairs(cfg, rng("repaired"))}),
        "shard on a full disk": one("shard on a full disk", full_disk, shard, settings),
        "precompute on a full disk": one("precompute on a full disk", full_disk, precompute, sharded),
        "two of shard": one("two of shard", two_processes, shard, settings),
        "two of precompute": one("two of precompute", two_processes, precompute, sharded),
        "failing tasks": one("failing tasks", failing_tasks, settings, rng("failing tasks")),
        "dying workers": one("dying workers", dying_workers, settings),
    }


def word(name: str) -> str:
    """What the second number of a line counts."""
    return "detected" if name.startswith(("flips", "truncated", "deleted")) else "identical"


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
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some campaigns only")
    parser.add_argument("--json", type=Path, help="where to write the result; with --only it is added to what is there")
    given = parser.parse_args()
    import_teacher()
    every = campaigns(given.kills, given.flips, given.seed)
    if unknown := sorted(set(given.only or ()) - every.keys()):
        parser.error(f"there is no campaign '{unknown[0]}': choose from {', '.join(every)}")
    found: dict[str, tuple[int, int]] = {}
    for name in given.only or every:
        with quiet():
            results = every[name]()
        for what, (done, right) in results.items():
            print(f"{what} {done} {word(what)} {right}", flush=True)
        found |= results
    if {"shard kills", "precompute kills"} <= found.keys():
        done, right = (sum(pair) for pair in zip(found["shard kills"], found["precompute kills"], strict=True))
        print(f"kills {done} identical {right}")
    result = {name: f"{right}/{done}" for name, (done, right) in found.items()}
    if given.json:
        before = json.loads(given.json.read_text()) if given.only and given.json.exists() else {}
        result = {name: before.get(name) for name in before if name not in ("ok", *result)} | result
    result["ok"] = all(len(set(text.split("/"))) == 1 for text in result.values())
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"RESULT {json.dumps(result)}")
    return 0 if all(done == right for done, right in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
