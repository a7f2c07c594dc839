"""What a run trains on and in which order: every option is one pure function of the step, and is counted."""

import itertools
import json
import pickle
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from PIL import Image
from test_train import losses, root, same, settings, weights  # noqa: F401 (root is a fixture)

from pipeline import receipts
from pipeline.archive import Archive
from pipeline.archive.order import BatchPlan, Mixture, Order
from pipeline.archive.stage import shard
from pipeline.config import compose
from pipeline.errors import UserError
from pipeline.layout import Layout
from pipeline.mapstore import MapStore
from pipeline.mapstore.quality import QualityFilter, quality
from pipeline.mapstore.write import write_shard
from pipeline.student.load import load_student
from pipeline.train import metrics, status
from pipeline.train.data import Batches
from pipeline.train.order import count_steps, measure_lengths, train_plan
from pipeline.train.stage import train

BY_LENGTH = ("train.bucket=true", "train.max_tokens=160")


# --- the plan alone ---


@st.composite
def plans(draw):
    """A plan of any kind, as a function that makes it anew."""
    seed = draw(st.integers(0, 2**32))
    sizes = draw(st.lists(st.integers(1, 30), min_size=1, max_size=5))
    window, batch = draw(st.integers(0, 3)), draw(st.integers(1, 9))
    lengths = np.random.default_rng(seed).integers(1, 40, sum(sizes))
    bucket, most = draw(st.booleans()), draw(st.sampled_from([0, 30, 100]))
    mixed = draw(st.booleans())

    def make() -> BatchPlan:
        order = Order(sizes, seed, window)
        if mixed:
            even = [numbers[numbers % 2 == 0] for numbers in order.numbers]
            order = Mixture([order, Order([part for part in even if len(part)] or [np.arange(1)], seed)], [1, 2], seed)
        return BatchPlan(order, batch, lengths, bucket, most)

    return make, mixed


@given(plans(), st.randoms())
@examples(max_examples=60, deadline=None)
def test_batches_are_a_pure_function_of_the_step(made, chance):
    make, mixed = made
    plan, position, walked, begins = make(), 0, [], []
    while len(walked) < 40:
        begins.append(position)
        walked.append(plan.batch(position))
        position += len(walked[-1])
    for batch in walked:
        assert 0 < len(batch) <= plan.batch_size
        if plan.max_tokens and len(batch) > 1:
            assert plan.lengths[batch].max() * len(batch) <= plan.max_tokens
    # At any step, in any order, in any process.
    fresh, steps = pickle.loads(pickle.dumps(make())), list(range(40))
    chance.shuffle(steps)
    assert [fresh.at(step) for step in steps] == [walked[step] for step in steps]
    for step in steps[:5]:
        assert make().steps(begins[step]) == step
        assert make().steps(begins[step] + 0.5) == step + 1
    if not mixed:
        seen = list(itertools.chain.from_iterable(walked))
        total = plan.order.total
        for first in range(0, len(seen) - total + 1, total):
            assert sorted(seen[first : first + total]) == list(range(total)), "each example once an epoch"


def test_any_step_of_a_large_set_is_found_at_once():
    lengths = np.random.default_rng(0).integers(10, 500, 130_000)
    plan = BatchPlan(Order([1000] * 130, seed=0, window=8), 64, lengths, bucket=True, max_tokens=16_000)
    whole = plan.steps(260_000)
    assert plan.steps(260_000) == whole > 260_000 / 64
    assert plan.at(whole - 1) == pickle.loads(pickle.dumps(plan)).at(whole - 1)


# --- from the settings ---


@pytest.fixture(scope="module")
def mixture(root):  # noqa: F811
    """A mixture of two lists; its overrides."""
    images = root / "images"
    images.mkdir()
    Image.new("RGB", (64, 64)).save(images / "a.png")
    found = ["data.name=mixed", "data.kind=mixture", "arm=sft"]
    for name, size in PARTS.items():
        answers = ["red", "a small red circle and a blue square", "two"]
        turns = [[{"from": "human", "value": "two"}, {"from": "gpt", "value": one}] for one in answers]
        listed = [{"id": str(n), "image": "a.png", "conversations": turns[n % 3]} for n in range(size)]
        (images / f"{name}.json").write_text(json.dumps(listed))
        found.append(f"+data.parts.{name}={{kind: llava_json, path: '{images}/{name}.json'}}")
    shard(settings(root, *found))
    return found


PARTS = {"large": 10, "small": 4}
OUT = [1, 5]  # numbers of examples that are held out


@pytest.fixture(scope="module")
def family(root):  # noqa: F811
    return load_student(settings(root).model).family


def measured(cfg, folder, family):
    archive = Archive(Layout(cfg).examples_dir("train"))
    measure_lengths(archive, family, folder / "lengths.npy", {}, {"examples": archive.digest})
    return archive, np.load(folder / "lengths.npy")


def global_batches(cfg, family, folder, ranks, steps):
    """Keys of each global batch, put together from what every one of several processes gets."""
    archive, lengths = measured(cfg, folder, family)
    parts, forwards = [], []
    for rank in range(ranks):
        batches = Batches(
            archive, train_plan(cfg, archive, OUT, lengths), family, None,
            micro_batch=cfg.train.micro_batch, rank=rank, ranks=ranks,
            skipped_file=folder / "skipped.jsonl", max_failed=0.0,
        )  # fmt: skip
        shares = list(batches.stream(0, steps, workers=rank % 3))
        taught = [[b for b in share.batches if bool((b.labels != -100).any())] for share in shares]
        parts.append([list(itertools.chain.from_iterable(b.keys for b in found)) for found in taught])
        forwards.append([len(share.batches) for share in shares])
    assert all(made == forwards[0] for made in forwards), "no process waits for another"
    return [list(itertools.chain.from_iterable(part[step] for part in parts)) for step in range(steps)]


@pytest.mark.parametrize(
    "more", [(), BY_LENGTH[:1], BY_LENGTH[1:], BY_LENGTH, ("weights",), ("weights", *BY_LENGTH)], ids="-".join
)
def test_global_batches_are_the_same_for_any_number_of_processes(root, mixture, family, tmp_path, more):  # noqa: F811
    given = [one if one != "weights" else "+train.weights={large: 1, small: 3}" for one in more]
    cfg = settings(root, *mixture, *given, "train.batch_size=6", "train.micro_batch=2", "train.window=1")
    alone = global_batches(cfg, family, tmp_path, 1, 9)
    archive, lengths = measured(cfg, tmp_path, family)
    plan = train_plan(cfg, archive, OUT, lengths)
    keys = archive.keys
    assert alone == [[keys[index] for index in plan.at(step)] for step in range(9)]
    assert not {keys[index] for index in OUT} & set(itertools.chain.from_iterable(alone))
    for ranks in (2, 3):
        assert global_batches(cfg, family, tmp_path, ranks, 9) == alone


def test_weights_are_the_shares_of_the_parts(root, mixture):  # noqa: F811
    cfg = settings(root, *mixture, "+train.weights={large: 1, small: 3}", "train.window=1")
    archive = Archive(Layout(cfg).examples_dir("train"))
    ids = archive.column("id")
    plan = train_plan(cfg, archive)
    seen = [ids[index].split("/")[0] for step in range(500) for index in plan.at(step)]
    assert (seen[:1000].count("small"), seen[:1000].count("large")) == (750, 250)
    only = train_plan(settings(root, *mixture, "+train.weights={large: 1, small: 0}"), archive)
    assert {ids[index].split("/")[0] for step in range(50) for index in only.at(step)} == {"large"}
    assert count_steps(replace(cfg, train=replace(cfg.train, steps=0, epochs=2)), plan) == 7  # 28 examples by 4


def test_the_default_order_is_that_of_the_shards(root):  # noqa: F811
    """What runs from before saw; `window` and the seed decide it."""
    cfg = settings(root)
    archive = Archive(Layout(cfg).examples_dir("train"))
    plain = Order(archive.sizes, seed=cfg.seed, window=4)
    plan = train_plan(cfg, archive)
    assert [plan.at(step) for step in range(20)] == [plain.indices(4 * step, 4) for step in range(20)]
    assert plain.indices(0, 12) == [2, 9, 10, 3, 4, 0, 5, 6, 1, 7, 8, 11]


def test_lengths_are_the_tokens_of_each_example(root, family, tmp_path):  # noqa: F811
    cfg = settings(root)
    archive, lengths = measured(cfg, tmp_path, family)
    assert lengths.tolist() == [len(family.encode_one(example).ids) for example in archive]
    assert len(set(lengths.tolist())) > 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            "+train.weights={large: 1}",
            "train.weights has none for the part 'small': give one",
        ),
        (
            "+train.weights={large: 1, small: 1, other: 1}",
            "train.weights.other: data 'mixed' has the parts large, s",
        ),
        ("+train.weights={large: 0, small: 0}", "train.weights: all of them are 0"),
        ("+train.weights={large: -1, small: 1}", "train.weights.large=-1: give 0"),
        ("train.weights={large: 1}", "train.weights.large is not there yet: add it with +train.weights.large=..."),
        ("train.max_tokens=-5", "train.max_tokens=-5: give tokens, or 0 for no limit"),
        ("train.quality.min_peak=-1", "train.quality.min_peak=-1: give 0"),
        ("train.quality.max_entropy=1.5", "train.quality.max_entropy=1.5: give up to 1"),
        ("train.quality.peak=1", "unknown setting 'train.quality.peak'"),
        ("train.bukket=true", "did you mean train.bucket?"),
        ("train.window_mb=0", "train.window_mb 1 or more"),
        ("train.bucket=maybe", "train.bucket"),
    ],
)
def test_a_wrong_value_is_told_in_one_line(root, mixture, given, said):  # noqa: F811
    with pytest.raises(UserError) as caught:
        train(settings(root, *mixture, given))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_need_a_mixture(root):  # noqa: F811
    with pytest.raises(UserError, match="no mixture"):
        train(settings(root, "arm=sft", "+train.weights={large: 1}"))


# --- runs ---


@pytest.mark.parametrize("options", [BY_LENGTH, ("+train.weights={large: 1, small: 3}",)], ids=["length", "weights"])
def test_a_run_with_options_resumes_exactly_in_the_middle_of_an_epoch(root, mixture, options):  # noqa: F811
    name = options[0].partition("=")[0]
    more = [*mixture, *options, "train.window=1", "train.steps=0", "train.epochs=1.5"]
    whole = settings(root, *more, f"runs_dir={root}/{name}-whole")
    train(whole)
    broken = settings(root, *more, f"runs_dir={root}/{name}-broken", "train.workers=2")
    stops = random.Random(0)
    for _ in range(3):
        train(replace(broken, train=replace(broken.train, max_steps_per_call=stops.choice([1, 2]))))
    train(broken)
    assert losses(broken) == losses(whole)
    assert same(weights(broken), weights(whole))
    assert receipts.load(status.run_dir(broken) / status.RECEIPT).counts["steps"] == len(losses(whole))
    other = settings(root, *more, f"runs_dir={root}/{name}-whole", *(["train.bucket=false"] * ("bucket" in name)))
    with pytest.raises(receipts.Stale):
        status.up_to_date(replace(other, train=replace(other.train, weights={}, max_tokens=0)))


@pytest.fixture
def gaps(root, tmp_path):  # noqa: F811
    """The maps of `root` without those of two examples, under `tmp_path`; the settings."""
    cfg = settings(root)
    whole = MapStore(Layout(cfg).maps_split_dir("train"))
    moved = settings(root, f"shards_dir={tmp_path}", f"runs_dir={tmp_path}/runs", "arm=lavender")
    shard(moved)
    folder, made = Layout(moved).maps_split_dir("train"), []
    folder.mkdir(parents=True)
    for name in whole.shards:
        group = folder / f"{name}.zarr"
        write_shard(group, [whole.get(key) for key in whole.group(name).keys if key not in LACKING])
        made.append(group.with_suffix(".json"))
        receipts.write(made[-1], stage="precompute", settings={}, files=[group])
    receipts.write(folder / "manifest.json", stage="precompute", settings={}, children=made)
    return moved


LACKING = ("0000000001", "0000200000")


def test_examples_without_maps_and_poor_maps_train_the_language_loss_and_are_counted(root, gaps, capsys):  # noqa: F811
    store = MapStore(Layout(gaps).maps_split_dir("train"))
    held = [store.get(key) for key in store.keys]
    peaks = np.concatenate([quality(maps)[0] for maps in held])
    limit = float(np.median(peaks))
    poor = int((peaks < limit).sum())
    assert 0 < poor < len(peaks)
    for name, more, unusable in (("all", [], 0), ("good", [f"train.quality.min_peak={limit!r}"], poor)):
        cfg = compose_again(gaps, f"{gaps.runs_dir}/{name}", more)
        train(cfg)
        counts = receipts.load(status.run_dir(cfg) / status.RECEIPT).counts
        assert (counts["maps_read"], counts["without_maps"]) == (12, 2), "each example is read once"
        assert (counts["words_read"], counts["words_unusable"]) == (len(peaks), unusable)
        said = capsys.readouterr().out
        assert "2 without maps" in said
        assert (f"{unusable / len(peaks):.1%} of {len(peaks)} words without a usable map" in said) == bool(unusable)
    every, good = (metrics.read(f"{gaps.runs_dir}/{name}" / status.run_dir(gaps).relative_to(gaps.runs_dir))
                   for name in ("all", "good"))  # fmt: skip
    assert [row["tokens"] for row in every] == [row["tokens"] for row in good]
    assert sum(row["words"] for row in good) < sum(row["words"] for row in every)
    assert QualityFilter(min_peak=limit).active


def compose_again(cfg, runs, more):
    """The settings of `cfg` with others on top."""
    return settings(cfg.model.path.removesuffix("/student"), f"shards_dir={cfg.shards_dir}", f"runs_dir={runs}",
                    "arm=lavender", *more)  # fmt: skip


def test_the_filter_and_the_order_decide_whether_a_run_still_holds():
    plain = compose(["arm=sft"])
    assert status.settings(compose(["arm=sft", "train.quality.min_peak=3"])) == status.settings(plain), "no maps read"
    aligned = status.settings(compose(["arm=lavender"]))
    for more in ("train.quality.min_peak=3", "train.bucket=true", "train.max_tokens=9", "train.window_mb=9"):
        assert status.settings(compose(["arm=lavender", more])) != aligned
    assert not {"quality", "bucket", "max_tokens", "weights", "window_mb"} & aligned["train"].keys()
