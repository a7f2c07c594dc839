"""Settings: every shipped choice composes, everything else is refused in one line that helps."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from pipeline.config import GROUPS, Config, choices, compose
from pipeline.errors import UserError
from pipeline.layout import Layout

SHIPPED = [(group, name) for group in GROUPS for name in choices(group)]


@pytest.mark.parametrize(("group", "name"), SHIPPED, ids=[f"{group}={name}" for group, name in SHIPPED])
def test_every_shipped_config_composes(group, name):
    extra = ["engine.address=tcp://host:8786"] if (group, name) == ("engine", "scheduler") else []
    cfg = compose([f"{group}={name}", *extra])
    assert isinstance(getattr(cfg, group), GROUPS[group])
    if "name" in {field.name for field in fields(GROUPS[group])}:
        assert getattr(cfg, group).name == name


def test_every_model_has_its_recipe():
    for model in choices("model"):
        assert compose([f"model={model}"]).train.name == model
    assert compose(["model=tiny", "train=default"]).train.name == "default"


def test_defaults_are_the_embedded_world():
    cfg = compose()
    assert (cfg.data.name, cfg.teacher.name, cfg.model.name, cfg.arm.name) == ("world", "tiny", "tiny", "lavender")
    assert (cfg.seed, cfg.dry_run, cfg.overwrite) == (1, False, False)
    assert compose(["arm=sft"]).arm.lam == 0


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data=nowhere", ["unknown data 'nowhere'", "world"]),
        ("model=/some/where", ["unknown model '/some/where'", "tiny"]),
        ("arm=schema", ["unknown arm 'schema'", "sft"]),
        ("train.step=3", ["train.step", "did you mean train.steps?"]),
        ("trian.steps=3", ["unknown setting 'trian'", "did you mean train?"]),
        ("+train.extra=1", ["unknown setting 'train.extra'"]),
        ("++new=1", ["unknown setting 'new'"]),
        ("~seed", ["cannot remove", "~seed"]),
        ("seed=many", ["seed", "many"]),
        ("seed", ["cannot read 'seed'", "name=value"]),
        ("train.steps.deeper=1", ["train.steps"]),
        ("engine=scheduler", ["engine.address"]),
        ("engine.kind=magic", ["magic", "threads"]),
        ("model.attention=flash_attention_2", ["model.attention 'flash_attention_2'", "sdpa, eager"]),
        ("engine.workers=-1", ["engine.workers"]),
        ("train.method=none", ["train.method", "lora"]),
        ("data.name=../x", ["cannot name a folder"]),
        ("+data.splits={a/b: x.json}", ["'a/b' cannot name a folder"]),
        ("+data.columns={picture: x}", ["data.columns.picture"]),
        ("data.seed=-1", ["give 0 or more"]),
    ],
)
def test_wrong_settings_are_refused_in_one_line(override, says):
    with pytest.raises(UserError) as caught:
        compose([override])
    message = str(caught.value)
    assert "\n" not in message
    for part in says:
        assert part in message


def test_layout_follows_the_names():
    layout = Layout(compose(["shards_dir=s", "runs_dir=r", "data=easy_vqa", "arm=sft", "seed=3"]))
    assert layout.examples_dir("train") == Path("s/easy_vqa/examples/train")
    assert layout.maps_dir == Path("s/easy_vqa/maps/tiny")
    assert layout.run_dir("sft", 3) == Path("r/tiny/easy_vqa/sft-3")


def test_commands_start_without_heavy_imports():
    heavy = ("torch", "transformers", "diffusers", "accelerate", "peft", "zarr", "dask", "pyarrow", "matplotlib", "PIL")
    modules = ["stages.chain", "stages.shard", "stages.precompute", "stages.train", "stages.eval", "stages.report"]
    code = (
        f"import sys, {', '.join(modules)}; from importlib import import_module\n"
        "for module in stages.chain.STATUS.values(): import_module(module)\n"
        "from pipeline.config import compose; compose(['arm=sft'])\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_root_settings_are_documented():
    for field in fields(Config):
        if field.name not in GROUPS and field.name != "align":
            assert f"{field.name}:" in Config.__doc__
