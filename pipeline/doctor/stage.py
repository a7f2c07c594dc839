"""The preflight: every check of a training run in one table, and one line for what stands in its way."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.archive import Archive
    from pipeline.config import Config
    from pipeline.doctor.hardware import Hardware
    from pipeline.doctor.memory import Memory
    from pipeline.student.batch import Item, StudentBatch
    from pipeline.student.family import Family
    from pipeline.student.load import Student
    from pipeline.train.tuned import Tuned

SAMPLES = 16  # examples that are encoded
CONTEXT = 1 << 30  # bytes that CUDA, its libraries and gaps between tensors take on a GPU
SHOWN = 60  # characters of a learnt span


@dataclass
class Report:
    """The rows of the table, and the faults among them."""

    rows: list[tuple[str, str, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def ok(self, what: str, text: str) -> None:
        self.rows.append((what, "ok", text))

    def warn(self, what: str, text: str) -> None:
        self.rows.append((what, "look", text))

    def fault(self, what: str, text: str) -> None:
        self.rows.append((what, "fault", text))
        self.faults.append(text)

    def attempt(self, what: str, check: Callable):
        """What ``check`` returns; a user's mistake in it is a fault, and gives None."""
        try:
            return check()
        except UserError as error:
            self.fault(what, str(error))
            return None


def doctor(cfg: Config, gpu: str = "", gpus: int = 0) -> None:
    """Prints the table.

    Args:
        gpu, gpus: which GPU and how many the run will have; empty and 0 take this machine's.

    Raises:
        UserError: something stands in the way of the run.
    """
    from pipeline.doctor.hardware import hardware
    from pipeline.train.data import check_share
    from pipeline.train.trainable import quantization

    machine = hardware(gpu, gpus)
    report = Report()
    archive = report.attempt("examples", lambda: _examples(cfg, report))
    report.attempt("maps", lambda: _maps(cfg, report))
    report.attempt("weights", lambda: _weights(cfg, report))
    made = report.attempt("model", lambda: _model(cfg, report))
    report.attempt("run", lambda: _run(cfg, report))
    report.attempt("batch", lambda: check_share(cfg.train.batch_size, machine.count))
    if not gpu:  # the run is to be on this machine
        report.attempt("quantize", lambda: quantization(cfg.train.quantize, cfg.train.method))
    if made is not None:
        student, tuned = made
        _disk(cfg, tuned, report)
        items = _sample(cfg, student, archive, report) if archive is not None else []
        if items:
            memory = _memory(cfg, tuned, student.family, _longest(cfg, student, items), machine, report)
            _time(cfg, archive, memory, machine, report)
    _show(cfg, report)
    if report.faults:
        more = f" (and {len(report.faults) - 1} more, see the table)" if len(report.faults) > 1 else ""
        raise UserError(report.faults[0] + more)


def _examples(cfg: Config, report: Report) -> Archive:
    from pipeline.archive import Archive
    from pipeline.layout import Layout

    folder = Layout(cfg).examples_dir(cfg.train.split)
    archive = Archive(folder, hashed=False)
    if not len(archive):
        raise UserError(f"{folder} holds no examples")
    report.ok("examples", f"{len(archive)} in {len(archive.shards)} shards, all receipts valid")
    return archive


def _maps(cfg: Config, report: Report) -> None:
    from pipeline.layout import Layout
    from pipeline.mapstore import MapStore
    from pipeline.train import status

    if not status.uses_maps(cfg):
        report.ok("maps", f"the arm {cfg.arm.name} reads none")
        return
    store = MapStore(Layout(cfg).maps_split_dir(cfg.train.split))
    report.ok("maps", f"{cfg.teacher.name}: {len(store.shards)} shards, all receipts valid")


def _weights(cfg: Config, report: Report) -> None:
    """Whether the weights are here; they are not read."""
    from pipeline.student.weights import identity

    if cfg.model.weights == "random":
        report.ok("weights", f"random, {cfg.model.size}")
        return
    found = identity(cfg.model)
    if "@" not in found:
        report.ok("weights", f"{cfg.model.path} is on this machine")
    elif cfg.model.local_files_only:
        raise UserError(f"{cfg.model.path} is not on this machine: give model.local_files_only=false to download it")
    else:
        report.warn("weights", f"{cfg.model.path} is not here yet and will be downloaded")


def _model(cfg: Config, report: Report) -> tuple[Student, Tuned]:
    from pipeline.doctor.memory import build

    student, tuned = build(cfg)
    every = sum(p.numel() for p in tuned.student.parameters())
    trained = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    layers = list(student.family.layers(tuned.student))
    report.ok(
        "model",
        f"{type(student.model).__name__}, {every / 1e6:,.1f} M parameters, {trained / 1e6:,.2f} M trained "
        f"({cfg.train.method}); attention read in layers {', '.join(map(str, layers))}",
    )
    return student, tuned


def _run(cfg: Config, report: Report) -> None:
    from pipeline.train import status

    if not status.run_dir(cfg).is_dir():
        report.ok("run", f"{status.run_dir(cfg)} is new")
    elif status.up_to_date(cfg):
        report.ok("run", f"{status.run_dir(cfg)} is finished and up to date")
    else:
        report.ok("run", f"{status.run_dir(cfg)} was begun and goes on from its newest checkpoint")


def _disk(cfg: Config, tuned: Tuned, report: Report) -> None:
    """Checkpoints, the one being written, and the export."""
    from pipeline.doctor.memory import size_of

    weights, trained, optimizer = size_of(tuned)
    exported = weights if cfg.train.method == "full" else trained
    if cfg.train.method == "lora" and cfg.train.export == "merged":  # from the adapter, which is then removed
        exported += weights
    # The last ones, the one that is being written, and the best on the held-out examples.
    count = cfg.train.keep_checkpoints + 1 + bool(cfg.train.evaluate_every)
    needed = count * (trained + optimizer) + exported
    folder = Path(cfg.runs_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    text = f"{gib(needed)} for {count} checkpoints and the export, {gib(free)} free"
    if needed > free:
        report.fault("disk", f"{cfg.runs_dir} needs {text}: lower train.keep_checkpoints or give runs_dir=")
    else:
        report.ok("disk", text)


def _sample(cfg: Config, student: Student, archive: Archive, report: Report) -> list[Item]:
    """Examples spread over the archive, encoded: labels, words, start tokens and their maps."""
    from pipeline.student.batch import IGNORED, EncodeError
    from pipeline.train.stage import _maps as open_maps
    from pipeline.train.stage import quality
    from pipeline.train.targets import open_targets

    aligned = cfg.arm.lam > 0
    targets = open_targets(cfg.arm.targets, archive, open_maps(cfg), cfg.seed, quality(cfg)) if aligned else None
    items, refused, words, mapped, first = [], [], 0, 0, None
    count = min(SAMPLES, len(archive))
    for index in (n * len(archive) // count for n in range(count)):
        example = archive[index]
        try:
            item = student.family.encode_one(example)
        except EncodeError as error:
            refused.append(f"{example.key}: {error}")
            continue
        first = first or example
        items.append(item)
        if targets is not None:
            _, valid = targets(index, example, item.words)
            words, mapped = words + len(valid), mapped + int(valid.sum())
    if refused:
        say = report.fault if len(refused) > max(cfg.data.max_failed * count, 1) else report.warn
        say("sample", f"{len(refused)} of {count} examples cannot be encoded for this student; {refused[0]}")
    if not items:
        return []
    lengths = [len(item.ids) for item in items]
    report.ok(
        "sample",
        f"{len(items)} examples of {min(lengths)} to {max(lengths)} tokens (model.max_length {cfg.model.max_length})",
    )
    item, tokenizer = items[0], student.family.tokenizer
    learnt = (item.labels != IGNORED).sum()
    report.ok("labels", f"{first.key}: {int(learnt)} tokens are learnt: " + " | ".join(_learnt(item, tokenizer)))
    starts = (
        max(int((i.ids == tokenizer.bos_token_id).sum()) for i in items) if tokenizer.bos_token_id is not None else 0
    )
    if starts > 1:
        report.warn(
            "labels", f"an example holds {starts} start tokens ({tokenizer.bos_token}): does its text hold them?"
        )
    if targets is not None:
        text = f"{mapped} of {words} words of the sample have a map ({mapped / len(items):.1f} an example)"
        (report.ok if mapped else report.fault)("words", text if mapped else f"{text}: nothing would be aligned")
    return items


def _learnt(item: Item, tokenizer) -> list[str]:
    """The runs of learnt tokens, decoded."""
    from pipeline.student.batch import IGNORED

    ids, learnt = item.ids.tolist(), (item.labels != IGNORED).tolist()
    runs, start = [], None
    for place, on in enumerate([*learnt, False]):
        if on and start is None:
            start = place
        elif not on and start is not None:
            text = repr(tokenizer.decode(ids[start:place]))
            runs.append(text if len(text) <= SHOWN else text[: SHOWN - 3] + "...")
            start = None
    return runs


def _longest(cfg: Config, student: Student, items: list[Item]) -> StudentBatch:
    """A micro-batch of the longest examples of the sample, with made-up maps."""
    import torch

    chosen = sorted(items, key=lambda item: len(item.ids), reverse=True)[: cfg.train.micro_batch]
    chosen += chosen[:1] * (cfg.train.micro_batch - len(chosen))
    if cfg.arm.lam == 0:
        chosen = [dataclasses.replace(item, words=[], tokens=[]) for item in chosen]
    batch = student.family.collate(chosen, train=True)
    words = sum(len(item.words) for item in chosen)
    return dataclasses.replace(batch, targets=torch.rand(words, 32, 32), valid=torch.ones(words, dtype=torch.bool))


def _memory(
    cfg: Config, tuned: Tuned, family: Family, batch: StudentBatch, machine: Hardware, report: Report
) -> Memory:
    from pipeline.doctor.memory import estimate

    sharded = cfg.train.parallel == "fsdp" or (cfg.train.parallel == "auto" and machine.name != "CPU")
    accumulates = cfg.train.batch_size > cfg.train.micro_batch * machine.count
    memory = estimate(
        tuned,
        batch,
        bf16=cfg.train.precision == "bf16",
        accumulates=accumulates,
        ranks=machine.count if sharded else 1,
        offload=cfg.train.cpu_offload,
        nf4=bool(cfg.train.quantize),
    )
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        f"activations and logits of {cfg.train.micro_batch} x {batch.labels.shape[1]} tokens": memory.activations,
    }
    if memory.gathered:
        parts["whole layers"] = memory.gathered
    if cfg.train.cpu_offload and not memory.host:
        report.warn("memory", "train.cpu_offload does nothing where weights are not sharded over several GPUs")
    taken = memory.total
    if machine.name != "CPU":
        parts["CUDA itself"] = CONTEXT
        taken += CONTEXT
    text = ", ".join(f"{name} {gib(size)}" for name, size in parts.items())
    text = f"{gib(taken)} of {gib(machine.memory)} on each of {machine.count} x {machine.name}: {text}"
    if memory.host:
        text += f"; {gib(memory.host * machine.count)} in the CPU's memory"
    if cfg.train.compile:
        text += "; not counted: what train.compile adds or saves"
    if taken > machine.memory:
        from pipeline.train.guards import ways

        lower = ", ".join(ways(cfg.train, cfg.model, family))
        report.fault("memory", f"{text}: does not fit; try {lower}, or more GPUs")
    else:
        (report.ok if taken < 0.9 * machine.memory else report.warn)("memory", text)
    return memory


def _time(cfg: Config, archive: Archive, memory: Memory, machine: Hardware, report: Report) -> None:
    from pipeline.train.heldout import left_out

    examples = len(archive) - len(left_out(cfg, archive))
    steps = cfg.train.steps or math.ceil(cfg.train.epochs * examples / cfg.train.batch_size)
    micro = math.ceil(cfg.train.batch_size / (cfg.train.micro_batch * machine.count))
    step = micro * memory.flops / machine.speed
    report.ok(
        "time",
        f"about {_duration(steps * step)} for {steps} steps of {step:.3g} s, if the longest examples of the sample are "
        f"typical and each {machine.name} does {machine.speed / 1e12:.3g} T operations a second",
    )


def _show(cfg: Config, report: Report) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "look": "yellow", "fault": "bold red"}
    table = Table(title=f"{cfg.model.name} on {cfg.data.name}, {cfg.arm.name}-{cfg.seed}", show_lines=False)
    for name in ("check", "state"):
        table.add_column(name, no_wrap=True)
    table.add_column("what was found", overflow="fold")
    for what, state, text in report.rows:
        table.add_row(what, Text(state, colours[state]), Text(text))
    Console(width=None if Console().is_terminal else 120).print(table)


def gib(size: float) -> str:
    """A number of bytes for people."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size:.0f} B"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours" if seconds < 172800 else f"{seconds / 86400:.1f} days"
