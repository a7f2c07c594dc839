"""Every shipped configuration, composed and run for a few steps on a tiny model of its family by the real command."""

import json
import math
from pathlib import Path

import pytest
from conftest import SMALL
from PIL import Image
from safetensors.torch import load_file

from pipeline.config import choices, compose
from pipeline.errors import UserError
from pipeline.student.load import load_student
from pipeline.train import metrics

QUICK = ("llama32-11b", "minicpm-llama3-v25-full", "openflamingo-4b")  # a family each; the others take minutes
RANDOM = ("model.weights=random", "model.size=tiny")


def model_of(train: str) -> str:
    """The model that settings of training are for: they bear its name, some with the method behind it."""
    return train if train in choices("model") else train.rpartition("-")[0]


def test_every_model_has_settings_of_training_and_these_a_model():
    models, trains = set(choices("model")), set(choices("train")) - {"default"}
    assert {model_of(train) for train in trains} == models
    for train in trains:
        assert compose([f"model={model_of(train)}", f"train={train}"]).train.name == train


def single_questions(folder: Path) -> tuple[str, ...]:
    """Eight pictures with a question each, and the settings that read them."""
    records = []
    for number in range(8):
        Image.new("RGB", (60, 40), (30 * number, 80, 160)).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat colour is it?"}, {"from": "gpt", "value": "a dull blue"}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "train.json").write_text(json.dumps(records))
    return ("data=llava_json", "data.path=train.json", f"shards_dir={folder}/shards")


@pytest.mark.parametrize(
    "train",
    [t if t in QUICK else pytest.param(t, marks=pytest.mark.full) for t in choices("train") if t != "default"],
)
def test_settings_run_on_a_tiny_model(train, small_world, command, monkeypatch, tmp_path, tmp_path_factory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    model = model_of(train)
    few = ("train.steps=3", "train.epochs=0", "train.batch_size=4", "train.checkpoint_every=2", "train.log_every=1")
    # The oracle aligns without maps of a teacher, so that nothing but the student's side is in play.
    chosen = (f"model={model}", f"train={train}", *RANDOM, "arm=oracle")
    if compose([f"train={train}"]).train.method == "full":
        # Rounded to half precision, the sharp attention of untrained weights moves by more than an export may.
        chosen += ("model.dtype=float32",)
    data = SMALL
    if model == "paligemma-3b":  # takes one question, and the world has conversations
        data = single_questions(tmp_path)
        made = command("shard", *data, cwd=tmp_path)
        assert made.returncode == 0, made.stderr
        chosen += ("arm=centre",)
    done = command(
        "train", *data, *chosen, *few, f"runs_dir={tmp_path}", cwd=tmp_path if data != SMALL else small_world
    )
    assert done.returncode == 0, done.stderr[-2000:]
    run = next((tmp_path / f"{model}-random-tiny").glob("*/*-1"))
    lines, evaluated = metrics.read(run), metrics.heldout(run)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(math.isfinite(line["loss"]) and line["ce"] > 0 and line["align"] > 0 for line in lines)
    if train != "tiny":  # the demo's
        few = [line for line in evaluated if line["examples"] > 0 and math.isfinite(line["loss"])]
        assert [line["step"] for line in few] == ([] if model == "paligemma-3b" else [0, 3])
    made = (
        "model/model.safetensors" if train.endswith("-full") or train == "tiny" else "adapter/adapter_model.safetensors"
    )
    moved = [name for name, value in load_file(run / made).items() if "lora_B" in name and value.abs().max() > 0]
    assert moved or made.startswith("model/"), "adapters start at zero and must have been trained"


def test_random_weights_are_the_same_in_every_load(monkeypatch, tmp_path):
    cfg = compose(["model=qwen25-vl-7b", *RANDOM]).model
    found = []
    for cache in ("a", "b"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
        found.append(load_student(cfg).model.state_dict())
    assert found[0].keys() == found[1].keys()
    assert all((found[0][name] == found[1][name]).all() for name in found[0])


def test_what_has_no_random_weights_is_said():
    with pytest.raises(UserError, match=r"model\.weights=random"):
        compose(["model=llama32-11b", "model.size=tiny"])
    with pytest.raises(UserError, match="no published shapes of 'gemma3-4b'"):
        load_student(compose(["model=gemma3-4b", "model.weights=random"]).model)
    with pytest.raises(UserError, match=r"no tiny model for model\.family=qwen2_vl"):
        load_student(compose(["model=qwen25-vl-7b", "model.family=qwen2_vl", *RANDOM]).model)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama32-11b", 10_670_220_835), ("minicpm-llama3-v25", 8_537_092_336)],
)
def test_published_shapes_have_as_many_parameters_as_the_published_models(name, parameters, monkeypatch, tmp_path):
    import torch

    from pipeline.student.load import skeleton

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with torch.device("meta"):
        model = skeleton(compose([f"model={name}", "model.weights=random"]).model).model
    assert sum(p.numel() for p in model.parameters()) == parameters
