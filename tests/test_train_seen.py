"""The numbers of a run: FLOPs by hand, speed, and where they are shown."""

import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from accelerate.tracking import TrackioTracker, WandBTracker
from PIL import Image
from torch import nn

from pipeline.config import compose
from pipeline.errors import UserError
from pipeline.train import trackers
from pipeline.train.flops import ModelFlops, Throughput


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(100, 4)
        self.layer = nn.Linear(4, 6)
        self.vision_model = nn.ModuleDict({"patch_embedding": nn.Conv2d(3, 5, 2), "mlp": nn.Linear(5, 7)})


def test_flops_are_those_counted_by_hand():
    model = Small()
    seen = 5 * 12 + 5 * 7  # the weights at each patch
    assert ModelFlops(model).patch == 12
    assert ModelFlops(model).of(10, 0) == 6 * 24 * 10
    assert ModelFlops(model).of(0, 10) == 6 * seen * 10
    model.vision_model.requires_grad_(False)
    assert ModelFlops(model).of(1, 1) == 6 * 24 + 2 * seen, "nothing to learn in the tower: forward alone"
    model.layer.requires_grad_(False)
    assert ModelFlops(model).of(1, 0) == 4 * 24, "a frozen layer passes gradients on"


def test_speed_is_counted_over_all_processes_and_begins_anew():
    class Batch:
        keys = ("a", "b")
        inputs = {"input_ids": torch.zeros(2, 5), "pixel_values": torch.zeros(2, 3, 4, 4)}  # noqa: RUF012

    speed = Throughput(Small(), torch.device("cpu"), ranks=4)
    speed.add(Batch)
    made = speed.take(2.0)
    assert (made["examples_per_second"], made["tokens_per_second"]) == (4.0, 20.0)
    assert made["flops_per_second"] == pytest.approx(ModelFlops(Small()).of(10, 8) / 2, rel=1e-3)
    assert "mfu" not in made, "the peak of a CPU is not known"
    assert made["peak_memory_mb"] > 50
    assert speed.take(1.0)["examples_per_second"] == 0


def test_pictures_and_resumed_runs_reach_every_tracker(monkeypatch, tmp_path):
    """Accelerate's own trackers, with modules that stand in for the two packages."""
    calls = []

    class Run:
        def log(self, values, step=None, **more):
            calls.append((sorted(values), step))

    def started(**given):
        calls.append(given)
        return Run()

    module = SimpleNamespace(init=started, Image=lambda image: image)
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, module)
    cfg = compose(["train.trackers=[wandb,trackio]"])

    def opened(step: int) -> tuple[dict, dict]:
        calls.clear()
        kinds = {"wandb": WandBTracker, "trackio": TrackioTracker}
        fake = SimpleNamespace(is_main_process=True, project_dir=tmp_path, trackers=[])

        def init(project, init_kwargs):
            for name, given in init_kwargs.items():
                fake.trackers.append(kinds[name](project, **given))
                fake.trackers[-1].start()

        fake.init_trackers = init
        trackers.start(fake, cfg, "train lavender-1", step)
        made = calls[:]
        trackers.show_picture(fake, "heldout/overlays", Image.new("RGB", (4, 4)), 7)
        assert calls[2:] == [(["heldout/overlays"], 7)] * 2
        return made

    PartialState()  # accelerate's trackers ask it which process this is
    wandb, trackio = opened(0)
    assert wandb["project"] == trackio["project"] == "tiny-world" and trackio["resume"] == "never"
    again, other = opened(5)
    assert again["id"] == wandb["id"] and again["resume"] == "allow" and other["resume"] == "allow"
    assert opened(0)[0]["id"] != wandb["id"], "a run that begins anew is another one"


def test_trackers_are_checked_before_the_run(monkeypatch):
    assert compose([]).train.trackers == ["tensorboard"]
    with pytest.raises(UserError, match="choose some of tensorboard"):
        trackers.check(["tensorbord"])
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        trackers.check(["wandb"])
    assert trackers.flat({"step": 3, "loss": 1.5, "seconds": {"data": 0.5}}) == {"loss": 1.5, "seconds/data": 0.5}
