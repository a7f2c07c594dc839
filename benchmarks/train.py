"""What the training loop costs beside the bare step, on the tiny student; and how fast the real shapes are on a GPU.

    python -m benchmarks.train [--blocks 12] [--steps 20] [--json FILE]

On the CPU, with the bundled student on the embedded world (every weight trained, 16 examples a step, the oracle's
regions as maps):

- `loop_overhead`: blocks of `train_loop` take turns with blocks of as many bare steps: forward, backward and optimizer
  step on batches made before. The extra time of a loop's block as a share of the bare one beside it, median over pairs.
- `data_wait`: the share of the loop's time in which it waited for a batch, as its own clock says.
- `checkpoint_stall_steps`: how much longer, in steps, the loop takes where it saves: the real command with a checkpoint
  every ten steps, the median of the steps that follow a save beside the median of the others.
- `resume_extra_seconds`: from the start of the real command to its first step, resumed from a checkpoint and cold.
- `peak_mb`: the most memory that the command takes.

With a GPU, further keys with `gpu_` before them: Llama-3.2-11B-Vision's shapes with random weights, adapters, bf16, one
example of four tiles a micro-batch: tokens/s, model FLOPs utilisation (`pipeline.train.flops`), peak memory, the loop's
time over that of the bare step, and the projected hours of 130,000 examples on 8 such cards.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

WORLD = (
    "data.sizes={train: 512, val: 16, test: 16, ood_pairs: 4, ood_count: 4, ood_background: 4}",
    "data.shard_size=128",
    "arm=oracle",
)
LIMIT = 600  # seconds that a command may take
PLAN = 4000  # steps that the runs are planned for, of which a benchmark takes some


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=12, help="pairs of blocks")
    parser.add_argument("--steps", type=int, default=20, help="steps in a block")
    parser.add_argument("--saves", type=int, default=6, help="checkpoints whose stall is measured")
    parser.add_argument("--starts", type=int, default=3, help="cold and resumed starts")
    parser.add_argument("--skip", default="", help="parts to leave out: loop, stall, resume, gpu (commas between)")
    parser.add_argument("--json", type=Path, help="also write the result there")
    args = parser.parse_args(argv)
    skip = set(args.skip.split(","))

    import torch

    torch.set_num_threads(1)
    result: dict[str, object] = {"threads": 1, "torch": torch.__version__}
    folder = Path(tempfile.mkdtemp(prefix="bench-train."))
    try:
        _command("shard", folder)
        if "loop" not in skip:
            result |= loop(folder, args.blocks, args.steps)
        if "stall" not in skip:
            result |= stall(folder, args.saves)
        if "resume" not in skip:
            result |= resumed(folder, args.starts)
        if torch.cuda.is_available() and "gpu" not in skip:
            from benchmarks.train_gpu import on_gpu

            result |= on_gpu(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result["peak_mb"] = round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
    line = json.dumps(result)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(line + "\n", encoding="utf-8")
    print(f"RESULT {line}")
    return 0


# --- the loop beside the bare step -----------------------------------------------------------------------------------


def loop(folder: Path, blocks: int, steps: int) -> dict[str, float]:
    """`loop_overhead` and `data_wait`, in this process."""
    run = Run(folder)
    run.loop(steps)  # warms up, and encodes what the first block needs
    run.bare(steps)
    extra, waits, seconds = [], [], []
    for number in range(blocks):
        order = (run.loop, run.bare) if number % 2 else (run.bare, run.loop)
        took = {one.__name__: one(steps) for one in order}
        waits.append(run.waited / took["loop"])
        extra.append((took["loop"] - took["bare"]) / took["bare"])
        seconds.append(took["bare"] / steps)
    extra.sort()
    return {
        "loop_overhead": round(statistics.median(extra), 4),
        "loop_overhead_low": round(extra[len(extra) // 4], 4),
        "loop_overhead_high": round(extra[-1 - len(extra) // 4], 4),
        "data_wait": round(statistics.median(waits), 4),
        "bare_step_seconds": round(statistics.median(seconds), 4),
        "pairs": blocks,
        "steps_per_block": steps,
    }


class Run:
    """One model in training, by the loop or bare; both go on from where the other stopped."""

    def __init__(self, folder: Path, *overrides: str, device: str = "cpu"):
        import torch
        from accelerate import Accelerator

        from pipeline.align.loss import AlignmentLoss
        from pipeline.archive import Archive
        from pipeline.config import compose
        from pipeline.layout import Layout
        from pipeline.student.capture import AttentionTap
        from pipeline.student.load import load_student
        from pipeline.train.data import Batches
        from pipeline.train.order import train_plan
        from pipeline.train.targets import open_targets
        from pipeline.train.trainable import groups, trainable
        from pipeline.train.tuned import Tuned

        self.cfg = compose([*WORLD, f"shards_dir={folder}/shards", f"runs_dir={folder}/runs", *overrides])
        cfg = self.cfg
        torch.manual_seed(cfg.seed)
        self.accelerator = Accelerator(mixed_precision=cfg.train.precision, cpu=device == "cpu")
        with torch.device(device):
            student = load_student(cfg.model, cfg.align)
        model = trainable(student.model, cfg.train)
        tap = AttentionTap(model, student.family)
        tuned = Tuned(model, AlignmentLoss.for_tap(tap, cfg.align), tap, cfg.train.logits_mb << 20)
        optimizer = torch.optim.AdamW(groups(tuned.named_parameters(), cfg.train), fused=True)
        self.tuned, self.optimizer = self.accelerator.prepare(tuned, optimizer)
        archive = Archive(Layout(cfg).examples_dir("train"))
        self.batches = Batches(
            archive,
            train_plan(cfg, archive),
            student.family,
            open_targets("oracle", archive, None, cfg.seed),
            micro_batch=cfg.train.micro_batch,
            rank=0,
            ranks=1,
            skipped_file=folder / "skipped.jsonl",
            max_failed=0.01,
        )
        self.step, self.lines = 0, []
        self.progress = _Silent()
        self.metrics = _Kept(self.lines)

    def loop(self, steps: int) -> float:
        """Seconds of so many steps of `train_loop`."""
        from pipeline.train.loop import train_loop

        cfg = replace(self.cfg.train, max_steps_per_call=steps, log_every=10, checkpoint_every=PLAN, warmup=0.0)
        self.lines.clear()
        begun = time.perf_counter()
        self.step = train_loop(
            self.accelerator,
            self.tuned,
            self.optimizer,
            self.batches,
            cfg,
            self.cfg.align,
            self.cfg.arm.lam,
            self.cfg.seed,
            PLAN,
            self.step,
            self.metrics,
            self.progress,
            lambda *_: None,
        )
        self._wait()
        return time.perf_counter() - begun

    @property
    def waited(self) -> float:
        """Seconds that the last `loop` waited for batches."""
        return sum(line["seconds"]["data"] for line in self.lines) * 10

    def bare(self, steps: int) -> float:
        """Seconds of so many bare steps on batches that are there."""
        from pipeline.train.loop import usable

        device = self.accelerator.device
        ready = []
        for step in range(self.step, self.step + steps):
            micro = [batch.to(device) for batch in self.batches.at(step).batches]
            tokens = sum(int((batch.labels[:, 1:] != -100).sum()) for batch in micro)
            ready.append((micro, tokens, max(sum(int(usable(batch).sum()) for batch in micro), 1)))
        self.step += steps
        self.tuned.train()
        self._wait()
        begun = time.perf_counter()
        for micro, tokens, words in ready:
            for batch in micro:
                ce, aligned, _ = self.tuned(batch)
                (ce / tokens + self.cfg.arm.lam * aligned / words).backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self._wait()
        return time.perf_counter() - begun

    def _wait(self) -> None:
        import torch

        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()


class _Silent:
    """In place of the progress bar."""

    def advance(self, amount: int = 1, note: str | None = None) -> None:
        pass


class _Kept:
    """In place of the file of metrics."""

    def __init__(self, lines: list[dict]):
        self.lines = lines

    def add(self, line: dict, *more) -> None:
        self.lines.append(line)


# --- the real command ------------------------------------------------------------------------------------------------


def stall(folder: Path, saves: int) -> dict[str, float]:
    """`checkpoint_stall_steps`, from the times at which the real command writes its steps."""
    every = 10
    chosen = (f"train.steps={every * (saves + 1)}", f"train.checkpoint_every={every}", "train.log_every=1")
    run = _run(folder, "stall")
    with _started(folder, "stall", *chosen) as process:
        at = _times(run, every * (saves + 1), process)
    took = {step: at[step] - at[step - 1] for step in at if step - 1 in at}
    # The line of a step is written before its save, so that the save lies between it and the next one.
    after = [seconds for step, seconds in took.items() if step % every == 1 and step > every]
    others = [seconds for step, seconds in took.items() if step % every > 2 and step > every]
    typical = statistics.median(others)
    return {
        "checkpoint_stall_steps": round(statistics.median(after) / typical - 1, 3),
        "checkpoint_stall_steps_worst": round(max(after) / typical - 1, 3),
        "command_step_seconds": round(typical, 4),
    }


def resumed(folder: Path, starts: int) -> dict[str, float]:
    """`resume_extra_seconds`: medians over starts that take turns."""
    chosen = ("train.steps=400", "train.checkpoint_every=10", "train.log_every=1")
    cold, warm = [], []
    for number in range(starts):
        run = _run(folder, f"start{number}")
        begun = time.perf_counter()
        with _started(folder, f"start{number}", *chosen) as process:
            _times(run, 1, process)
            cold.append(time.perf_counter() - begun)
            _times(run, 25, process)
        have = _last(run)
        begun = time.perf_counter()
        with _started(folder, f"start{number}", *chosen) as process:
            _grown(run, have, process)
            warm.append(time.perf_counter() - begun)
    return {
        "resume_extra_seconds": round(statistics.median(warm) - statistics.median(cold), 2),
        "cold_start_seconds": round(statistics.median(cold), 2),
        "resumed_start_seconds": round(statistics.median(warm), 2),
    }


def _grown(run: Path, have: int, process: subprocess.Popen) -> None:
    """Waits until a resumed run, which first cuts its file back to its checkpoint, writes its first step."""
    shortest = have
    while True:
        now = _last(run)
        if now > shortest:
            return
        shortest = min(shortest, now)
        _alive(process)


def _times(run: Path, wanted: int, process: subprocess.Popen) -> dict[int, float]:
    """When each step's line was seen, until the wanted one."""
    seen: dict[int, float] = {}
    while not seen or max(seen) < wanted:
        last = _last(run)
        if last and last not in seen:
            seen[last] = time.perf_counter()
        _alive(process)
    return seen


def _alive(process: subprocess.Popen) -> None:
    time.sleep(0.0005)
    if process.poll() not in (None, 0):
        raise RuntimeError(f"the command ended with {process.returncode}: {process.args}")


def _last(run: Path) -> int:
    """The number of the last whole line's step; 0 without one."""
    file = run / "metrics.jsonl"
    try:
        with file.open("rb") as stream:
            stream.seek(max(file.stat().st_size - 4096, 0))
            lines = stream.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0
    try:
        return json.loads(lines[-1])["step"] if lines else 0
    except ValueError:  # read in the middle of a write
        return 0


def _run(folder: Path, name: str) -> Path:
    return folder / name / "tiny" / "world" / "oracle-1"


@contextmanager
def _started(folder: Path, name: str, *overrides: str) -> Iterator[subprocess.Popen]:
    """The train stage as a process of its own, killed at the end."""
    words = [*WORLD, f"runs_dir={folder / name}", *overrides]
    process = subprocess.Popen(
        [sys.executable, "-m", "stages.train", *words],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _command(stage: str, folder: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", f"stages.{stage}", *WORLD], cwd=folder, check=True, timeout=LIMIT, capture_output=True
    )


if __name__ == "__main__":
    sys.exit(main())
