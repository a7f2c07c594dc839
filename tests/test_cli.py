"""A user's mistakes, through the real commands: one line on stderr that says what to do, exit code 2, no traceback."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import SMALL

STAGES = ("shard", "precompute", "train", "eval", "report")
BUNDLED = Path(__file__).parent.parent / "pipeline/world/models"
SHARD = Path("shards/world/examples/train/00001.tar")


def assert_refused(result: subprocess.CompletedProcess, *says: str) -> None:
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for part in says:
        assert part in lines[0]


@pytest.mark.parametrize("stage", STAGES)
def test_help_says_what_a_stage_reads_and_writes(command, stage):
    result = command(stage, "--help")
    assert result.returncode == 0
    first = result.stdout.splitlines()[0]
    assert first.startswith("Reads ")
    assert "; writes " in first
    assert "data=" in result.stdout


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["shard", "data=nowhere"], ["unknown data 'nowhere'", "easy_vqa", "world"]),
        (["train", "model=gpt5"], ["unknown model 'gpt5'", "llama32-11b", "tiny"]),
        (["precompute", "teacher=nope"], ["unknown teacher 'nope'", "tiny"]),
        (["eval", "train.stepz=3"], ["unknown setting 'train.stepz'", "train.steps"]),
        (["chain", "eval", "arm=nope"], ["unknown arm 'nope'", "sft"]),
        (["chain", "demo", "--arms", "sft,nope"], ["unknown arm 'nope'", "lavender"]),
        (["chain", "demo", "--seeds", "none"], ["SEEDS=none"]),
        (["chain", "demo", "--arms", ","], ["ARMS=,"]),
        (["chain", "everything"], ["everything", "precompute"]),
        (["shard", "shards_dir=/dev/null/x"], ["/dev/null"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value[0], str) and value[0] in (*STAGES, "chain") else "",
)
def test_wrong_names_are_refused(command, tmp_path, argv, says):
    assert_refused(command(*argv, cwd=tmp_path), *says)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("entry", ["shard", "chain"])
def test_missing_data_is_refused(command, tmp_path, entry):
    target = ["shard"] if entry == "chain" else []
    missing = tmp_path / "nothing" / "train.json"
    assert_refused(command(entry, *target, "data=llava_json", f"data.path={missing}", cwd=tmp_path), str(missing))
    assert_refused(command(entry, *target, "data=llava_json", cwd=tmp_path), "data.path")
    assert list(tmp_path.iterdir()) == []


def test_stages_say_which_stage_is_missing_before_them(command, tmp_path):
    assert_refused(command("train", "arm=sft", cwd=tmp_path), "shards/world/examples/train")
    assert_refused(command("precompute", cwd=tmp_path), "shards/world/examples")
    assert_refused(command("report", cwd=tmp_path), "runs/tiny/world/eval")


def test_a_model_without_weights_is_refused(command, small_world, tmp_path):
    work = copied(small_world, tmp_path)
    model = tmp_path / "model"
    shutil.copytree(BUNDLED / "student", model, ignore=shutil.ignore_patterns("*.safetensors"))
    assert_refused(command("train", *SMALL, "arm=sft", f"model.path={model}", cwd=work), str(model))
    shutil.copytree(BUNDLED / "student", model, dirs_exist_ok=True)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1024])
    assert_refused(command("train", *SMALL, "arm=sft", f"model.path={model}", cwd=work), str(model))
    nothing = tmp_path / "nothing"
    assert_refused(command("train", *SMALL, "arm=sft", f"model.path={nothing}", cwd=work), str(nothing))
    assert_refused(command("precompute", *SMALL, f"teacher.path={nothing}", cwd=work), str(nothing))
    nothing.mkdir()
    assert_refused(command("train", *SMALL, "arm=sft", f"model.path={nothing}", cwd=work), str(nothing), "config.json")


def test_models_are_checked_before_the_first_stage_runs(command, tmp_path):
    model, teacher = tmp_path / "model", tmp_path / "teacher"
    without = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(BUNDLED / "student", model, ignore=without)
    shutil.copytree(BUNDLED / "teacher", teacher, ignore=without)
    assert_refused(command("chain", "demo", f"model.path={model}", cwd=tmp_path), str(model), "no weights")
    assert_refused(command("chain", "demo", f"teacher.path={teacher}", cwd=tmp_path), "no weights", "*.safetensors")
    assert_refused(command("chain", "eval", "model=llama32-11b", cwd=tmp_path), "hf download", "Llama-3.2-11B")
    assert not (tmp_path / "shards").exists()


def test_a_missing_image_folder_is_refused(command, tmp_path):
    rows = [{"id": "1", "image": "1.png", "conversations": [{"from": "human", "value": "Who?"}]}]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    nothing = tmp_path / "nothing"
    refused = command("shard", "data=llava_json", "data.path=train.json", f"data.images={nothing}", cwd=tmp_path)
    assert_refused(refused, str(nothing))


def test_a_teacher_without_weights_is_refused(command, small_world, tmp_path):
    work, teacher = copied(small_world, tmp_path), tmp_path / "teacher"
    shutil.copytree(BUNDLED / "teacher", teacher)
    weights = next((teacher / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1024])
    again = ["precompute", *SMALL, f"teacher.path={teacher}", "overwrite=true"]
    assert_refused(command(*again, cwd=work), str(teacher / "unet"))
    weights.unlink()
    assert_refused(command(*again, cwd=work), str(teacher / "unet"), "no weights")
    (teacher / "model_index.json").write_text("{")
    assert_refused(command(*again, cwd=work), "model_index.json")


def test_a_truncated_shard_is_refused(command, small_world, tmp_path):
    work = copied(small_world, tmp_path)
    shard = work / SHARD
    shard.write_bytes(shard.read_bytes()[:-1024])
    assert_refused(command("train", *SMALL, "arm=sft", cwd=work), str(SHARD), "run the stage again")


def test_a_changed_byte_is_refused_and_the_chain_repairs_it(command, small_world, tmp_path):
    work = copied(small_world, tmp_path)
    shard = work / SHARD
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert_refused(command("train", *SMALL, "arm=sft", cwd=work), str(SHARD))
    assert command("chain", "shard", *SMALL, cwd=work).returncode == 0
    assert shard.read_bytes() == (small_world / SHARD).read_bytes()
    assert command("chain", "shard", *SMALL, cwd=work).stdout == "shard: up to date\n"


def test_other_settings_are_refused_by_name(command, small_world, tmp_path):
    work = copied(small_world, tmp_path)
    changed = [*SMALL, "data.shard_size=9"]
    assert_refused(command("chain", "shard", *changed, cwd=work), "shard_size", "10", "9", "overwrite=true")
    assert command("chain", "shard", *changed, "overwrite=true", cwd=work).returncode == 0
    assert command("chain", "shard", *changed, cwd=work).stdout == "shard: up to date\n"


def copied(world: Path, folder: Path) -> Path:
    """The small world again, with its file times, for a test that changes it."""
    return Path(shutil.copytree(world, folder / "work"))
