"""The train stage: one arm with one seed, from a loaded student to an exported one."""

from __future__ import annotations

import io
import math
import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import receipts
from pipeline.errors import UserError
from pipeline.layout import Layout
from pipeline.student.weights import model_path
from pipeline.train import status

if TYPE_CHECKING:
    import numpy as np
    from accelerate import Accelerator
    from PIL import Image
    from torch import nn

    from pipeline.archive import Archive
    from pipeline.config import Config
    from pipeline.mapstore.quality import QualityFilter
    from pipeline.student.family import Family
    from pipeline.train.heldout import HeldOut
    from pipeline.train.metrics import Metrics
    from pipeline.train.targets import Targets

# Examples that the student cannot take, one JSON line each with the reason.
SKIPPED, SKIPPED_HELD_OUT = "skipped.jsonl", "skipped-held-out.jsonl"


def train(cfg: Config) -> None:
    """Trains ``cfg.arm`` with ``cfg.seed`` and writes its run directory, going on from the newest whole checkpoint.

    Raises:
        UserError: missing or damaged inputs, settings that do not fit, or a run of other settings in the directory.
    """
    run = status.run_dir(cfg)
    label = f"train {cfg.arm.name}-{cfg.seed}"
    if status.up_to_date(cfg):
        if is_main():
            print(f"{label}: up to date ({run})")
        return
    from pipeline.archive import Archive
    from pipeline.train.heldout import left_out
    from pipeline.train.order import check_weights

    check_weights(cfg)
    archive = Archive(Layout(cfg).examples_dir(cfg.train.split))
    kept = left_out(cfg, archive)
    examples = len(archive) - len(kept)
    # How many batches by length there are is not known before the student is.
    steps = cfg.train.steps or math.ceil(cfg.train.epochs * examples / cfg.train.batch_size)
    about = "at least " if cfg.train.by_length and not cfg.train.steps else ""
    say, more = print if is_main() else lambda *_, **__: None, f" ({len(kept)} more held out)" if kept else ""
    say(
        f"{label}: {examples} examples{more}, {about}{steps} steps of {cfg.train.batch_size}, {cfg.train.method}, "
        f"lambda {cfg.arm.lam:g}" + (f" towards {cfg.arm.targets}" if cfg.arm.lam else ""),
        flush=True,
    )
    if cfg.dry_run:
        return
    with receipts.hold(run) if is_main() else nullcontext():
        if is_main() and cfg.overwrite and (run / status.RECEIPT).is_file():
            (run / status.RECEIPT).unlink()
        _train(cfg, run, archive, kept, label)


def _train(cfg: Config, run: Path, archive: Archive, left_out: list[int], label: str) -> None:
    import torch

    from pipeline.align.loss import AlignmentLoss
    from pipeline.progress import Progress
    from pipeline.student.capture import AttentionTap
    from pipeline.student.load import load_student
    from pipeline.train import card, guards, parallel, trackers
    from pipeline.train.checkpoint import Checkpoints
    from pipeline.train.data import Batches
    from pipeline.train.export import export
    from pipeline.train.loop import train_loop
    from pipeline.train.metrics import FILE, Metrics, read
    from pipeline.train.metrics import heldout as held_out_lines
    from pipeline.train.order import count_steps, train_plan
    from pipeline.train.preempt import Preemption
    from pipeline.train.targets import open_targets
    from pipeline.train.trainable import groups, quantization, trainable
    from pipeline.train.tuned import Tuned

    started = time.monotonic()
    torch.manual_seed(cfg.seed)
    accelerator = parallel.accelerator(cfg.train, run)
    student = load_student(cfg.model, cfg.align, quantization(cfg.train.quantize, cfg.train.method))
    model = trainable(student.model, cfg.train)
    tap = AttentionTap(model, student.family)
    # Drawn from the seed alone, so that the Aligner starts alike in every arm, whatever was drawn before it.
    torch.manual_seed(cfg.seed)
    tuned = Tuned(model, AlignmentLoss.for_tap(tap, cfg.align), tap, cfg.train.logits_mb << 20)
    optimizer = torch.optim.AdamW(
        groups(tuned.named_parameters(), cfg.train),
        betas=tuple(cfg.train.betas),
        weight_decay=cfg.train.weight_decay,
        fused=True,
    )
    plan = train_plan(cfg, archive, left_out, _lengths(cfg, run, archive, student.family, accelerator))
    steps = count_steps(cfg, plan)
    settings = status.settings(cfg) | {"inputs": status.inputs(cfg), "steps": steps}
    for late in ("export", "choose", "evaluate_every", "checkpoint_every"):  # decide nothing before the end
        settings["train"].pop(late, None)
    settings["inputs"].pop("held_out", None)
    wrapped, optimizer = parallel.prepare(accelerator, tuned, optimizer, cfg.train)
    checkpoints = Checkpoints(run, settings, cfg.train.keep_checkpoints, tuned, optimizer)
    position = checkpoints.restore(overwrite=cfg.overwrite)
    start = position.step
    if accelerator.is_main_process:
        for reason in position.damaged:
            print(f"{label}: passed over a damaged checkpoint: {reason}", flush=True)
        if position.path:
            with_others = f", equal up to rounding with other {', '.join(position.changed)}" if position.changed else ""
            print(f"{label}: going on from step {start}{with_others}", flush=True)

    aligned = cfg.arm.lam > 0
    targets = open_targets(cfg.arm.targets, archive, _maps(cfg), cfg.seed, quality(cfg)) if aligned else None
    if accelerator.is_main_process:
        (run / SKIPPED_HELD_OUT).unlink(missing_ok=True)
        _keep_refused(run / SKIPPED, anew=start == 0)
    accelerator.wait_for_everyone()
    batches = Batches(
        archive,
        plan,
        student.family,
        targets,
        micro_batch=cfg.train.micro_batch,
        rank=accelerator.process_index,
        ranks=accelerator.num_processes,
        skipped_file=run / SKIPPED,
        max_failed=cfg.data.max_failed,
    )

    trackers.start(accelerator, cfg, label, start)

    def show(line: dict) -> None:
        accelerator.log(trackers.flat(line), step=line["step"])

    main = accelerator.is_main_process
    shown = Metrics(run, start, show) if main else None
    heldout = _held_out(cfg, run, accelerator, student.family, archive, left_out, start, shown, label)
    quiet = None if accelerator.is_main_process else io.StringIO()
    bar = Progress(label, total=steps, unit="steps", done=start, stream=quiet)
    with bar as progress, Preemption() as preemption, guards.memory(cfg.train, cfg.model, student.family):
        done = train_loop(
            accelerator,
            wrapped,
            optimizer,
            batches,
            cfg.train,
            cfg.align,
            cfg.arm.lam,
            cfg.seed,
            steps,
            start,
            shown,
            progress,
            checkpoints.save,
            trackers=position.trackers,
            asked=lambda: preemption.asked,
            heldout=heldout,
        )
        checkpoints.wait()
        if done == steps and cfg.train.choose == "best":
            chosen = checkpoints.restore_best()
            if main:
                for reason in chosen.damaged:
                    print(f"{label}: passed over a damaged checkpoint that has a lower loss: {reason}", flush=True)
                print(f"{label}: step {chosen.step} has the lowest loss on the held-out examples", flush=True)
        checkpoints.close()
    for tracker in accelerator.trackers:  # not accelerator.end_training, which would end the processes' group as well
        tracker.finish()
    if done < steps:
        if accelerator.is_main_process:
            asked = done == start + cfg.train.max_steps_per_call  # else any process got the signal
            why = "as asked" if asked else "the process was told to end (SIGTERM)"
            print(f"{label}: stopped at step {done} of {steps}, {why}; run again to go on", flush=True)
        return
    tap.close()
    compared = batches.at(0).batches[0]
    accelerator.wait_for_everyone()  # from here on no process refuses an example, and the file of these is whole
    exported = export(
        run,
        tuned,
        student.processor,
        _base(cfg),
        getattr(torch, cfg.model.dtype),
        cfg.train.export == "merged",
        compared,
        lambda path: _reload(cfg, path),
        accelerator.is_main_process,
    )
    maps = _map_counts(targets, accelerator)
    if not accelerator.is_main_process:
        return
    skipped = len(_keep_refused(run / SKIPPED))
    files, examples = exported.files, plan.order.total
    card.write(files[0], cfg, examples, steps, read(run), held_out_lines(run), exported.difference)
    receipts.write(
        run / status.RECEIPT,
        stage="train",
        settings=status.settings(cfg),
        inputs=status.inputs(cfg),
        files=[*files, run / FILE],
        counts={"examples": examples, "steps": steps, "skipped": skipped}
        | maps
        | ({"held_out": len(left_out)} if left_out else {})
        | ({"chosen": chosen.step} if cfg.train.choose == "best" else {})
        | {"reloaded_difference": exported.difference, "tolerance": exported.tolerance},
        seconds=time.monotonic() - started,
    )
    print(
        f"{label}: {examples} examples, {skipped} skipped, {_said(maps)}{steps} steps -> {files[0]}",
        flush=True,
    )


def _held_out(
    cfg: Config,
    run: Path,
    accelerator: Accelerator,
    family: Family,
    archive: Archive,
    left_out: list[int],
    start: int,
    shown: Metrics | None,
    label: str,
) -> HeldOut | None:
    """What evaluates the held-out examples at its steps; None where none is asked for, or there are none."""
    from pipeline.archive import Archive
    from pipeline.train import trackers
    from pipeline.train.data import Batches
    from pipeline.train.heldout import Fixed, HeldOut, drawn
    from pipeline.train.overlays import Overlays

    train, main, numbers = cfg.train, accelerator.is_main_process, left_out
    if not train.evaluate_every:
        return None
    if train.held_out_split:
        archive = Archive(Layout(cfg).examples_dir(train.held_out_split))
        numbers = drawn(archive, train.held_out)
    if not numbers:
        why = f"no example is evaluated: {len(archive)} are too few to hold any out"
        if train.choose == "best":
            raise UserError(f"train.choose=best: {why}; name another split (train.held_out_split)")
        if main:
            print(f"{label}: {why}", flush=True)
        return None
    targets, why = _held_out_targets(cfg, archive)
    if why and main:
        print(f"{label}: {why}", flush=True)
    batches = Batches(
        archive,
        Fixed(numbers, train.micro_batch * accelerator.num_processes),
        family,
        targets,
        micro_batch=train.micro_batch,
        rank=accelerator.process_index,
        ranks=accelerator.num_processes,
        skipped_file=run / SKIPPED_HELD_OUT,
        max_failed=cfg.data.max_failed,
        cache_bytes=128 << 20,
    )

    def picture(image: Image.Image, step: int) -> None:
        trackers.show_picture(accelerator, "heldout/overlays", image, step)

    device = accelerator.device
    pictures = Overlays(batches, train.overlays, run, start, device, main, picture) if train.overlays else None
    add = shown.add if shown else lambda line: None
    return HeldOut(accelerator, batches, train.evaluate_every, cfg.arm.lam, pictures, add, train.workers)


def _held_out_targets(cfg: Config, archive: Archive) -> tuple[Targets, str]:
    """The arm's targets for held-out examples, for plain fine-tuning the teacher's; and why there are none."""
    from pipeline.mapstore import MapStore
    from pipeline.train.targets import open_targets, unknown

    kind = cfg.arm.targets if cfg.arm.lam > 0 else "teacher"
    split = cfg.train.held_out_split or cfg.train.split
    if kind not in ("teacher", "shuffled"):
        return open_targets(kind, archive, None, cfg.seed), ""
    folder = Layout(cfg).maps_split_dir(split)
    if not (folder / "manifest.json").is_file():
        return unknown(), (
            f"held-out examples are evaluated without maps, for {folder} has none "
            f"(teacher.splits=[{','.join([*cfg.teacher.splits, split])}] at precompute makes them)"
        )
    return open_targets(kind, archive, MapStore(folder), cfg.seed, quality(cfg)), ""


def _keep_refused(file: Path, anew: bool = False) -> dict[str, str]:
    """Key and reason of what was refused so far, by all processes and before a resumed run; each once in the file."""
    from pipeline.train.data import line, refused

    found = {} if anew else refused(file)
    if found:
        receipts.write_file(file, "".join(line(*row) for row in found.items()).encode())
    else:
        file.unlink(missing_ok=True)
    return found


def is_main() -> bool:
    """Whether this is the process of several that prints and writes (torchrun counts them from 0)."""
    return int(os.environ.get("RANK", "0")) == 0


def _maps(cfg: Config):
    if not status.uses_maps(cfg):
        return None
    from pipeline.mapstore import MapStore

    # Each shard is decoded once while it is in the window; the other images' maps of `shuffled` come from anywhere.
    cache = cfg.train.window_mb << 20 if cfg.arm.targets == "teacher" else 0
    return MapStore(Layout(cfg).maps_split_dir(cfg.train.split), cache_bytes=cache)


def quality(cfg: Config) -> QualityFilter:
    """Which of the teacher's maps are aligned to."""
    from pipeline.mapstore.quality import QualityFilter

    return QualityFilter(cfg.train.quality.min_peak, cfg.train.quality.max_entropy)


def _lengths(cfg: Config, run: Path, archive: Archive, family: Family, accelerator: Accelerator) -> np.ndarray | None:
    """Tokens of every example, if they decide what is trained on together; measured once a run."""
    if not cfg.train.by_length:
        return None
    import numpy as np

    from pipeline.train.order import measure_lengths

    file = run / "lengths.npy"
    if accelerator.is_main_process:
        inputs = {name: digest for name, digest in status.inputs(cfg).items() if name in ("examples", "student")}
        measure_lengths(archive, family, file, {"max_length": cfg.model.max_length}, inputs)
    accelerator.wait_for_everyone()
    return np.load(file)


def _map_counts(targets: Targets | None, accelerator: Accelerator) -> dict[str, int]:
    """What all processes read of the maps; an example that was read again in another epoch counts again."""
    import torch

    if targets is None or targets.counts is None:
        return {}
    counts = targets.counts
    own = [counts.examples, counts.without_maps, counts.words, counts.unusable]
    found = accelerator.reduce(torch.tensor(own, device=accelerator.device), "sum").tolist()
    return dict(zip(("maps_read", "without_maps", "words_read", "words_unusable"), found, strict=True))


def _said(maps: dict[str, int]) -> str:
    """The counts of maps in words, where they say anything."""
    text = f"{maps['without_maps']} without maps, " if maps.get("without_maps") else ""
    if maps.get("words_unusable"):
        share = maps["words_unusable"] / maps["words_read"]
        text += f"{share:.1%} of {maps['words_read']} words without a usable map, "
    return text


def _base(cfg: Config) -> str:
    """Where an adapter finds its base: a hub id, or an absolute directory."""
    path = Path(model_path(cfg.model.path)).expanduser()
    return str(path.resolve()) if path.is_dir() else cfg.model.path


def _reload(cfg: Config, path: Path) -> nn.Module:
    """The exported student as a user would load it: a whole model, or the base with an adapter."""
    from dataclasses import replace

    from pipeline.student.load import load_student
    from pipeline.train.trainable import quantization

    if not (path / "adapter_config.json").is_file():
        return load_student(replace(cfg.model, path=str(path.resolve()), weights="published", size="full")).model
    from peft import PeftModel

    quantized = quantization(cfg.train.quantize, cfg.train.method)
    return PeftModel.from_pretrained(load_student(cfg.model, quantization=quantized).model, path)
