"""Guards of training: what is not finite, out of memory or stuck ends with a reason."""

import io
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from pipeline.config import compose
from pipeline.errors import UserError
from pipeline.examples import Example, Turn
from pipeline.student.load import load_student
from pipeline.train import guards
from pipeline.train.config import TrainConfig

NAN = float("nan")
BATCHES = [SimpleNamespace(keys=["0000100007", "0000100009"]), SimpleNamespace(keys=["0000200001"])]


@pytest.mark.parametrize(("ce", "align", "norms"), [(NAN, 0.0, 0), (1.0, float("inf"), 0), (1.0, 0.0, 1)])
def test_a_step_that_is_not_finite_stops_with_the_keys_of_its_batch(ce, align, norms):
    finite = guards.Finite(skip=False)
    assert finite.check(6, 1.0, 2.0, 0, BATCHES)
    with pytest.raises(UserError, match=r"step 7.*0000100007, 0000100009, 0000200001"):
        finite.check(7, ce, align, norms, BATCHES)


def test_skipped_steps_are_counted_and_ten_in_a_row_end_the_run(capsys):
    finite = guards.Finite(skip=True)
    for step in range(9):
        assert not finite.check(step, NAN, 0.0, 0, BATCHES)
    assert "step 8" in capsys.readouterr().err
    assert finite.check(9, 1.0, 0.0, 0, BATCHES)
    assert finite.skipped == 9
    for step in range(10, 19):
        assert not finite.check(step, NAN, 0.0, 0, BATCHES)
    with pytest.raises(guards.NotFinite, match="10 steps in a row"):
        finite.check(19, NAN, 0.0, 0, BATCHES)


def test_out_of_memory_says_what_to_lower_and_other_errors_pass():
    cfg = TrainConfig(micro_batch=8, method="full", precision="bf16", gradient_checkpointing=True)
    with pytest.raises(UserError) as caught, guards.memory(cfg):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in ("2.00 GiB", "train.micro_batch=4", "train.method=lora"))
    assert "gradient_checkpointing" not in str(caught.value), "it is on already"
    with pytest.raises(UserError, match="gradient_checkpointing=true"), guards.memory(TrainConfig(micro_batch=1)):
        torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="shapes"), guards.memory(cfg):
        raise RuntimeError("shapes do not fit")


def test_smaller_images_are_advised_where_they_take_less(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, helps in (("qwen25-vl-7b", True), ("llava15-7b", False)):
        model = compose([f"model={name}", "model.weights=random", "model.size=tiny"]).model
        family = load_student(model).family
        with pytest.raises(UserError) as caught, guards.memory(TrainConfig(), model, family):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        assert ("model.max_pixels=500000 (smaller images)" in str(caught.value)) == helps
        assert "\n" not in str(caught.value)
    model = compose(["model=qwen25-vl-7b", "model.weights=random", "model.size=tiny", "model.max_pixels=40000"]).model
    capped = load_student(model).family
    assert "model.max_pixels=20000" in guards.advice(TrainConfig(), model, capped)
    out = io.BytesIO()
    Image.new("RGB", (800, 400)).save(out, "png")
    one = Example("0", out.getvalue(), "png", (Turn("user", "what"), Turn("assistant", "red")), "", "", "")
    assert capped._decode(one).size == (282, 141)
    capped.max_pixels = 0
    assert capped._decode(one).size == (800, 400)


def test_a_hang_shows_where_it_is_and_steps_in_time_show_nothing():
    code = (
        "import time\nfrom pipeline.train.guards import HangWatch\n"
        "def stuck():\n    time.sleep(1.2)\n"
        "with HangWatch(0.8) as watch:\n"
        "    for _ in range(4): time.sleep(0.3); watch.again()\n"
        "    print('in time', flush=True)\n"
        "    stuck()\n"
        "time.sleep(0.9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "in time\n"
    assert len(re.findall("Timeout", done.stderr)) == 1
    assert "in stuck" in done.stderr
