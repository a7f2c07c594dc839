"""Settings that must not change what a run computes, each against one reference run, through the command itself."""

import subprocess
import sys
from pathlib import Path

import pytest
from test_train import SMALL, losses, root  # noqa: F401 (a fixture)
from torch import nn

from pipeline.config import Config, compose
from pipeline.train import metrics, status
from stages.cli import stage

# Rounding of the sums at the same weights; Adam divides by the gradient's own size, so that it grows from step to step.
FIRST, LATER = 1e-5, 2e-3
COUNTS = ("examples", "tokens", "words")


def words(root: Path, name: str, *more: str) -> list[str]:  # noqa: F811
    """The command's words: those of `settings`, and what all runs here share."""
    return [
        f"shards_dir={root}/shards",
        f"runs_dir={root}/golden-{name}",
        f"model.path={root}/student",
        "data.sizes={train: 12}",
        "data.shard_size=5",
        "train.steps=4",
        "train.batch_size=8",
        "train.micro_batch=8",
        "train.checkpoint_every=4",
        "train.log_every=1",
        "train.freeze=[vision_model]",
        "train.unfreeze=[{step: 2, pattern: lm_head}]",
        "arm=lavender",
        "train.held_out_split=val",
        "train.held_out=3",
        "train.evaluate_every=2",
        *more,
    ]


def run(root: Path, name: str, *more: str) -> Config:  # noqa: F811
    argv = words(root, name, *more)
    assert stage("pipeline.train.stage", "train", None, argv) == 0
    return compose(argv)


def ranks(root: Path, name: str, target: list[str], *more: str) -> tuple[Config, str]:  # noqa: F811
    """The same on two processes that torchrun starts."""
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *target]
    given = words(root, name, *more)
    done = subprocess.run(argv + given, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return compose(given), done.stdout


@pytest.fixture(scope="module")
def reference(root) -> Config:  # noqa: F811
    return run(root, "reference")


def same_run(cfg: Config, reference: Config) -> None:
    found, expected = metrics.read(status.run_dir(cfg)), metrics.read(status.run_dir(reference))
    for name in ("loss", "ce", "align", "grad_norm"):
        assert found[0][name] == pytest.approx(expected[0][name], rel=FIRST), name
    for name in ("step", "tokens", "words"):
        assert [row[name] for row in found] == [row[name] for row in expected], name
    for a, b in zip(losses(cfg), losses(reference), strict=True):
        assert a == pytest.approx(b, abs=LATER)
    found, expected = metrics.heldout(status.run_dir(cfg)), metrics.heldout(status.run_dir(reference))
    assert [line["step"] for line in found] == [0, 2, 4]
    for mine, theirs in zip(found, expected, strict=True):
        assert [mine[name] for name in COUNTS] == [theirs[name] for name in COUNTS] and mine["examples"] == 3
        for name in ("loss", "ce", "align", "correlation", "peak_inside"):
            assert mine[name] == pytest.approx(theirs[name], rel=FIRST if mine["step"] == 0 else 0, abs=LATER), name


@pytest.mark.parametrize(
    "more",
    [
        ["train.micro_batch=1"],
        ["train.gradient_checkpointing=true"],
        ["model.attention=eager"],
        ["train.micro_batch=3", "train.workers=1"],
    ],
    ids=["accumulation", "checkpointing", "eager", "uneven"],
)
def test_the_run_is_the_same(root, reference, more):  # noqa: F811
    """Accumulation: a batch of 8 at once is that of 8 times 1."""
    same_run(run(root, "".join(filter(str.isalnum, "".join(more))), *more), reference)


@pytest.mark.full
def test_compiled_layers_compute_the_same_run(root, reference, monkeypatch):  # noqa: F811
    """All of torch.compile but the making of kernels, which needs a compiler of its own."""
    compiled, plain = [], nn.Module.compile

    def traced(self, *args, **kwargs):
        compiled.append(type(self).__name__)
        plain(self, *args, backend="aot_eager", **kwargs)

    monkeypatch.setattr(nn.Module, "compile", traced)
    same_run(run(root, "compiled", "train.compile=true"), reference)
    assert len(compiled) == SMALL["layers"] + SMALL["vision_layers"] + 1  # the tower has a global layer as well


def test_two_processes_compute_the_same_run(root, reference):  # noqa: F811
    """Of three held-out examples in batches of one the second process has one only, and keeps up."""
    cfg, out = ranks(root, "ddp", ["-m", "stages.train"], "train.micro_batch=1")
    assert out.count("4 steps of 8") == 1, "one process speaks"
    same_run(cfg, reference)


@pytest.mark.full
def test_two_processes_with_sharded_weights_compute_the_same_run(root, reference):  # noqa: F811
    script = str(Path(__file__).parent / "fsdp_on_cpu.py")
    cfg, out = ranks(root, "fsdp", [script], "train.micro_batch=1", "train.parallel=fsdp", "train.logits_mb=1")
    assert "fsdp2 True" in out
    same_run(cfg, reference)


@pytest.mark.full
def test_sharded_weights_in_half_precision_compute_what_one_process_does(root):  # noqa: F811
    script = str(Path(__file__).parent / "fsdp_on_cpu.py")
    # In a process of its own: accelerate keeps a process's precision.
    given = words(root, "half", "train.precision=bf16")
    done = subprocess.run([sys.executable, "-m", "stages.train", *given], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = compose(given)
    cfg, out = ranks(root, "fsdp-half", [script], "train.precision=bf16", "train.micro_batch=4", "train.parallel=fsdp")
    assert "fsdp2 True" in out
    for found, expected in zip(losses(cfg), losses(alone), strict=True):
        assert found == pytest.approx(expected, rel=1e-2)
