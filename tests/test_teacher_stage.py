"""Precompute: same bytes whatever the workers and however often killed, receipts, and one line for every mistake."""

import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from teacher_models import save_sd

from pipeline import receipts
from pipeline.archive import stage as shards
from pipeline.archive.read import Archive
from pipeline.config import compose
from pipeline.errors import UserError
from pipeline.examples import decode
from pipeline.mapstore.read import MapStore
from pipeline.teacher import extract, job, stage, status
from pipeline.teacher.config import TeacherConfig
from pipeline.teacher.extract import load_teacher
from pipeline.teacher.noise import image_seed
from pipeline.teacher.weights import digest
from pipeline.teacher.windows import teacher_texts

EXAMPLES = 14
SHARD = 5


def png(number: int) -> bytes:
    rng = np.random.default_rng(number)
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (24 + number, 40, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Conversations with one or two answers; number 3 repeats number 2, number 7 has no image."""
    folder = tmp_path_factory.mktemp("source")
    records = []
    for number in range(EXAMPLES):
        picture = 2 if number == 3 else number
        turns = [{"from": "human", "value": "<image>\nWhere is it?"},
                 {"from": "gpt", "value": f"The red circle number {picture} is there."}]  # fmt: skip
        if number % 2 and number != 3:
            turns += [
                {"from": "human", "value": "Sure?"},
                {"from": "gpt", "value": "Yes. " * (60 if number == 5 else 1)},
            ]
        record = {"id": str(number), "image": f"{picture}.png", "conversations": turns}
        if number == 7:
            del record["image"]
            turns[0]["value"] = "Where is it?"
        records.append(record)
        (folder / f"{number}.png").write_bytes(png(number))
    (folder / "train.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    return save_sd(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def overrides(source, weights, tmp_path_factory):
    """Settings of a run in a folder of its own, with the examples already there."""
    made = tmp_path_factory.mktemp("made") / "shards"

    def build(folder: Path, *more: str) -> list[str]:
        base = ["data=llava_json", f"data.path={source / 'train.json'}", f"data.shard_size={SHARD}",
                f"teacher.path={weights}", "teacher.batch_size=4", "teacher.phrases=phrase"]  # fmt: skip
        if not made.exists():
            shards.shard(compose([*base, f"shards_dir={made}"]))
        if not folder.exists():
            shutil.copytree(made, folder)
        return [*base, f"shards_dir={folder}", *more]

    return build


@pytest.fixture(scope="module")
def done(overrides, tmp_path_factory):
    """The maps of one worker that was never disturbed."""
    folder = tmp_path_factory.mktemp("done") / "shards"
    cfg = compose(overrides(folder, "engine.workers=1"))
    return cfg, stage.precompute(cfg), tree(folder)


def tree(folder: Path) -> dict[str, str]:
    """sha256 of every file of the maps that is not a receipt (those hold times)."""
    maps = folder / "llava_json" / "maps"
    return {
        str(path.relative_to(maps)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(maps.rglob("*"))
        if path.is_file() and ".zarr" in str(path)
    }


def digests(folder: Path) -> list[str]:
    return [receipts.load(path).digest for path in sorted(folder.rglob("maps/**/0*.json")) if ".zarr" not in str(path)]


def test_every_word_of_every_example_is_there(done):
    cfg, result, _ = done
    archive = Archive(Path(cfg.shards_dir) / "llava_json/examples/train")
    store = MapStore(Path(cfg.shards_dir) / "llava_json/maps/tiny/train")
    assert result.written == 3
    assert result.counts["examples"] == len(archive) == EXAMPLES
    assert result.counts["without_words"] == 1
    for example in archive:
        maps = store.get(example.key)
        assert maps.words == (example.words() if example.image else [])
        assert not maps.status.any()
        assert (maps.range[:, 1] > maps.range[:, 0]).all()
    assert result.counts["words"] == result.counts["status"]["ok"] == sum(len(e.words()) for e in archive if e.image)


def test_stored_maps_are_those_of_extract(done):
    """One example by itself, outside of the stage and its batches."""
    cfg, _, _ = done
    archive = Archive(Path(cfg.shards_dir) / "llava_json/examples/train")
    store = MapStore(Path(cfg.shards_dir) / "llava_json/maps/tiny/train")
    teacher = load_teacher(cfg.teacher, "cpu")
    example = archive[1]
    text = teacher_texts(example, phrases="phrase")[0]
    found = teacher.extract([decode(example.image)], [text], [image_seed(0, example.image)])[0]
    stored = store.get(example.key)
    raw = {word: stored.raw()[row] for row, word in enumerate(stored.words)}
    span = stored.range[:, 1] - stored.range[:, 0]
    for word, map_YX in zip(found.words, found.maps, strict=True):
        np.testing.assert_allclose(raw[word], map_YX, atol=span.max() / 255)


def test_identical_pairs_are_computed_once(done, monkeypatch):
    cfg, _, _ = done
    store = MapStore(Path(cfg.shards_dir) / "llava_json/maps/tiny/train")
    np.testing.assert_array_equal(store.get("0000000002").maps, store.get("0000000003").maps)
    archive = Archive(Path(cfg.shards_dir) / "llava_json/examples/train")
    teacher = load_teacher(replace(cfg.teacher, timesteps=[10, 20], draws=2), "cpu")
    computed, forwards = [], []
    monkeypatch.setattr(teacher.adapter, "condition", lambda texts, own=teacher.adapter.condition: (
        computed.append(list(texts)), own(texts))[1])  # fmt: skip
    monkeypatch.setattr(teacher.adapter, "forward", lambda *args, own=teacher.adapter.forward: (
        forwards.append(args[1]), own(*args)))  # fmt: skip
    example = archive[2]
    items = [extract.Item(decode(example.image), "same", 1, text) for text in teacher_texts(example) for _ in range(9)]
    assert len(list(teacher.read(items))) == 9
    assert len(computed) == 1  # nor is the text encoded again for each forward
    assert forwards == [10, 20, 10, 20]


def test_two_workers_write_the_same_bytes(done, overrides, tmp_path):
    cfg = compose(overrides(tmp_path / "two", "engine.workers=2"))
    stage.precompute(cfg)
    assert tree(tmp_path / "two") == done[2]
    assert digests(tmp_path / "two") == digests(Path(done[0].shards_dir))


@pytest.mark.full
def test_two_processes_write_the_same_bytes(done, overrides, tmp_path):
    cfg = compose(overrides(tmp_path / "two", "engine=processes", "engine.workers=2"))
    stage.precompute(cfg)
    assert tree(tmp_path / "two") == done[2]


def test_a_second_run_does_nothing_and_says_so(done, capsys, monkeypatch):
    cfg, _, before = done
    monkeypatch.setattr(job, "load_teacher", lambda *_: pytest.fail("nothing is to be loaded"))
    assert status.up_to_date(cfg)
    result = stage.precompute(cfg)
    assert (result.written, result.reused) == (0, 3)
    assert "up to date" in capsys.readouterr().out
    assert tree(Path(cfg.shards_dir)) == before


def test_killed_and_resumed_gives_the_same_bytes(done, overrides, tmp_path):
    """SIGKILL after the first shard has its receipt; leftovers of the second are cleared away."""
    folder = tmp_path / "killed"
    arguments = overrides(folder, "engine.workers=1")
    code = (
        "import sys, time; from pipeline.teacher import job, stage; from pipeline.config import compose\n"
        "own, calls = job.write_shard, []\n"
        "def slow(path, *args, **kwargs):\n"
        "    calls.append(path)\n"
        "    if len(calls) > 1:\n"
        "        (path.parent / ('.' + path.name + '.1.tmp')).mkdir()\n"
        "        time.sleep(60)\n"
        "    own(path, *args, **kwargs)\n"
        "job.write_shard = slow\n"
        "stage.precompute(compose(sys.argv[1:]))"
    )
    worker = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=Path(stage.__file__).parents[2], stdout=subprocess.DEVNULL
    )
    maps = folder / "llava_json/maps/tiny/train"
    end = time.monotonic() + 120
    while not list(maps.glob(".*.1.tmp")) and time.monotonic() < end and worker.poll() is None:
        time.sleep(0.05)
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    assert len(list(maps.glob("0*.json"))) == 1
    result = stage.precompute(compose(arguments))
    assert (result.written, result.reused) == (2, 1)
    assert tree(folder) == done[2]
    assert not list(maps.glob(".*.tmp"))


def test_maps_of_an_earlier_division_into_shards_are_removed(done, overrides, tmp_path):
    """With the receipts goes what they vouch for: nobody reads it any more."""
    folder = tmp_path / "earlier"
    shutil.copytree(done[0].shards_dir, folder)
    maps = folder / "llava_json/maps/tiny/train"
    (maps / "manifest.json").unlink()
    shutil.copytree(maps / "00001.zarr", maps / "00007.zarr")
    shutil.copy(maps / "00001.json", maps / "00007.json")
    assert stage.precompute(compose(overrides(folder, "engine.workers=1"))).written == 0
    assert not list(maps.glob("00007*"))
    assert tree(folder) == done[2]


def test_other_settings_are_refused_by_name(done):
    cfg, _, before = done
    other = compose_like(cfg, "teacher.timesteps=[300]")
    for call in (status.up_to_date, stage.precompute):
        with pytest.raises(UserError, match=r"timesteps.*300"):
            call(other)
    assert tree(Path(cfg.shards_dir)) == before


def compose_like(cfg, *more: str):
    return compose(["data=llava_json", f"data.path={cfg.data.path}", f"data.shard_size={SHARD}",
                    f"teacher.path={cfg.teacher.path}", "teacher.batch_size=4", "teacher.phrases=phrase",
                    f"shards_dir={cfg.shards_dir}", *more])  # fmt: skip


def test_overwrite_computes_anew(done, overrides, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(done[0].shards_dir, folder)
    cfg = compose(overrides(folder, "overwrite=true", "teacher.timesteps=[300]"))
    assert not status.up_to_date(cfg)
    assert stage.precompute(cfg).written == 3
    assert status.up_to_date(compose(overrides(folder, "teacher.timesteps=[300]")))
    assert tree(folder) != done[2]


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(overrides, tmp_path, capsys, weights, monkeypatch):
    """With a model as the hub's client keeps it, found without a network."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    home = tmp_path / "hub/models--owner--tiny-sd"
    shutil.copytree(weights, home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs/main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "dry"
    more = ["teacher.path=owner/tiny-sd", "teacher.timesteps=[10,20]", "teacher.draws=2", "dry_run=true"]
    stage.precompute(compose(overrides(folder, *more)))
    said = capsys.readouterr().out
    for wanted in (
        "3 of 3 shards",
        r"about \d+ words, \d+ maps",
        "14 examples",
        "owner/tiny-sd revision 0123456789ab, float32 on cpu",
        "4 forwards per window of text",
        r"at most \d+ MB",
        r"about \d+ windows in \d+ batch(es)? on \d workers?, [\d.]+ minutes",
    ):
        assert re.search(wanted, said), (wanted, said)
    assert not list((folder / "llava_json/maps").rglob("*.zarr"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line(overrides, tmp_path, weights):
    with pytest.raises(UserError, match="no GPU on this machine"):
        stage.precompute(compose(overrides(tmp_path / "gpu", "teacher.device=cuda", "dry_run=true")))
    with pytest.raises(UserError, match="no GPU on this machine"):
        load_teacher(TeacherConfig(name="x", path=weights), "cuda:1")


def test_long_texts_and_tokens_are_in_the_preflight(done, overrides, tmp_path, capsys):
    """With `unit=token` there are more maps than words. The second shard has six texts, one of them of 60 sentences."""
    stage.precompute(compose(overrides(tmp_path / "token", "teacher.unit=token", "dry_run=true")))
    words, maps = re.search(r"about (\d+) words, (\d+) maps", capsys.readouterr().out).groups()
    assert int(maps) > int(words)
    shutil.copytree(done[0].shards_dir, tmp_path / "second")
    folder = tmp_path / "second/llava_json/maps/tiny/train"
    for name in ("manifest.json", "00001.json"):
        (folder / name).unlink()
    stage.precompute(compose(overrides(tmp_path / "second", "dry_run=true")))
    said = capsys.readouterr().out
    windows, batches = map(int, re.search(r"about (\d+) windows in (\d+) batches", said).groups())
    assert "1 of 3 shards to do, 5 examples" in said
    assert windows > 6
    assert batches == -(-windows // 4)


def test_missing_examples_and_splits_are_named(overrides, tmp_path):
    empty = overrides(tmp_path / "x", "data.name=empty")
    with pytest.raises(UserError, match="make shard"):
        stage.precompute(compose(empty))
    with pytest.raises(UserError, match="no split 'val'"):
        stage.precompute(compose(overrides(tmp_path / "y", "teacher.splits=[val]")))


def test_a_map_that_is_not_finite_names_its_example(overrides, tmp_path, weights):
    broken = tmp_path / "broken"
    shutil.copytree(weights, broken)
    from safetensors.torch import load_file, save_file

    file = broken / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["conv_in.bias"][0] = float("nan")
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"not finite for example 0000\d0000\d: the weights"):
        stage.precompute(compose(overrides(tmp_path / "nan", f"teacher.path={broken}", "engine.workers=1")))


def test_a_broken_image_is_counted_and_too_many_stop_the_stage(done, overrides, tmp_path, monkeypatch):
    own = job.decode

    def fails(data, max_pixels):
        if data == png(0):
            raise job.ImageError("truncated")
        return own(data, max_pixels)

    monkeypatch.setattr(job, "decode", fails)
    with pytest.raises(UserError, match=r"1 of 14 images of split train failed.*0000000000: truncated"):
        stage.precompute(compose(overrides(tmp_path / "bad")))
    cfg = compose(overrides(tmp_path / "bad", "data.max_failed=0.1"))
    result = stage.precompute(cfg)
    assert result.counts["failed"] == 1
    assert result.counts["status"]["failed"] == 10
    store = MapStore(tmp_path / "bad/llava_json/maps/tiny/train")
    assert set(store.get("0000000000").status) == {3}


def test_out_of_memory_halves_the_batch_and_the_receipt_says_so(done, overrides, tmp_path, monkeypatch):
    own = extract.Teacher._compute

    def limited(self, queue, size, known, latents, batch):
        if batch > 2:
            raise torch.OutOfMemoryError("no memory")
        return own(self, queue, size, known, latents, batch)

    monkeypatch.setattr(extract.Teacher, "_compute", limited)
    cfg = compose(overrides(tmp_path / "oom", "engine.workers=1"))
    assert stage.precompute(cfg).counts["batch_size"] == 2
    stores = [MapStore(Path(c.shards_dir) / "llava_json/maps/tiny/train") for c in (cfg, done[0])]
    for key in stores[0].keys:
        small, large = (store.get(key).maps.astype(int) for store in stores)
        assert np.abs(small - large).max(initial=0) <= 1


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_what_a_full_memory_says(error, full):
    assert job.out_of_memory(error) is full


def test_images_are_decoded_ahead_of_a_gpu(done, monkeypatch):
    """While the first example is held, threads have others ready; what comes out is the same, in the same order."""
    cfg, _, _ = done
    archive = Archive(Path(cfg.shards_dir) / "llava_json/examples/train")
    teacher = load_teacher(cfg.teacher, "cpu")
    jobs = [job.Job(archive, 0, Path(), cfg.teacher, device, {}, {}, 10**6) for device in ("cpu", "cuda")]
    plain = list(job._decoded(jobs[0], teacher))
    own, decoded = job.decode, []
    monkeypatch.setattr(job, "decode", lambda *args: (own(*args), decoded.append(1))[0])
    ahead = job._decoded(jobs[1], teacher)
    found = [next(ahead)]
    end = time.monotonic() + 20
    while len(decoded) < SHARD and time.monotonic() < end:
        time.sleep(0.01)
    assert len(decoded) == SHARD
    found += ahead
    assert [example.key for example, _, _ in found] == [example.key for example, _, _ in plain]
    assert all(torch.equal(a[1], b[1]) for a, b in zip(found, plain, strict=True))


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "owner/missing-model",
            r"'owner/missing-model' are not on this machine: run `hf download owner/missing-model`",
        ),
        ("/no/such/folder", "no such directory"),
        ("bundled:nothing", "no such model"),
    ],
)
def test_missing_weights_are_one_line(path, message, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=message) as caught:
        load_teacher(TeacherConfig(name="x", path=path), "cpu")
    assert "\n" not in str(caught.value)


def test_a_download_that_fails_is_one_line(monkeypatch, tmp_path):
    """Not reached here: the client then says the same as if it had been told not to try."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    def refuses(*args, local_files_only, **kwargs):
        assert not local_files_only
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuses)
    with pytest.raises(UserError, match="'a/b' are not on this machine, and the hub cannot be reached") as caught:
        load_teacher(TeacherConfig(name="x", path="a/b", local_files_only=False), "cpu")
    assert "\n" not in str(caught.value)
    assert "local_files_only=false" not in str(caught.value)


def test_a_directory_without_weights_is_one_line(weights, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(weights, copy)
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="unet has no weights") as caught:
        load_teacher(TeacherConfig(name="x", path=str(copy)), "cpu")
    assert "\n" not in str(caught.value)
    (copy / "model_index.json").unlink()
    with pytest.raises(UserError, match=r"has no model_index.json"):
        load_teacher(TeacherConfig(name="x", path=str(copy)), "cpu")


def test_the_digest_is_that_of_the_content(weights, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(weights, copy)
    before = digest(Path(weights))
    assert digest(copy) == before
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert digest(copy) != before


def test_nothing_of_the_decoder_or_of_the_rest_of_the_unet_stays(weights):
    teacher = load_teacher(TeacherConfig(name="x", path=weights, layers="^down"), "cpu")
    assert teacher.adapter.vae.decoder is None
    assert len(teacher.adapter.unet.up_blocks) == 0
    assert not any(parameter.requires_grad for parameter in teacher.adapter.unet.parameters())


def test_a_stage_that_is_up_to_date_imports_nothing_heavy(done):
    code = (
        "import sys; from pipeline.config import compose; from pipeline.teacher.stage import precompute\n"
        "assert precompute(compose(sys.argv[1:])).written == 0\n"
        "heavy = {'torch', 'transformers', 'diffusers', 'zarr', 'dask', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    cfg = done[0]
    arguments = ["data=llava_json", f"data.path={cfg.data.path}", f"data.shard_size={SHARD}",
                 f"teacher.path={cfg.teacher.path}", "teacher.batch_size=4", "teacher.phrases=phrase",
                 f"shards_dir={cfg.shards_dir}"]  # fmt: skip
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, cwd=Path(stage.__file__).parents[2])


def test_maps_are_of_what_the_models_see(weights, tmp_path, monkeypatch):
    """An image that says it lies on its side, and others in odd forms, have the maps of the plain upright image."""
    rng = np.random.default_rng(0)
    upright = Image.fromarray(rng.integers(0, 255, (24, 40, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter clockwise
    upright.save(tmp_path / "0.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "1.png", exif=exif)
    clear = upright.convert("RGBA")
    clear.putalpha(255)
    clear.save(tmp_path / "2.png")
    upright.save(tmp_path / "3.png", format="WEBP", lossless=True)
    upright.save(tmp_path / "4.png", save_all=True, append_images=[upright.transpose(Image.Transpose.ROTATE_180)])
    turns = [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "The red circle is there."}]
    records = [{"id": str(n), "image": f"{n}.png", "conversations": turns} for n in range(5)]
    (tmp_path / "list.json").write_text(json.dumps(records))
    monkeypatch.setattr(job, "image_seed", lambda seed, image: seed)  # otherwise each file has noise of its own
    cfg = compose(["data=llava_json", f"data.path={tmp_path}/list.json", f"shards_dir={tmp_path}/s", "engine.workers=1",
                   f"teacher.path={weights}", "teacher.batch_size=1"])  # fmt: skip
    shards.shard(cfg)
    stage.precompute(cfg)
    folder = tmp_path / "s/llava_json"
    keys = Archive(folder / "examples/train").keys
    store = MapStore(folder / f"maps/{cfg.teacher.name}/train")
    plain = store.get(keys[0])
    assert plain.maps.any()
    for key in keys[1:]:
        assert np.array_equal(store.get(key).maps, plain.maps), key
