"""The shard stage: every input of a source into tars, one Dask task per tar; nothing is lost, nothing is done twice."""

import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import receipts
from pipeline.archive import status
from pipeline.archive.duplicates import images, refuse_evaluation, repeated
from pipeline.errors import UserError, room_in
from pipeline.layout import Layout
from pipeline.sources import open_source

if TYPE_CHECKING:
    from pipeline.archive.write import Job
    from pipeline.config import Config
    from pipeline.sources.base import Source


SUMS = ("inputs", "examples", "failed", "image_bytes", "chars")


@dataclass(frozen=True)
class StageResult:
    """What a run of the stage did: counts over all splits, shards written and shards that were already there."""

    counts: dict[str, Any]
    written: int
    reused: int


def shard(cfg: "Config") -> StageResult:
    """Writes `shards/<data>/examples/<split>/`: tars, tables, receipts and the manifests that close the stage.

    Only shards without a valid receipt are written, so a killed run goes on where it stopped.

    Raises:
        UserError: the source is missing or empty, the folder is held by another process, the cache was made with
            other settings, or more than `data.max_failed` of the inputs failed.
    """
    with room_in(cfg.shards_dir):
        return _shard(cfg, Layout(cfg))


def _shard(cfg: "Config", layout: Layout) -> StageResult:
    if status.up_to_date(cfg):
        done = receipts.load(status.manifest(cfg))
        print(f"shard: up to date ({_summary(done.counts)})")
        return StageResult(done.counts, 0, done.counts["shards"])
    began = time.monotonic()
    source = open_source(cfg.data, layout)  # first, so that data that is not there leaves no folders behind
    with receipts.hold(layout.examples_dir()):
        jobs = _plan(cfg, layout, source)
        for line in source.report():
            print(f"shard: {line}", flush=True)
        missing = [job for job in (_to_do(job, cfg) for job in jobs) if job]
        if cfg.dry_run:
            inputs = sum(job.stop - job.start for job in missing)
            print(f"shard: would write {len(missing)} of {len(jobs)} shards ({inputs} inputs)")
            return StageResult({}, 0, len(jobs) - len(missing))
        _write(cfg, jobs, missing)
        counts = _close(cfg, jobs, time.monotonic() - began)
    print(f"shard: {_summary(counts)} in {counts['shards']} shards, {time.monotonic() - began:.1f} s")
    return StageResult(counts, len(missing), len(jobs) - len(missing))


def _plan(cfg: "Config", layout: Layout, source: "Source") -> list["Job"]:
    from pipeline.archive.write import Job, Rules

    identity = status.inputs(source, layout)
    rules = Rules(**status.settings(cfg))
    jobs = []
    for split in source.splits():
        count = source.count(split)
        if not count:
            raise UserError(f"data '{cfg.data.name}': split {split} is empty: check data.path and data.splits")
        count = min(count, cfg.data.limit or count)
        for number, start in enumerate(range(0, count, rules.shard_size)):
            stop = min(start + rules.shard_size, count)
            folder = layout.examples_dir(split)
            jobs.append(Job(source, split, number, start, stop, folder, rules, identity))
    return jobs


def _to_do(job: "Job", cfg: "Config") -> "Job | None":
    """The job if it has to run, as it has to run."""
    if not receipts.is_current(job.receipt, job.settings, job.inputs, overwrite=cfg.overwrite):
        return job
    if cfg.data.retry_failed and receipts.load(job.receipt).counts["failed"]:
        return replace(job, again=True)
    return None


def _write(cfg: "Config", jobs: list["Job"], missing: list["Job"]) -> None:
    if not missing:
        return
    from pipeline import engine
    from pipeline.archive.write import write_shard
    from pipeline.progress import Progress

    for folder in {job.folder for job in missing}:
        folder.mkdir(parents=True, exist_ok=True)
        receipts.remove_leftovers(folder)
        (folder / status.MANIFEST).unlink(missing_ok=True)
    status.manifest(cfg).unlink(missing_ok=True)
    total = sum(job.stop - job.start for job in jobs)
    left = sum(job.stop - job.start for job in missing)
    with Progress("shard", total, "inputs", done=total - left) as progress:
        engine.run(cfg.engine, write_shard, missing, lambda receipt: progress.advance(receipt.counts["inputs"]))


def _close(cfg: "Config", jobs: list["Job"], seconds: float) -> dict[str, Any]:
    """Checks how many inputs failed, removes shards of an earlier plan and writes the manifests."""
    folders: dict[str, list[Job]] = {}
    for job in jobs:
        folders.setdefault(job.split, []).append(job)
    counts = {split: _add_up([receipts.load(job.receipt).counts for job in group]) for split, group in folders.items()}
    total = _add_up(list(counts.values()))
    _refuse_failures(cfg, total)
    found = {split: images([job.receipt for job in group]) for split, group in folders.items()}
    refuse_evaluation(cfg.data.evaluation, found)
    total["repeated"] = repeated(found)
    manifests = []
    for split, group in folders.items():
        folder = group[0].folder
        _remove_others(folder, {job.stem for job in group})
        manifests.append(folder / status.MANIFEST)
        receipts.write(
            manifests[-1],
            stage="shard",
            settings={**status.settings(cfg), "split": split},
            inputs=group[0].inputs,
            counts=counts[split],
            children=[job.receipt for job in group],
        )
    receipts.write(
        status.manifest(cfg),
        stage="shard",
        settings=status.settings(cfg),
        inputs=jobs[0].inputs,
        counts={
            **total,
            "splits": {split: found["examples"] for split, found in counts.items()},
            "evaluation": list(cfg.data.evaluation),
        },
        seconds=seconds,
        children=manifests,
    )
    return total


def _add_up(parts: list[dict[str, Any]]) -> dict[str, Any]:
    total = {name: sum(part.get(name, 0) for part in parts) for name in SUMS}
    by_status: Counter[str] = Counter()
    for part in parts:
        by_status.update(part["status"])
    first = next((part["first_failure"] for part in parts if part["first_failure"]), "")
    shards = sum(part.get("shards", 1) for part in parts)
    return {**total, "status": dict(sorted(by_status.items())), "first_failure": first, "shards": shards}


def _refuse_failures(cfg: "Config", total: dict[str, Any]) -> None:
    if total["failed"] > cfg.data.max_failed * total["inputs"]:
        raise UserError(
            f"{total['failed']} of {total['inputs']} inputs failed, more than data.max_failed={cfg.data.max_failed:g}"
            f" ({total['first_failure']}): the parquet tables in {Layout(cfg).examples_dir()} name each;"
            f" repair them and give data.retry_failed=true, or raise data.max_failed"
        )


def _remove_others(folder: Path, stems: set[str]) -> None:
    """Shards beyond the plan are left from other settings; a reader of the plain tars must not meet them."""
    for path in folder.glob("[0-9]*.*"):
        if path.stem not in stems:
            path.unlink()


def _summary(counts: dict[str, Any]) -> str:
    """How many came in, how many went out, and why the rest did not."""
    rest = {name: count for name, count in counts["status"].items() if name != "ok"}
    why = ", ".join(f"{count} {name}" for name, count in rest.items())
    first = f"; first: {counts['first_failure']}" if counts["first_failure"] else ""
    text = f"{counts['inputs']} inputs, {counts['examples']} examples{f' ({why}{first})' if why else ''}"
    repeated = counts.get("repeated", {"images": 0, "ids": 0, "trained": 0})
    again = {
        "repeated images": repeated["images"],
        "repeated ids": repeated["ids"],
        "images both trained on and held out": repeated["trained"],
    }
    return "; ".join([text, *(f"{count} {what}" for what, count in again.items() if count)])
