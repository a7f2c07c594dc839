"""The precompute stage: maps for the words of every example, one Dask task and one Zarr group per tar."""

import math
import shutil
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pipeline import engine, receipts
from pipeline.engine import EngineConfig
from pipeline.errors import UserError, room_in
from pipeline.layout import Layout
from pipeline.progress import Progress
from pipeline.teacher import status
from pipeline.teacher.config import TeacherConfig
from pipeline.teacher.weights import digest, locate

if TYPE_CHECKING:
    from pipeline.config import Config
    from pipeline.teacher.extract import Teacher
    from pipeline.teacher.job import Job


@dataclass(frozen=True)
class StageResult:
    """What a run of the stage did: counts over all splits, shards written and shards that were already there."""

    counts: dict[str, Any]
    written: int
    reused: int


def precompute(cfg: "Config") -> StageResult:
    """Writes `shards/<data>/maps/<teacher>/<split>/` for every split of `teacher.splits`: Zarr groups, receipts and the
    manifest that closes a split. Only shards without a valid receipt are computed.

    Raises:
        UserError: examples or weights are missing, the folder is held by another process, the maps were made with
            other settings, a map is not finite, more than `data.max_failed` of the examples failed, or the disk is
            full.
    """
    with room_in(cfg.shards_dir):
        return _precompute(cfg)


def _precompute(cfg: "Config") -> StageResult:
    began = time.monotonic()
    if status.up_to_date(cfg):
        counts = _add_up([receipts.load(status.manifest(cfg, split)).counts for split in cfg.teacher.splits])
        print(f"precompute: up to date ({_summary(counts)})")
        return StageResult(counts, 0, counts["shards"])
    with receipts.hold(Layout(cfg).maps_dir):
        jobs = _plan(cfg)
        missing = [
            job
            for job in jobs
            if not receipts.is_current(job.receipt, job.settings, job.inputs, overwrite=cfg.overwrite)
        ]
        _preflight(cfg, jobs, missing)
        if cfg.dry_run or cfg.engine.kind != "threads":
            _forget()
        if cfg.dry_run:
            return StageResult({}, 0, len(jobs) - len(missing))
        _compute(cfg, jobs, missing)
        counts = _close(cfg, jobs)
    print(f"precompute: {_summary(counts)} in {counts['shards']} shards, {time.monotonic() - began:.1f} s")
    return StageResult(counts, len(missing), len(jobs) - len(missing))


def _plan(cfg: "Config") -> list["Job"]:
    from pipeline.archive.read import Archive
    from pipeline.teacher.job import Job
    from pipeline.teacher.load import device_of, require_device

    # What a SLURM job finds is not what this machine has.
    elsewhere = cfg.engine.kind == "slurm" and cfg.teacher.device == "auto"
    device = ("cuda" if cfg.engine.gpus else "cpu") if elsewhere else device_of(cfg.teacher)
    if cfg.engine.kind in ("threads", "processes"):
        require_device(device)
    settings = status.settings(cfg.teacher, device)
    jobs = []
    for split in cfg.teacher.splits:
        status.inputs(cfg, split)  # says what to do if the examples are missing
        archive = Archive(Layout(cfg).examples_dir(split))
        folder = Layout(cfg).maps_split_dir(split)
        for number, tar in enumerate(archive.shards):
            inputs = {"examples": receipts.load(tar.with_suffix(".json")).digest}
            own = {**settings, "split": split}
            jobs.append(Job(archive, number, folder, cfg.teacher, device, own, inputs, cfg.data.max_pixels))
    return jobs


def _preflight(cfg: "Config", jobs: list["Job"], missing: list["Job"]) -> None:
    """Says what will be done: model, revision, precision, forwards, and about how much time and disk it takes, judged
    by the first examples and one batch."""
    import torch

    from pipeline.mapstore.schema import SIDE
    from pipeline.teacher.job import teacher_of
    from pipeline.teacher.windows import teacher_texts

    if not missing:
        return
    cfg_teacher, first = cfg.teacher, missing[0]
    workers = min(_engine(cfg.engine, first.device).worker_count, len(missing))
    examples = sum(job.archive.sizes[job.number] for job in missing)
    shard = first.archive.shard(first.number)
    looked = [shard[row] for row in range(min(len(shard), 100))]
    scale = examples / max(len(looked), 1)
    words = round(sum(len(example.words()) for example in looked) * scale)
    texts = [
        text
        for example in looked
        if example.image
        for text in teacher_texts(example, cfg_teacher.text, cfg_teacher.phrases)
    ]
    here = first.device == "cpu" or torch.cuda.is_available()
    teacher = teacher_of(first) if here else None
    # Without the model its tokens are not known: a window for each text, a map for each word.
    sizes = [teacher.sizes(text) if teacher else (1, len(text.spans)) for text in texts]
    windows, maps = (round(sum(size[i] for size in sizes) * scale) for i in (0, 1))
    megabytes = max(words, maps) * SIDE * SIDE / (2e6 if cfg_teacher.profile == "compact" else 1e6)
    print(
        f"precompute: {len(missing)} of {len(jobs)} shards to do, {examples} examples, about {words} words, "
        f"{maps} maps; {cfg_teacher.path}{_revision(cfg_teacher)}, {cfg_teacher.dtype} on {first.device}, "
        f"{cfg_teacher.forwards} forward{'s' if cfg_teacher.forwards > 1 else ''} per window of text, "
        f"at {'most' if teacher else 'least'} {max(megabytes, 1):.0f} MB",
        flush=True,
    )
    batches = math.ceil(windows / cfg_teacher.batch_size)
    share = f"about {windows} windows in {_many(batches, 'batch', 'batches')} on {_many(workers, 'worker', 'workers')}"
    print(f"precompute: {_expected(first, teacher, share, batches / max(workers, 1))}", flush=True)
    if cfg.dry_run and cfg.engine.kind == "slurm":
        print(f"precompute: every worker is submitted as\n{engine.slurm_script(cfg.engine)}")


def _many(count: int, one: str, more: str) -> str:
    return f"{count} {one if count == 1 else more}"


def _revision(cfg: TeacherConfig) -> str:
    """The commit of a model from the hub, else the digest of the weights."""
    where = locate(cfg)
    if where.parent.name == "snapshots":
        return f" revision {where.name[:12]}"
    return f" (weights {digest(where)[:12]})"


def _expected(job: "Job", teacher: "Teacher | None", share: str, batches: float) -> str:
    """About how long it takes, from one batch on this machine: two on a GPU, where the first one does not count.

    Args:
        teacher: the model on this machine, if it can run here.
        share: what there is to do, in words.
        batches: of one worker.
    """
    import torch

    from pipeline.teacher.job import out_of_memory

    if teacher is None:
        return f"{share}, more where texts are long; this machine has no GPU to tell the time by"
    threads = torch.get_num_threads()
    torch.set_num_threads(job.teacher.threads)
    try:
        seconds = teacher.seconds_per_batch()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return f"{share}; a batch of {job.teacher.batch_size} does not fit the memory, smaller ones will be tried"
    finally:
        torch.set_num_threads(threads)
    return f"{share}, {_duration(seconds * batches)}"


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds > 5400 else f"{max(seconds / 60, 0.1):.1f} minutes"


def _compute(cfg: "Config", jobs: list["Job"], missing: list["Job"]) -> None:
    if not missing:
        return
    import torch

    from pipeline.teacher.job import compute_shard

    for folder in {job.folder for job in missing}:
        folder.mkdir(parents=True, exist_ok=True)
        receipts.remove_leftovers(folder)
        (folder / status.MANIFEST).unlink(missing_ok=True)
    size = {id(job): job.archive.sizes[job.number] for job in jobs}
    total, left = sum(size.values()), sum(size[id(job)] for job in missing)
    threads = torch.get_num_threads()
    shared = cfg.engine.kind == "threads"
    try:
        with Progress("precompute", total, "examples", done=total - left) as progress:
            tasks = [replace(job, tick=progress.advance if shared else None) for job in missing]
            done = None if shared else lambda receipt: progress.advance(receipt.counts["examples"])
            engine.run(_engine(cfg.engine, jobs[0].device), compute_shard, tasks, done)
    finally:
        torch.set_num_threads(threads)
        _forget()


def _forget() -> None:
    """Lets go of the models of this process."""
    from pipeline.teacher.job import teachers

    teachers.clear()


def _engine(cfg: EngineConfig, device: str) -> EngineConfig:
    """The engine with no more workers than there are GPUs, where GPUs do the work: threads share the first one."""
    if device != "cuda" or cfg.kind in ("scheduler", "slurm"):
        return cfg
    import torch

    most = 1 if cfg.kind == "threads" else torch.cuda.device_count()
    return replace(cfg, workers=min(cfg.worker_count, most))


def _close(cfg: "Config", jobs: list["Job"]) -> dict[str, Any]:
    """Removes shards of an earlier plan, checks how many examples failed, and writes the manifests."""
    found = []
    for split in cfg.teacher.splits:
        group = [job for job in jobs if job.settings["split"] == split]
        stems = {job.stem for job in group}
        folder = Layout(cfg).maps_split_dir(split)
        gone = [path for path in folder.glob("[0-9]*.json") if path.stem not in stems]
        gone += [path for path in folder.glob("[0-9]*.zarr") if path.stem not in stems]  # after what vouches for them
        for path in gone:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        counts = _add_up([receipts.load(job.receipt).counts for job in group])
        if counts["failed"] > cfg.data.max_failed * counts["examples"]:
            raise UserError(
                f"{counts['failed']} of {counts['examples']} images of split {split} failed, more than "
                f"data.max_failed={cfg.data.max_failed:g} ({counts['first_failure']}): run the shard stage with "
                "data.check_images=true, or raise data.max_failed"
            )
        receipts.write(
            folder / status.MANIFEST,
            stage="precompute",
            settings=group[0].settings,
            inputs=status.inputs(cfg, split),
            counts=counts,
            children=[job.receipt for job in group],
        )
        found.append(counts)
    return _add_up(found)


def _add_up(parts: list[dict[str, Any]]) -> dict[str, Any]:
    names = ("examples", "failed", "without_words", "words")
    by_status: Counter[str] = Counter()
    for part in parts:
        by_status.update(part["status"])
    return {
        **{name: sum(part[name] for part in parts) for name in names},
        "status": dict(sorted(by_status.items())),
        "first_failure": next((part["first_failure"] for part in parts if part["first_failure"]), ""),
        "batch_size": min((part["batch_size"] for part in parts), default=0),
        "shards": sum(part.get("shards", 1) for part in parts),
    }


def _summary(counts: dict[str, Any]) -> str:
    """How many came in, how many went out, and why the rest did not."""
    ok = counts["status"].get("ok", 0)
    rest = [f"{count} {name}" for name, count in counts["status"].items() if name != "ok"]
    text = f"{counts['examples']} examples, {counts['words']} words, {ok} maps"
    if rest:
        text += f" ({', '.join(rest)})"
    if counts["without_words"]:
        text += f", {counts['without_words']} examples without an image or words"
    return text
