"""Exact resume: after a stop, kill -9, SIGTERM or damage a run ends as an uninterrupted one, to the last bit."""

import errno
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_train import losses, root, same, settings, weights  # noqa: F401 (root is a fixture)
from torch import nn

from pipeline import receipts
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.train import checkpoint, metrics, status
from pipeline.train.checkpoint import Checkpoints, chosen, newest
from pipeline.train.stage import train

STEPS = 24
LOGGED = 5  # lines after which a signal is sent: the save of step 4 waits for that of step 2, so that one is whole
STARTED: list[subprocess.Popen] = []


def overrides(base: Path, folder: str, *more: str) -> list[str]:
    return [f"train.steps={STEPS}", "arm=lavender", f"runs_dir={base}/{folder}", *more]


@pytest.fixture(scope="module")
def whole(root) -> Config:  # noqa: F811
    """A finished run that nothing interrupted."""
    cfg = settings(root, *overrides(root, "whole"))
    train(cfg)
    return cfg


def launched(base: Path, folder: str, *more: str, ranks: int = 1) -> list[subprocess.Popen]:
    """The real command with the settings of `settings`; several processes as a cluster's launcher starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    processes = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        several = meeting | {name: str(value) for name, value in place.items()} if ranks > 1 else {}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "stages.train", *command_line(base), *overrides(base, folder, *more)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=os.environ | several,
            )
        )
    STARTED.extend(processes)
    return processes


def finished(processes: list[subprocess.Popen]) -> tuple[str, list[int]]:
    """What the first process printed, and the exit codes of all."""
    printed = [process.communicate(timeout=240)[0] for process in processes]
    return printed[0], [process.returncode for process in processes]


def signalled(
    number: int, lines: int, run: Path, base: Path, folder: str, *more: str, ranks: int = 1
) -> tuple[str, list[int]]:
    """Starts a run, sends the last of its processes a signal (all of them one to kill) once it has logged so many
    lines of its own, and waits for its end."""
    file = run / metrics.FILE
    before = file.stat().st_ino if file.exists() else 0
    processes = launched(base, folder, *more, ranks=ranks)

    def alive() -> bool:
        time.sleep(0.002)
        return all(process.poll() is None for process in processes)

    while alive() and (not file.exists() or file.stat().st_ino == before):
        pass  # it begins with writing anew what is kept
    kept = len(metrics.read(run))
    while alive() and len(metrics.read(run)) < kept + lines:
        pass
    for process in processes if number == signal.SIGKILL else processes[-1:]:
        process.send_signal(number)
    return finished(processes)


@pytest.fixture(autouse=True)
def leave_nothing_running():
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            process.kill()
            process.communicate()


def command_line(base: Path) -> list[str]:
    return [
        f"shards_dir={base}/shards",
        f"model.path={base}/student",
        "data.sizes={train: 12, val: 5, test: 5, ood_pairs: 5, ood_count: 5, ood_background: 5}",
        "data.shard_size=5",
        "engine.workers=1",
        "train.batch_size=4",
        "train.micro_batch=4",
        "train.checkpoint_every=2",
        "train.log_every=1",
        "train.freeze=[vision_model]",
    ]


def test_stopped_between_logged_lines_and_resumed_equals_uninterrupted(root, capsys):  # noqa: F811
    cfg = settings(root, *overrides(root, "sparse", "train.steps=6", "train.log_every=3"))
    train(cfg)
    stopped = replace(cfg, runs_dir=f"{root}/stopped")
    train(replace(stopped, train=replace(cfg.train, max_steps_per_call=4)))
    assert not status.up_to_date(stopped)
    capsys.readouterr()
    train(stopped)
    assert "going on from step 4" in capsys.readouterr().out
    assert same(weights(stopped), weights(cfg))
    assert losses(stopped) == losses(cfg), "the line of step 6 holds step 4 too"
    assert [row["step"] for row in metrics.read(status.run_dir(stopped))] == [3, 6]


def test_killed_twice_and_terminated_once_equals_uninterrupted(root, whole):  # noqa: F811
    cfg = settings(root, *overrides(root, "killed"))
    run = status.run_dir(cfg)
    for _ in range(2):
        _, codes = signalled(signal.SIGKILL, LOGGED, run, root, "killed")
        assert codes == [-signal.SIGKILL]
        assert not (run / status.RECEIPT).exists()
    out, codes = signalled(signal.SIGTERM, LOGGED, run, root, "killed")
    assert codes == [0], out
    assert "going on from step" in out
    reached = len(metrics.read(run))
    assert f"stopped at step {reached} of {STEPS}, the process was told to end (SIGTERM); run again to go on" in out
    found = newest(run, receipts.load(run / checkpoint.FOLDER / f"{reached:08d}" / "receipt.json").settings)
    assert found.step == reached
    train(cfg)
    assert same(weights(cfg), weights(whole))
    assert losses(cfg) == losses(whole)


@pytest.mark.full
def test_killed_at_random_moments_equals_uninterrupted(root, whole):  # noqa: F811
    """Also while a checkpoint is being written: every step makes one."""
    seed = int(time.time())
    print("seed", seed)
    rng = random.Random(seed)
    cfg = settings(root, *overrides(root, "random", "train.checkpoint_every=1"))
    run = status.run_dir(cfg)
    kills = 0
    while not status.up_to_date(cfg):
        _, codes = signalled(signal.SIGKILL, rng.randint(3, 9), run, root, "random", "train.checkpoint_every=1")
        kills += codes == [-signal.SIGKILL]
        assert kills < 40, "it gets nowhere"
    assert kills >= 2
    assert same(weights(cfg), weights(whole))
    assert losses(cfg) == losses(whole)


@pytest.mark.full
def test_two_processes_killed_and_terminated_equal_two_uninterrupted(root, whole):  # noqa: F811
    cfg, killed = (settings(root, *overrides(root, name)) for name in ("two", "two-killed"))
    out, codes = finished(launched(root, "two", ranks=2))
    assert codes == [0, 0], out
    run = status.run_dir(killed)
    for _ in range(2):
        out, codes = signalled(signal.SIGKILL, LOGGED, run, root, "two-killed", ranks=2)
        assert codes == [-signal.SIGKILL] * 2, out
    out, codes = signalled(signal.SIGTERM, LOGGED, run, root, "two-killed", ranks=2)
    assert codes == [0, 0], "one of them is told, both save and end: " + out
    assert "the process was told to end (SIGTERM); run again to go on" in out
    assert not (run / status.RECEIPT).exists()
    out, codes = finished(launched(root, "two-killed", ranks=2))
    assert codes == [0, 0], out
    assert "going on from step" in out
    assert same(weights(killed), weights(cfg))
    assert losses(killed) == losses(cfg)
    for row, alone in zip(losses(cfg), losses(whole), strict=True):
        assert row == pytest.approx(alone, abs=1e-3), "the same global batches as one process"


@pytest.mark.full
def test_a_run_goes_on_with_another_number_of_processes(root, whole):  # noqa: F811
    cfg = settings(root, *overrides(root, "one-two"))
    train(replace(cfg, train=replace(cfg.train, max_steps_per_call=5)))
    out, codes = finished(launched(root, "one-two", "train.max_steps_per_call=3", ranks=2))
    assert codes == [0, 0], out
    assert "going on from step 5" in out
    train(cfg)
    assert losses(cfg)[:5] == losses(whole)[:5]
    for row, alone in zip(losses(cfg), losses(whole), strict=True):
        assert row == pytest.approx(alone, abs=1e-3)


@pytest.mark.parametrize("flipped", ["state/__0_0.distcp", "state/.metadata", "receipt.json"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(flipped, tmp_path):
    _, _, written = stepped(tmp_path, 2)
    file = tmp_path / checkpoint.FOLDER / "00000002" / flipped
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    fresh = small()
    position = Checkpoints(tmp_path, {"a": 1}, 2, *fresh).restore()
    assert position.step == 1
    assert len(position.damaged) == 1
    assert "00000002" in position.damaged[0]
    assert same(dict(fresh[0].state_dict()), written[1])


def test_what_a_lack_of_memory_asks_for_may_change_in_the_middle(root, whole, capsys):  # noqa: F811
    cfg = settings(root, *overrides(root, "smaller"))
    train(replace(cfg, train=replace(cfg.train, max_steps_per_call=4)))
    smaller = replace(cfg.train, micro_batch=1, gradient_checkpointing=True, logits_mb=64)
    with pytest.raises(receipts.Stale, match=r"other settings: train\.lr \(\S+ -> 3.0\): set"):
        train(replace(cfg, train=replace(smaller, lr=3.0)))
    train(replace(cfg, train=smaller))
    out = capsys.readouterr().out
    assert "going on from step 4, equal up to rounding with other train.micro_batch (4 -> 1), " in out
    assert "train.logits_mb (default -> 64)" in out
    for row, other in zip(losses(cfg), losses(whole), strict=True):
        assert row == pytest.approx(other, abs=1e-3)


def test_the_run_says_which_checkpoint_it_passed_over(root, whole, capsys):  # noqa: F811
    cfg = settings(root, *overrides(root, "flipped"))
    train(replace(cfg, train=replace(cfg.train, max_steps_per_call=4)))
    file = status.run_dir(cfg) / checkpoint.FOLDER / "00000004" / "state" / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 4
    file.write_bytes(data)
    train(cfg)
    out = capsys.readouterr().out
    assert "passed over a damaged checkpoint" in out
    assert "going on from step 2" in out
    assert same(weights(cfg), weights(whole))
    assert losses(cfg) == losses(whole)


# --- the checkpoints themselves -------------------------------------------------------------------------------------


def small() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model with frozen and tied weights and buffers that change."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Linear(6, 6, bias=False))
    model[0].requires_grad_(False)
    model[3].weight = model[0].weight  # frozen under another name
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    torch.manual_seed(number)
    model(torch.randn(8, 6)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def stepped(run: Path, steps: int, keep: int = 9, heldout: tuple = ()) -> tuple:
    """A model after some steps with a checkpoint of each, and its weights after each."""
    model, optimizer = small()
    checkpoints = Checkpoints(run, {"a": 1}, keep, model, optimizer)
    written = {}
    for number in range(1, steps + 1):
        step(model, optimizer, number)
        checkpoints.save(number, {"rows": [[0.1 * number]]}, heldout[number - 1] if heldout else None)
        written[number] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    checkpoints.close()
    return model, optimizer, written


def test_only_what_was_trained_is_written_and_it_goes_on_alike(tmp_path):
    model, optimizer, _ = stepped(tmp_path, 2)
    metadata = torch.distributed.checkpoint.FileSystemReader(tmp_path / "checkpoints" / "00000002" / "state")
    names = {name for name in metadata.read_metadata().state_dict_metadata if name.startswith("model.")}
    assert names == {f"model.{name}" for name in model.state_dict() if name.startswith(("1.", "2."))}
    again = small()
    position = Checkpoints(tmp_path, {"a": 1}, 2, *again).restore()
    assert (position.step, position.trackers) == (2, {"rows": [[0.2]]})
    step(model, optimizer, 3)
    step(*again, 3)
    assert same(dict(model.state_dict()), dict(again[0].state_dict()))


def test_the_newest_and_the_best_are_kept(tmp_path):
    stepped(tmp_path, 5, keep=2, heldout=(0.5, 0.2, 0.3, 0.4, 0.6))
    assert sorted(p.name for p in (tmp_path / checkpoint.FOLDER).iterdir()) == ["00000002", "00000004", "00000005"]


def test_checkpoints_that_were_passed_over_do_not_push_out_whole_ones(tmp_path):
    stepped(tmp_path, 3, heldout=(0.5, 0.2, 0.1))
    folder = tmp_path / checkpoint.FOLDER
    for number in (2, 3):
        file = folder / f"{number:08d}" / "state" / "__0_0.distcp"
        file.write_bytes(file.read_bytes()[:-1])
    found = chosen(tmp_path)
    assert (found.step, len(found.damaged)) == (1, 2), "the better ones are damaged, and that is told"
    model, optimizer = small()
    checkpoints = Checkpoints(tmp_path, {"a": 1}, 1, model, optimizer)
    assert checkpoints.restore().step == 1
    step(model, optimizer, 2)
    checkpoints.save(2)
    checkpoints.close()
    assert newest(tmp_path, {"a": 1}).step == 2


def test_what_a_kill_left_half_written_is_not_a_checkpoint(tmp_path):
    stepped(tmp_path, 2)
    last = tmp_path / checkpoint.FOLDER / "00000002"
    (last / "receipt.json").unlink()
    last.rename(f"{last}.partial")
    assert newest(tmp_path, {"a": 1}).step == 1
    assert [p.name for p in last.parent.iterdir()] == ["00000001"]


def test_other_settings_older_versions_and_other_tensors_are_refused(tmp_path):
    stepped(tmp_path, 1)
    with pytest.raises(receipts.Stale, match="a "):
        newest(tmp_path, {"a": 2})
    model = nn.Sequential(nn.Linear(6, 6))
    with pytest.raises(UserError, match="other tensors than are trained"):
        Checkpoints(tmp_path, {"a": 1}, 2, model, torch.optim.AdamW(model.parameters())).restore()
    old = tmp_path / checkpoint.FOLDER / "00000007"
    old.mkdir()
    (old / "trained.safetensors").touch()
    with pytest.raises(UserError, match="older version"):
        newest(tmp_path, {"a": 1})
    assert newest(tmp_path, {"a": 1}, overwrite=True).step == 1
    assert newest(tmp_path, {"a": 2}, overwrite=True).path is None


def test_a_checkpoint_that_cannot_be_written_ends_the_run_with_one_line(tmp_path, monkeypatch):
    model, optimizer = small()
    step(model, optimizer, 1)
    checkpoints = Checkpoints(tmp_path, {"a": 1}, 2, model, optimizer)
    checkpoints.save(1)
    checkpoints.wait()
    monkeypatch.setattr(receipts, "commit_dir", no_space)
    checkpoints.save(2)
    with pytest.raises(UserError, match=r"cannot write a checkpoint .*No space left"):
        checkpoints.wait()
    assert newest(tmp_path, {"a": 1}).step == 1


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def two(script: str, *arguments: object) -> None:
    """Two processes of a script of the tests, to their end."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ranks = [
        subprocess.Popen(
            [sys.executable, Path(__file__).with_name(script), str(rank), *map(str, arguments)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for process in ranks:
        out, _ = process.communicate(timeout=240)
        assert process.returncode == 0, out


@pytest.mark.full
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_student_in_parts_is_exported_whole(root, tmp_path, method):  # noqa: F811
    two("two_ranks_export.py", tmp_path, root / "student", method)


def test_processes_share_checkpoints_whatever_their_number_and_wrapper(tmp_path):
    """One process, two under DDP, two under FSDP2: each goes on from the other's checkpoint."""
    model, optimizer, _ = stepped(tmp_path / "one", 2)
    two("two_ranks_checkpoint.py", tmp_path)
    step(model, optimizer, 3)
    for way in ("ddp", "fsdp"):
        again = small()
        assert Checkpoints(tmp_path / way, {"a": 1}, 2, *again).restore().step == 3
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(again[0].state_dict()[name], tensor, msg=f"{way} {name}")
        step(*again, 4)
    step(model, optimizer, 4)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again[0].state_dict()[name], tensor, msg=f"fsdp after the next step: {name}")
