"""Intervals: exact values where they are known, and calibration on simulated comparisons of equals."""

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.evaluate import intervals
from pipeline.evaluate.compare import Grid, difference


def test_t_matches_tables():
    for df, quantile in ((1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042), (500, 1.965)):
        assert intervals.t_quantile(df) == pytest.approx(quantile, rel=2e-3)
        assert intervals.t_cdf(quantile, df) == pytest.approx(0.975, abs=2e-4)
    assert intervals.t_cdf(0, 7) == pytest.approx(0.5)


def test_mcnemar_exact():
    first = np.array([1] * 8 + [0] * 2 + [1] * 30)
    second = np.array([0] * 8 + [1] * 2 + [1] * 30)
    # 2 * (C(10,0) + C(10,1) + C(10,2)) / 2^10
    assert intervals.mcnemar(first, second) == pytest.approx(2 * 56 / 1024)
    assert intervals.mcnemar(first, first) == 1.0


def test_mean_interval_covers_and_counts_clusters():
    rng = np.random.default_rng(0)
    values = rng.random(400) < 0.3
    single = intervals.mean_interval(values, np.arange(400))
    assert single.value == values.mean()
    assert single.n == single.clusters == 400
    assert single.hi - single.lo == pytest.approx(2 * 1.96 * np.sqrt(0.21 / 400), rel=0.15)
    # The same answer given to four copies of each image is not four times the evidence.
    repeated = intervals.mean_interval(np.repeat(values[:100], 4), np.repeat(np.arange(100), 4))
    assert repeated.clusters == 100
    assert repeated.hi - repeated.lo == pytest.approx(2 * (single.hi - single.lo), rel=0.25)


def test_no_spread_still_has_an_interval():
    full = intervals.mean_interval(np.ones(20), np.arange(20))
    assert full.hi == pytest.approx(1.0)
    assert 0.8 < full.lo < 0.9
    never = intervals.ratio_interval(np.zeros(20), np.ones(20), np.arange(20) // 2)
    assert (never.value, never.lo) == (0, 0)
    assert 0.2 < never.hi < 0.4, "ten images"
    assert intervals.ratio_interval(np.zeros(9), np.zeros(9), np.arange(9)).ci95 == [0, 1]
    with pytest.raises(ValueError, match="at least one"):
        intervals.mean_interval([], [])
    # Also over seeds, and where every image has one right and one wrong answer.
    assert intervals.two_level(np.ones((3, 20)), np.arange(20)).ci95 == full.ci95
    alike = intervals.mean_interval([0, 1] * 20, np.arange(20).repeat(2))
    assert alike.lo < 0.35 < 0.65 < alike.hi
    assert intervals.mean_interval([3.0], [0]).hi == 3  # a grade above 1


def test_an_interval_of_shares_stays_between_0_and_1():
    """Of two seeds, t is 12.7."""
    found = intervals.two_level(np.array([[1.0] * 50, [1.0] * 45 + [0.0] * 5]), np.arange(50))
    assert found.lo < 0.7
    assert found.hi == 1


@pytest.mark.parametrize(("images", "real"), [(2, False), (5, False), (6, True), (40, True)])
def test_a_few_images_that_change_alike_prove_nothing(images, real):
    """Without any spread the sign test decides, as McNemar's does where each image has one question."""
    for sign in (1, -1):
        found = intervals.paired([sign > 0] * images, [sign < 0] * images, np.arange(images))
        assert found.real is real
        assert (found.p < 0.05) is real
        assert found.p == pytest.approx(max(found.mcnemar_p, 1 / (intervals.DRAWS + 1)))
        assert found.lo <= found.value <= found.hi


def test_a_ratio_over_seeds_is_as_uncertain_as_a_mean_over_seeds():
    rng = np.random.default_rng(8)
    answers = rng.random((4, 300)) < np.array([0.3, 0.4, 0.5, 0.6])[:, None]
    images = np.arange(300) // 3
    found, mean = intervals.ratio_interval(answers, np.ones_like(answers), images), intervals.two_level(answers, images)
    assert (found.value, found.n, found.clusters) == pytest.approx((mean.value, 300, 100))
    assert (found.lo, found.hi) == pytest.approx((mean.lo, mean.hi), abs=1e-6)


def test_same_run_twice_is_zero():
    values = np.random.default_rng(1).random(300) < 0.5
    same = intervals.paired(values, values, np.arange(300))
    assert (same.value, same.lo, same.hi, same.p, same.mcnemar_p, same.real) == (0, 0, 0, 1, 1, False)
    seeds = np.stack([values, ~values])
    assert intervals.two_level_paired(seeds, seeds, np.arange(300)).p == 1


def test_broken_arm_is_worse():
    rng = np.random.default_rng(2)
    good, broken = rng.random(500) < 0.5, rng.random(500) < 0.3
    found = intervals.paired(broken, good, np.repeat(np.arange(125), 4))
    assert found.real
    assert found.value < 0
    assert found.p < 0.01
    assert found.mcnemar_p < 0.01


def _clustered(rng, arms, clusters=120, size=4):
    """Right/wrong values of equally good arms; questions of an image share its difficulty."""
    ease = rng.beta(1.5, 2.5, clusters).repeat(size)
    return rng.random((arms, clusters * size)) < ease, np.arange(clusters).repeat(size)


def test_equal_arms_are_seldom_called_different():
    rng = np.random.default_rng(3)
    called = 0
    for trial in range(200):
        (first, second), clusters = _clustered(rng, 2)
        called += intervals.paired(first, second, clusters, draws=600, seed=trial).real
    assert called <= 14


RECORDED = Path(__file__).parent / "answers.json"  # right and wrong of five seeds of two arms of the demo, by question


@pytest.mark.parametrize("seeds", [1, 2])
def test_real_answers_of_equal_arms_are_seldom_called_different(seeds):
    """200 pairs made of recorded answers of one arm, compared as the table compares arms; images are drawn anew.

    One seed: each image's answers by two seeds are given to the two sides at random, so that the sides are equal. Two
    seeds a side: four different seeds of the arm, whose own differences the interval has to cover.
    """
    told = json.loads(RECORDED.read_text())
    image_N = np.array(told["images"])
    rows = [np.flatnonzero(image_N == image) for image in range(image_N.max() + 1)]
    right = {name: np.array(list(text), float) for name, text in told["right"].items()}
    rng = np.random.default_rng(7)
    called = different = 0
    for trial in range(200):
        drawn = rng.integers(len(rows), size=len(rows) // 2)
        order = np.concatenate([rows[image] for image in drawn])
        cluster = np.repeat(range(len(drawn)), [len(rows[image]) for image in drawn])
        arm, picked = ("sft", "lavender")[trial % 2], rng.permutation(5)[: 2 * seeds] + 1
        first, second = np.array([right[f"{arm}-{seed}"][order] for seed in picked]).reshape(2, seeds, -1)
        if seeds == 1:
            swap = rng.random(len(drawn))[cluster] < 0.5
            first, second = np.where(swap, first, second), np.where(swap, second, first)
        names = tuple(map(str, range(len(order))))
        sides = [Grid(tuple(range(seeds)), values, names, tuple(cluster)) for values in (first, second)]
        found = difference(*sides)
        called += found.real
        different += found.value != 0
    assert different > 150
    assert called <= 14


@pytest.mark.parametrize("spread", [0.0, 0.05])
def test_equal_arms_over_seeds(spread):
    """Also when seeds differ by more than examples do, which a plain percentile bootstrap of five seeds misses."""
    rng = np.random.default_rng(4)
    called = 0
    for trial in range(200):
        ease = rng.beta(1.5, 2.5, 300)
        shift = rng.normal(0, spread, (10, 1))
        answers = rng.random((10, 300)) < np.clip(ease + shift, 0, 1)
        clusters = np.arange(300) // 3
        called += intervals.two_level_paired(answers[:5], answers[5:], clusters, draws=300, seed=trial).real
    assert called <= 14


def test_two_level_is_wider_than_examples_alone():
    rng = np.random.default_rng(5)
    answers = rng.random((5, 400)) < np.array([0.3, 0.4, 0.5, 0.6, 0.7])[:, None]
    over_both = intervals.two_level(answers, np.arange(400))
    over_examples = intervals.mean_interval(answers.mean(0), np.arange(400))
    assert over_both.value == pytest.approx(over_examples.value)
    assert over_both.hi - over_both.lo > 3 * (over_examples.hi - over_examples.lo)
    assert intervals.two_level(answers[:1], np.arange(400)) == intervals.mean_interval(answers[0], np.arange(400))
    with pytest.raises(ValueError, match="do not pair"):
        intervals.two_level_paired(answers[:2], answers[:3], np.arange(400))
