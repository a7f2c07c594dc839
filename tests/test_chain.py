"""The driver behind make: what a target needs, and the processes that do it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.errors import UserError
from stages import chain, jobs, results


@dataclass(frozen=True)
class Script(jobs.Job):
    """A job that runs a line of Python in place of a stage."""

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-c", *self.overrides]


def script(name: str, code: str) -> Script:
    return Script("script", name, (code,))


def test_targets_need_the_stages_before_them():
    assert chain.plan("shard", []).stages == ("shard",)
    assert chain.plan("eval", []).stages == ("shard", "precompute", "train", "eval")
    assert chain.plan("demo", []).stages == chain.STAGES
    assert chain.plan("train", []).stages == ("shard", "precompute", "train")


@pytest.mark.parametrize("arm", ["sft", "oracle", "centre"])
def test_arms_without_the_teacher_need_no_maps(arm):
    assert chain.plan("train", [f"arm={arm}"]).stages == ("shard", "train")


def test_the_demo_trains_every_arm_with_every_seed_in_its_own_folder():
    work = chain.plan("demo", ["train.steps=7"], seeds=2, arms=["sft", "oracle"])
    steps = work.steps("train")
    assert [job.name for _, job in steps] == ["sft-1", "oracle-1", "sft-2", "oracle-2"]
    for cfg, job in steps:
        assert cfg.runs_dir == "runs/demo"
        assert cfg.train.steps == 7
        assert f"{cfg.arm.name}-{cfg.seed}" == job.name
        assert {f"arm={cfg.arm.name}", f"seed={cfg.seed}", "train.steps=7"} <= set(job.overrides)
    assert (work.cfg.eval.arms, work.cfg.eval.seeds) == (["sft", "oracle"], [1, 2])


def test_controls_and_students_of_an_evaluation():
    names = [job.name for _, job in chain.plan("eval", [], controls=True).steps("train")]
    assert names == [f"{arm}-1" for arm in ("sft", "lavender", "shuffled", "centre", "oracle")]
    no_regions = chain.plan("eval", ["data=easy_vqa"], arms=["sft"], controls=True)
    assert list(no_regions.arms) == ["sft", "shuffled", "centre"]
    alone = chain.plan("eval", [], students={"mine": "/some/where"})
    assert (alone.stages, alone.cfg.eval.arms) == (("shard", "eval"), ["base"])
    assert alone.cfg.eval.students == {"mine": "/some/where"}
    both = chain.plan("eval", [], arms=["sft"], students={"mine": "/some/where"})
    assert (both.cfg.eval.arms, list(both.arms)) == (["sft"], ["sft"])
    assert chain._directories("a=/x, b=/y") == {"a": "/x", "b": "/y"}
    for wrong in ("a", "=/x", "a b=/x"):
        with pytest.raises(UserError, match="name=directory"):
            chain._directories(wrong)


def test_a_harness_needs_arms_and_no_examples_of_ours():
    assert chain.plan("eval", ["eval=lmms"]).stages == ("shard", "precompute", "train", "eval")
    assert chain.plan("eval", ["eval=vlmevalkit"]).stages == ("eval",)


def test_settings_of_the_alignment_leave_plain_fine_tuning_alone():
    work = chain.plan("eval", ["arm.lam=2", "arm=oracle", "seed=4"])
    found = {job.name: cfg.arm.lam for cfg, job in work.steps("train")}
    assert found == {"sft-4": 0, "lavender-4": 2}


def test_unknown_arms_are_refused():
    with pytest.raises(UserError, match="unknown arm 'nope'"):
        chain.plan("demo", [], arms=["sft", "nope"])


@pytest.mark.parametrize("seeds", ["0", "x", "-1", "1.5"])
def test_the_number_of_seeds_is_checked(seeds, capsys):
    assert chain.main(["demo", f"--seeds={seeds}"]) == 2
    assert capsys.readouterr().err == f"error: SEEDS={seeds}: give a whole number from 1 on\n"


def test_jobs_side_by_side_are_named_and_use_one_thread(capsys):
    code = "import os, sys; print(os.environ['OMP_NUM_THREADS']); print('oh', file=sys.stderr)"
    assert jobs.run([script("a", code), script("b", code)], width=2, threads=1) == 0
    output = capsys.readouterr()
    assert sorted(output.out.splitlines()) == ["[a] 1", "[b] 1"]
    assert sorted(output.err.splitlines()) == ["[a] oh", "[b] oh"]


def test_a_failure_stops_the_others_and_is_passed_on(tmp_path):
    late = tmp_path / "late"
    started = time.monotonic()
    code = jobs.run(
        [
            script("bad", "import sys; sys.exit(2)"),
            script("slow", "import time; time.sleep(60)"),
            script("never", f"open({str(late)!r}, 'w')"),
        ],
        width=2,
        threads=1,
    )
    assert code == 2
    assert time.monotonic() - started < 30
    assert not late.exists()


def test_termination_stops_the_children(tmp_path):
    mark = tmp_path / "pid"
    child = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(60)"

    def end() -> None:
        while not (mark.exists() and mark.read_text()):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        jobs.run([script("child", child)], width=1, threads=0)
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)


def test_a_killed_child_is_told(capsys):
    code = jobs.run([script("train", "import os; os.kill(os.getpid(), 9)")], width=1, threads=0)
    assert code == 137
    assert (
        capsys.readouterr().err == "error: train was ended by SIGKILL: run the same command again to go on from here\n"
    )


def test_children_end_with_a_killed_parent(tmp_path):
    mark = tmp_path / "pid"
    child = f"open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    parent = (
        "import subprocess, sys\n"
        "subprocess.run([sys.executable, '-c', "
        f'"""import os, time; from stages.cli import follow_parent; follow_parent(); {child}"""])'
    )
    process = subprocess.Popen([sys.executable, "-c", parent])
    while not (mark.exists() and mark.read_text()):
        time.sleep(0.02)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while _alive(int(mark.read_text())):
        assert time.monotonic() < deadline, "the child goes on"
        time.sleep(0.1)


def _alive(pid: int) -> bool:
    """Whether a process runs; one that has ended but is not yet collected by its parent does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_seconds_are_kept_and_join_the_summary(tmp_path):
    path = tmp_path / "summary.json"
    path.write_text(json.dumps({"arms": {}, "seeds": [1]}))
    results.Seconds(tmp_path / "seconds.json").add("shard", 2.04)
    results.Seconds(tmp_path / "seconds.json").add("train", 61.0)
    clock = results.Seconds(tmp_path / "seconds.json")
    assert str(clock) == "shard 2, train 61"
    found = results.summary(path, clock)
    assert found == {"arms": {}, "seeds": [1], "seconds": {"shard": 2.0, "train": 61.0}}
    results.keep(found, tmp_path / "kept.json")
    assert json.loads((tmp_path / "kept.json").read_text()) == found
    path.write_text("half a f")
    with pytest.raises(UserError, match=r"cannot read .*summary.json"):
        results.summary(path, clock)


def test_make_help_lists_every_target():
    text = subprocess.run(["make", "help"], capture_output=True, text=True, check=True).stdout
    for target in ("demo", "test", "test-full", "shard", "precompute", "train", "eval", "report"):
        assert f"\n  {target} " in text
