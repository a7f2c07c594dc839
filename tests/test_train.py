"""Training: what the arms pull towards, exact resume, exact batching, and what a user's mistakes print."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from pipeline import receipts
from pipeline.archive import Archive
from pipeline.archive.stage import shard
from pipeline.config import Config, compose
from pipeline.errors import UserError
from pipeline.examples import Example, Turn
from pipeline.layout import Layout
from pipeline.mapstore import MapStore
from pipeline.mapstore.schema import ExampleMaps
from pipeline.mapstore.write import write_shard
from pipeline.student.batch import IGNORED, EncodeError
from pipeline.student.load import load_student
from pipeline.student.mllama import Mllama
from pipeline.train import card, metrics, status
from pipeline.train.data import Batches
from pipeline.train.export import ExportError
from pipeline.train.order import train_plan
from pipeline.train.stage import train
from pipeline.train.targets import open_targets
from pipeline.world.student import build_mllama

SMALL = {"hidden": 32, "layers": 3, "cross": (1,), "vision_hidden": 32, "vision_layers": 1, "vocabulary": 400}


def settings(root: Path, *more: str) -> Config:
    return compose(
        [
            f"shards_dir={root}/shards",
            f"runs_dir={root}/runs",
            f"model.path={root}/student",
            "data.sizes={train: 12, val: 5, test: 5, ood_pairs: 5, ood_count: 5, ood_background: 5}",
            "data.shard_size=5",
            "engine.workers=1",
            "train.steps=6",
            "train.batch_size=4",
            "train.micro_batch=4",
            "train.checkpoint_every=2",
            "train.log_every=1",
            "train.freeze=[vision_model]",
            *more,
        ]
    )


def maps_of(archive: Archive, folder: Path) -> None:
    """Random maps of every word, a function of key and place."""
    folder.mkdir(parents=True)
    made = []
    for number, tar in enumerate(archive.shards):
        rows = []
        for example in archive.shard(number):
            words = example.words()
            count = len(words)
            maps = np.random.default_rng(int(example.key)).integers(0, 256, (count, 32, 32), dtype=np.uint8)
            span = np.tile(np.float32([0, 1]), (count, 1))
            rows.append(ExampleMaps(example.key, words, maps, span, np.zeros(count, np.uint8)))
        group = folder / f"{tar.stem}.zarr"
        write_shard(group, rows)
        receipts.write(group.with_suffix(".json"), stage="precompute", settings={}, files=[group], counts={"n": 1})
        made.append(group.with_suffix(".json"))
    receipts.write(folder / "manifest.json", stage="precompute", settings={}, children=made)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Shards, a random student, and maps that are a fixed function of key and word."""
    root = tmp_path_factory.mktemp("train")
    cfg = settings(root)
    shard(cfg)
    archive = Archive(Layout(cfg).examples_dir("train"))
    build_mllama(root / "student", [t.text for example in archive for t in example.turns], **SMALL)
    for split in ("train", "val"):
        maps_of(Archive(Layout(cfg).examples_dir(split)), Layout(cfg).maps_split_dir(split))
    return root


def weights(cfg: Config) -> dict[str, torch.Tensor]:
    run = status.run_dir(cfg)
    return load_file(run / "model" / "model.safetensors") | load_file(run / "aligner.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(cfg: Config) -> list[tuple]:
    return [(row["step"], row["loss"], row["ce"], row["align"]) for row in metrics.read(status.run_dir(cfg))]


@pytest.fixture(scope="module")
def whole(root) -> Config:
    """A finished lavender run."""
    cfg = settings(root, "arm=lavender", f"runs_dir={root}/whole")
    train(cfg)
    return cfg


def test_a_run_changes_the_weights_and_says_up_to_date_afterwards(root, whole, capsys):
    assert status.up_to_date(whole)
    start = load_file(root / "student" / "model.safetensors")
    moved = [name for name, tensor in start.items() if not torch.equal(tensor, weights(whole)[name])]
    assert moved
    assert not [name for name in moved if "vision_model" in name], "frozen by the settings"
    assert len(losses(whole)) == 6
    assert all(row[3] > 0 for row in losses(whole))
    capsys.readouterr()
    train(whole)
    assert "up to date" in capsys.readouterr().out


def test_micro_batches_do_not_change_the_run(root, whole):
    cfg = settings(root, "arm=lavender", f"runs_dir={root}/micro", "train.micro_batch=1")
    train(cfg)
    split, joint = metrics.read(status.run_dir(cfg)), metrics.read(status.run_dir(whole))
    for name in ("loss", "ce", "align", "grad_norm"):
        assert split[0][name] == pytest.approx(joint[0][name], rel=1e-5), "the same gradient at the same weights"
    # Adam divides by the gradient's own size, so rounding in the smallest ones grows from step to step.
    for a, b in zip(losses(cfg), losses(whole), strict=True):
        assert a == pytest.approx(b, abs=2e-3)


def test_preparing_batches_in_threads_changes_nothing(root, whole):
    cfg = settings(root, "arm=lavender", f"runs_dir={root}/threads", "train.workers=2")
    train(cfg)
    assert same(weights(cfg), weights(whole))


def test_sft_needs_no_maps_and_its_losses_hold_no_alignment(root):
    cfg = settings(root, "arm=sft", f"runs_dir={root}/sft", "teacher.name=absent")
    train(cfg)
    assert all(align == 0 and loss == ce for _, loss, ce, align in losses(cfg))


LORA = ("arm=sft", "train.method=lora", "train.freeze=[]", "train.lr=0.01")


@pytest.fixture(scope="module")
def lora(root) -> Config:
    cfg = settings(root, *LORA, f"runs_dir={root}/lora")
    train(cfg)
    return cfg


def test_lora_exports_an_adapter_that_holds_the_training(root, lora):
    """Loaded as the card says: by transformers and PEFT alone, on the base that the adapter names."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoProcessor

    assert status.up_to_date(lora)
    folder = status.run_dir(lora) / "adapter"
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str((root / "student").resolve())
    adapted = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), folder)
    held = {name: p for name, p in adapted.named_parameters() if "lora_B" in name}
    assert any("vision_model" in name for name in held)
    assert all(p.abs().max() > 0 for name, p in held.items() if "language_model" in name)
    assert AutoProcessor.from_pretrained(folder).tokenizer.is_fast


def test_merged_export_is_a_whole_model_that_computes_the_same(root, lora):
    from pipeline.student.load import load_student
    from pipeline.train.stage import _reload

    cfg = settings(root, *LORA, f"runs_dir={root}/merged", "train.export=merged")
    train(cfg)
    run = status.run_dir(cfg)
    assert not (run / "adapter").exists()
    merged = load_student(replace(cfg.model, path=str(run / "model")))
    assert not [name for name, _ in merged.model.named_parameters() if "lora" in name]
    batch = merged.family.encode(list(Archive(Layout(cfg).examples_dir("train")))[:2])
    adapted = _reload(lora, status.run_dir(lora) / "adapter").eval()
    with torch.no_grad():
        made, expected = (m(**batch.inputs).logits for m in (merged.model.eval(), adapted))
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
    assert (expected - load_student(cfg.model).model(**batch.inputs).logits).abs().max() > 1e-2, (
        "training did something"
    )
    counts = receipts.load(run / status.RECEIPT).counts
    assert counts["reloaded_difference"] <= counts["tolerance"] == 1e-4


def test_changing_the_export_of_a_finished_run_trains_nothing_again(root, lora, capsys):
    cfg = replace(lora, train=replace(lora.train, export="merged"), runs_dir=f"{root}/again")
    shutil.copytree(lora.runs_dir, cfg.runs_dir)
    with pytest.raises(receipts.Stale, match="export"):
        train(cfg)
    train(replace(cfg, overwrite=True))
    assert "going on from step 6" in capsys.readouterr().out
    assert (status.run_dir(cfg) / "model" / "config.json").is_file()


@pytest.fixture
def fresh_accelerator():
    """accelerate holds one precision per process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_weights_trained_in_float32_are_exported_in_the_models_own_precision(root, fresh_accelerator):
    cfg = settings(root, "arm=sft", f"runs_dir={root}/half", "model.dtype=bfloat16", "train.precision=bf16")
    train(cfg)
    run = status.run_dir(cfg)
    stored = load_file(run / "model" / "model.safetensors")
    assert {t.dtype for t in stored.values() if t.is_floating_point()} == {torch.bfloat16}
    counts = receipts.load(run / status.RECEIPT).counts
    assert counts["reloaded_difference"] <= counts["tolerance"]


def test_an_export_that_computes_something_else_is_no_success(root, monkeypatch):
    cfg = settings(root, *LORA, f"runs_dir={root}/wrong")
    monkeypatch.setattr("pipeline.train.stage._reload", lambda cfg, path: load_student(cfg.model).model)
    with pytest.raises(ExportError, match="reloaded logits differ"):
        train(cfg)
    assert not (status.run_dir(cfg) / status.RECEIPT).exists()


def test_the_model_card_tells_data_settings_versions_metrics_and_licence(root, whole):
    base = root / "licensed"
    shutil.copytree(root / "student", base)
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: some-community-licence\n---\n# Base\n")
    cfg = replace(whole, model=replace(whole.model, path=str(base)))
    rows = metrics.read(status.run_dir(whole))
    held = [{"step": 0, "ce": 3.25, "examples": 7}, {"step": 6, "ce": 2.125, "examples": 7}]
    text = card.write(status.run_dir(whole) / "model", cfg, 12, 6, rows, held, 0.0).read_text()
    assert "| 0 | 3.2500 | 7 |\n| 6 | 2.1250 | 7 |" in text
    head, body = text.split("---\n", 2)[1:]
    assert yaml.safe_load(head)["license"] == "some-community-licence"
    assert yaml.safe_load(head)["base_model"] == str(base)
    stated = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert (stated["train"]["lr"], stated["seed"], stated["steps"]) == (cfg.train.lr, cfg.seed, 6)
    assert f"| 6 | {rows[-1]['loss']:.4f} |" in body
    for expected in ("12 examples", "Intended use", f"- torch {torch.__version__}", "some-community-licence"):
        assert expected in body


def test_other_settings_are_refused_with_the_field_that_differs(root, whole):
    changed = replace(whole, train=replace(whole.train, lr=0.5))
    with pytest.raises(receipts.Stale, match="lr"):
        train(changed)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.freeze=[nothing_like_this]", "matches no parameter"),
        ("train.freeze=['.*']", "nothing is left to train"),
    ],
)
def test_mistakes_in_settings_are_one_line(root, override, message):
    with pytest.raises(UserError, match=message):
        train(settings(root, "arm=sft", f"runs_dir={root}/mistakes", override))


@pytest.mark.parametrize(
    "given",
    [
        "train.lr=-1",
        "train.aligner_lr=nan",
        "train.grad_clip=0",
        "train.warmup=2",
        "train.weight_decay=-1",
        "train.betas=[0.9]",
        "train.steps=-5",
        "train.workers=-1",
        "train.max_steps_per_call=-1",
        "train.freeze=['(']",
        "train.unfreeze=[{step: -1, pattern: a}]",
        "train.unfreeze=[{step: 1}]",
        "train.lora.r=0",
        "train.lora.dropout=2",
        "train.hang_timeout=1e12",
    ],
)
def test_numbers_and_patterns_that_make_no_sense_are_refused_before_anything_is_loaded(given):
    with pytest.raises(UserError) as caught:
        compose([given])
    assert given.partition("=")[0] in str(caught.value) and "\n" not in str(caught.value)


def refusing(monkeypatch, keys: list[str]) -> None:
    """The student takes no example of these keys."""
    encode = Mllama.encode_one

    def picky(self, example):
        if example.key in keys:
            raise EncodeError("not to its taste")
        return encode(self, example)

    monkeypatch.setattr(Mllama, "encode_one", picky)


def test_what_is_refused_before_a_stop_is_counted_after_it(root, monkeypatch, capsys):
    """Each example once, of whatever process and call; a line that a kill has torn is none."""
    cfg = settings(root, "arm=sft", f"runs_dir={root}/refusing", "data.max_failed=1.0")
    keys = Archive(Layout(cfg).examples_dir("train")).keys
    refusing(monkeypatch, keys[:2])
    train(replace(cfg, train=replace(cfg.train, max_steps_per_call=4)))
    file = status.run_dir(cfg) / "skipped.jsonl"
    assert {json.loads(line)["key"] for line in file.read_text().splitlines()} == set(keys[:2])
    other = json.dumps({"key": keys[5], "reason": "another process's"}) + "\n"
    file.write_text(file.read_text() + other + other + '{"key": "12')
    train(cfg)
    assert "3 skipped" in capsys.readouterr().out
    assert receipts.load(status.run_dir(cfg) / status.RECEIPT).counts["skipped"] == 3
    written = [json.loads(line)["key"] for line in file.read_text().splitlines()]
    assert sorted(written) == sorted([*keys[:2], keys[5]])


def test_an_export_is_compared_where_the_first_batch_teaches_nothing(root, monkeypatch):
    cfg = settings(root, "arm=sft", f"runs_dir={root}/nothing", "data.max_failed=1.0", "train.steps=2")
    archive = Archive(Layout(cfg).examples_dir("train"))
    refusing(monkeypatch, [archive.keys[number] for number in train_plan(cfg, archive).at(0)])
    train(cfg)
    assert receipts.load(status.run_dir(cfg) / status.RECEIPT).counts["skipped"] == 4


def test_the_logged_loss_is_the_mean_of_what_was_optimised_while_lambda_moves(root):
    each = settings(root, "arm=lavender", f"runs_dir={root}/each", "align.schedule=decay", "align.decay=3")
    train(each)
    rarely = replace(each, runs_dir=f"{root}/rarely", train=replace(each.train, log_every=6))
    train(rarely)
    rows, (row,) = metrics.read(status.run_dir(each)), metrics.read(status.run_dir(rarely))
    assert len({one["lambda"] for one in rows}) == 6
    for name in ("loss", "ce", "align"):
        assert row[name] == pytest.approx(sum(one[name] for one in rows) / 6)


def test_examples_the_student_cannot_take_are_written_down_and_too_many_stop_the_run(root):
    cfg = settings(root, "arm=sft", f"runs_dir={root}/short", "model.max_length=12")
    with pytest.raises(UserError, match="cannot be encoded"):
        train(cfg)
    rows = [json.loads(line) for line in (status.run_dir(cfg) / "skipped.jsonl").read_text().splitlines()]
    assert rows
    assert all(row["key"] and row["reason"] for row in rows)


def test_a_student_that_can_take_no_example_at_all_ends_the_run(root):
    more = ("arm=sft", f"runs_dir={root}/none", "model.max_length=12", "data.max_failed=1.0")
    with pytest.raises(UserError, match=r"can take none of the 12 examples: see .*skipped\.jsonl"):
        train(settings(root, *more))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_process_whose_examples_are_all_refused_keeps_up_with_a_batch_that_teaches_nothing(root, tmp_path, ranks):
    cfg = settings(root)
    archive = Archive(Layout(cfg).examples_dir("train"))
    family, refused = load_student(cfg.model).family, set(archive.keys[4:])
    encode = family.encode_one

    def picky(example):
        if example.key in refused:
            raise EncodeError("not to its taste")
        return encode(example)

    family.encode_one = picky
    plan = SimpleNamespace(batch_size=4, at=lambda step: list(range(4 * step, 4 * step + 4)))
    given = {"micro_batch": 1, "ranks": ranks, "skipped_file": tmp_path / "s", "max_failed": 1.0}
    batches = Batches(archive, plan, family, None, rank=ranks - 1, **given)
    assert [b.keys for b in batches.at(0).batches] == [[key] for key in archive.keys[4 - 4 // ranks : 4]]
    share = batches.at(1)
    assert share.skipped == 4 // ranks
    assert len(share.batches) == (1 if ranks == 1 else 2)
    for batch in share.batches:
        assert (batch.labels == IGNORED).all() and not len(batch.words) and batch.keys == archive.keys[:1]


def test_too_many_refused_are_counted_over_all_processes(root, tmp_path, monkeypatch):
    cfg = settings(root)
    archive = Archive(Layout(cfg).examples_dir("train"))
    refusing(monkeypatch, [archive.keys[0], *archive.keys[2:4]])
    plan = SimpleNamespace(batch_size=4, at=lambda step: list(range(4 * step, 4 * step + 4)))
    given = {"micro_batch": 1, "ranks": 2, "skipped_file": tmp_path / "skipped", "max_failed": 0.2}  # two of twelve
    first, second = (Batches(archive, plan, load_student(cfg.model).family, None, rank=n, **given) for n in range(2))
    assert first.at(0).skipped == 1
    with pytest.raises(UserError, match="3 of 12 examples cannot be encoded"):
        second.at(0)


# --- targets --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def opened(root) -> tuple[Archive, MapStore]:
    layout = Layout(settings(root))
    return Archive(layout.examples_dir("train")), MapStore(layout.maps_split_dir("train"))


def test_teacher_targets_are_the_words_own_maps(opened):
    archive, maps = opened
    example = archive[3]
    words = example.words(("assistant",))
    found, valid = open_targets("teacher", archive, maps, seed=1)(3, example, words)
    stored = maps.get(example.key)
    for word, target in zip(words, found, strict=True):
        row = [tuple(w) for w in stored.words].index(tuple(word))
        np.testing.assert_array_equal(target, stored.maps[row].astype(np.float32) / 255)
    assert valid.all()


def test_maps_of_finer_spans_are_put_together_for_their_word(opened):
    """A store by the teacher's tokens: the mean of the raw maps of all spans that share a character with the word."""
    archive, _ = opened
    example = archive[3]
    first, second, third = [word for word in example.words() if word.turn == 0][:3]
    middle = (first.start + first.end) // 2
    spans = [
        first._replace(end=middle),
        first._replace(start=middle),
        second,
        third._replace(start=third.start + 1),
        first._replace(turn=first.turn + 7),
    ]
    rng = np.random.default_rng(0)
    maps = rng.integers(0, 256, (5, 32, 32), dtype=np.uint8)
    span = np.float32([[0, 1], [2, 6], [0, 3], [1, 2], [0, 9]])
    stored = ExampleMaps(example.key, spans, maps, span, np.uint8([0, 0, 0, 1, 0]))
    teacher = open_targets("teacher", archive, SimpleNamespace(get=lambda key: stored), seed=1)
    found, valid = teacher(3, example, [first, second, third])
    assert valid.tolist() == [True, True, False], "the third word's only part has no map"
    mean = (maps[0] / 255 + 2 + maps[1] / 255 * 4) / 2
    np.testing.assert_allclose(found[0], (mean - mean.min()) / (mean.max() - mean.min()), atol=1e-5)
    np.testing.assert_array_equal(found[1], maps[2].astype(np.float32) / 255)


def test_shuffled_targets_come_from_one_other_image_each(opened):
    archive, maps = opened
    shuffled = open_targets("shuffled", archive, maps, seed=1)
    assert sorted(shuffled.other) == list(range(len(archive))), "everybody's maps are used once"
    assert not (shuffled.other == np.arange(len(archive))).any(), "nobody keeps their own"
    example = archive[0]
    found, valid = shuffled(0, example, example.words(("assistant",)))
    donor = maps.get(archive.keys[int(shuffled.other[0])])
    assert all(any(np.array_equal(target, row.astype(np.float32) / 255) for row in donor.maps) for target in found)
    assert valid.all()


def test_oracle_targets_are_the_regions_and_only_where_known(opened):
    archive, _ = opened
    oracle = open_targets("oracle", archive, None, seed=1)
    for index in range(len(archive)):
        example = archive[index]
        words = example.words(("assistant",))
        known = {(r["turn"], r["start"], r["end"]) for r in example.meta["regions"]}
        found, valid = oracle(index, example, words)
        assert [bool(v) for v in valid] == [tuple(word) in known for word in words]
        assert (found[valid].max((1, 2)) == 1).all()
        assert (found[valid].mean((1, 2)) < 0.5).all()
        assert not found[~valid].any()


def test_oracle_targets_of_phrases_go_to_each_of_their_words():
    """Regions over several words: "A red man" is left, "man with a hat" below, "hat" in a corner."""
    regions = [
        {"turn": 0, "start": 0, "end": 9, "boxes": [[0, 0, 0.5, 1]]},
        {"turn": 0, "start": 6, "end": 20, "boxes": [[0, 0.5, 1, 1]]},
        {"turn": 0, "start": 17, "end": 20, "boxes": [[0.75, 0.75, 1, 1]]},
    ]
    example = Example("0", b"x", "png", (Turn("assistant", "A red man with a hat stands"),), "", "", "",
                      meta={"regions": regions})  # fmt: skip
    found, valid = open_targets("oracle", None, None, seed=1)(0, example, example.words())
    assert valid.tolist() == [True] * 6 + [False]
    # one phrase alone: the left half; two overlap: their union; a region of just this word comes before a longer one
    assert [round(float(map_YX.mean()), 3) for map_YX in found] == [0.5, 0.5, 0.75, 0.5, 0.5, 0.062, 0]
    assert found[1][:, :16].all()
    assert found[3][16:].all()


def test_centre_targets_are_the_same_everywhere(opened):
    archive, _ = opened
    example = archive[0]
    found, valid = open_targets("centre", archive, None, seed=1)(0, example, example.words())
    assert valid.all()
    assert np.unravel_index(found[0].argmax(), (32, 32)) in {(15, 15), (15, 16), (16, 15), (16, 16)}
    assert (found == found[0]).all()
    assert (found.min(), found.max()) == (0, 1)


def test_metrics_of_a_killed_run_lose_their_torn_last_line(tmp_path):
    (tmp_path / metrics.FILE).write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [row["step"] for row in metrics.read(tmp_path)] == [1, 2]
    metrics.Metrics(tmp_path, 1).add({"step": 2, "again": True})
    assert metrics.read(tmp_path) == [{"step": 1}, {"step": 2, "again": True}]
    shutil.rmtree(tmp_path)
