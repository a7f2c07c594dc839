"""The precompute stage: maps for the words of every example, one Dask task and one Zarr group per tar."""

import math
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
    from pipeline.teacher.load import device_of

    # What a SLURM job finds is not what this machine has.
    elsewhere = cfg.engine.kind == "slurm" and cfg.teacher.device == "auto"
    device = ("cuda" if cfg.engine.gpus else "cpu") if elsewhere else device_of(cfg.teacher)
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
    from pipeline.mapstore.schema import SIDE
    from pipeline.teacher.windows import teacher_texts

    if not missing:
        return
    teacher, workers = cfg.teacher, min(_engine(cfg.engine, missing[0].device).worker_count, len(missing))
    examples = sum(job.archive.sizes[job.number] for job in missing)
    shard = missing[0].archive.shard(missing[0].number)
    looked = [shard[row] for row in range(min(len(shard), 100))]
    words = sum(len(example.words()) for example in looked) * examples // max(len(looked), 1)
    texts = sum(len(teacher_texts(example, teacher.text)) for example in looked if example.image)
    batches = math.ceil(texts * examples / max(len(looked), 1) / teacher.batch_size)
    megabytes = words * SIDE * SIDE / (2e6 if teacher.profile == "compact" else 1e6)
    print(
        f"precompute: {len(missing)} of {len(jobs)} shards to do, {examples} examples, about {words} words; "
        f"{teacher.path}{_revision(teacher)}, {teacher.dtype} on {missing[0].device}, "
        f"{teacher.forwards} forward{'s' if teacher.forwards > 1 else ''} per window of text, "
        f"at most {megabytes:.0f} MB",
        flush=True,
    )
    print(f"precompute: {_expected(missing[0], batches, workers)}", flush=True)
    if cfg.dry_run and cfg.engine.kind == "slurm":
        print(f"precompute: every worker is submitted as\n{engine.slurm_script(cfg.engine)}")


def _revision(cfg: TeacherConfig) -> str:
    """The commit of a model from the hub, else the digest of the weights."""
    where = locate(cfg)
    if where.parent.name == "snapshots":
        return f" revision {where.name[:12]}"
    return f" (weights {digest(where)[:12]})"


def _expected(job: "Job", batches: int, workers: int) -> str:
    """About how long it takes, from one batch on this machine: two on a GPU, where the first one does not count."""
    import torch

    from pipeline.teacher.job import out_of_memory, teacher_of

    share = f"about {batches} batches on {workers} worker{'s' if workers > 1 else ''}"
    if job.device == "cuda" and not torch.cuda.is_available():
        return f"{share}; this machine has no GPU to tell the time by"
    threads = torch.get_num_threads()
    torch.set_num_threads(job.teacher.threads)
    try:
        seconds = teacher_of(job).seconds_per_batch()
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return f"{share}; a batch of {job.teacher.batch_size} does not fit the memory, smaller ones will be tried"
    finally:
        torch.set_num_threads(threads)
    return f"{share}, {_duration(seconds * batches / max(workers, 1))}"


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
        for path in folder.glob("[0-9]*.json"):
            if path.stem not in stems:
                path.unlink()
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
