"""Questions asked alone, and maps that are known to point right, wrong and nowhere."""

import numpy as np
import pytest

from pipeline.evaluate import pointing
from pipeline.evaluate.questions import alone, batches, choose, questions
from pipeline.examples import Example, Turn


def example(key="0000000000", image=b"png"):
    turns = (
        Turn("user", "Describe the image."),
        Turn("assistant", "a red circle"),
        Turn("user", "What colour is the circle?"),
        Turn("assistant", "red"),
        Turn("user", "Is there a cat?"),
        Turn("assistant", "no"),
    )
    box = {"boxes": [[0.5, 0.0, 1.0, 0.5]]}
    regions = [{"turn": 1, "start": 2, "end": 5, **box}, {"turn": 3, "start": 0, "end": 3, "kind": "colour", **box}]
    meta = {"turns": [{"turn": 1, "kind": "caption"}, {"turn": 3, "kind": "attribute"}], "regions": regions}
    return Example(key, image, "png", turns, "world", "test", "CC0-1.0", meta)


def test_each_question_is_asked_alone_and_captions_are_not():
    found = questions(example(), "test", 7, exclude=["caption"])
    assert [(q.uid, q.kind, q.prompt, q.gold, q.index) for q in found] == [
        ("test/0000000000:3", "attribute", "What colour is the circle?", "red", 7),
        ("test/0000000000:5", "yesno", "Is there a cat?", "no", 7),
    ]
    asked = alone(example(), 3)
    assert asked.turns == example().turns[2:4]
    assert [(r["turn"], r["start"], r["kind"]) for r in asked.meta["regions"]] == [(1, 0, "colour")]


def test_system_turn_stays():
    with_system = Example("k", b"", "png", (Turn("system", "Be brief."), *example().turns), "s", "test", "", {})
    assert [t.role for t in alone(with_system, 4).turns] == ["system", "user", "assistant"]


def test_choice_is_fixed_equal_and_nested():
    many = {
        split: [q for i in range(count) for q in questions(example(f"{i:010d}", f"{i}".encode()), split, i)]
        for split, count in (("a", 20), ("b", 30))
    }
    chosen = choose(many, 40)
    assert [sum(q.split == s for q in chosen) for s in "ab"] == [20, 20]
    assert choose(many, 40) == chosen
    assert {q.uid for q in choose(many, 20)} < {q.uid for q in chosen}
    assert len(choose(many, 0)) == 120
    assert choose({}, 10) == []
    parts = batches(chosen, 16)
    assert [len(part) for part in parts] == [16, 16, 8]
    assert parts == batches(chosen[::-1], 16)


def one_hot(row, col, side=32):
    values = np.zeros((side, side), np.float32)
    values[row, col] = 1
    return values


def test_one_hot_maps_point_where_they_are():
    region = np.zeros((64, 96), bool)
    region[16:32, 48:72] = True
    for row in range(32):
        for col in range(32):
            expected = 8 <= row < 16 and 16 <= col < 24
            assert pointing.measure(one_hot(row, col), region).hit == expected


def test_coarse_cells_count_by_their_middle():
    coarse = np.kron(one_hot(2, 3, side=8), np.ones((4, 4), np.float32))
    assert pointing.peak(coarse) == pytest.approx((2.5 / 8, 3.5 / 8), abs=1 / 60)


def test_constant_and_broken_maps_miss():
    everywhere = np.ones((20, 20), bool)
    for values in (np.full((32, 32), 0.25), np.zeros((32, 32)), np.full((32, 32), np.nan)):
        assert not pointing.measure(values, everywhere).hit


def test_mass_area_and_iou():
    region = np.zeros((32, 32), bool)
    region[:, :8] = True
    exact = pointing.measure(region.astype(np.float32), region)
    assert exact.mass == pytest.approx(1)
    assert exact.area == 0.25
    assert not exact.centre
    # A Gaussian of deviation 1/4 has Phi(-1) - Phi(-2) of Phi(2) - Phi(-2) in the first quarter of the columns; above
    # half of its height it is an ellipse of radius 0.294, of which a strip of 0.044 reaches into them.
    assert exact.centre_mass == pytest.approx((0.15866 - 0.02275) / 0.9545, abs=0.005)
    assert 0 < exact.centre_iou < 0.1
    whole = pointing.measure(region.astype(np.float32), np.ones((32, 32), bool))
    assert (whole.centre, whole.centre_mass) == (True, pytest.approx(1))
    assert whole.centre_iou == pytest.approx(np.pi * 0.2944**2, abs=0.01)
    assert exact.ious == pytest.approx([1.0] * len(pointing.THRESHOLDS))
    flat = pointing.measure(np.full((32, 32), 3.0), region)
    assert flat.mass == pytest.approx(0.25)
    ramp = pointing.measure(np.linspace(1, 0, 32)[None].repeat(32, 0), region)
    # Above t lie the columns with 1 - c/31 >= t: the best threshold keeps exactly the first eight.
    assert pointing.best_threshold([ramp]) == 0.75
    assert max(ramp.ious) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="cannot be chosen"):
        pointing.best_threshold([])


def test_regions_of_a_word():
    pytest.importorskip("pipeline.regions")
    regions = example().meta["regions"]
    mask, kind = pointing.word_region(regions, 3, 0, 3, (8, 8))
    assert kind == "colour"
    assert mask.sum() == 16
    assert mask[0, 7]
    assert pointing.word_region(regions, 5, 0, 2, (8, 8)) is None
    assert pointing.word_region(regions, 1, 0, 5, (8, 8)) is None


def test_a_part_of_the_images_is_drawn_not_sorted():
    from pipeline.evaluate.attention import Asked, limited

    asked = [
        Asked("test", question, example(f"{i:010d}"), {})
        for i in range(12)
        for question in questions(example(f"{i:010d}", f"{i // 2}".encode()), "test", i)
    ]
    assert limited(asked, 0) == asked
    part = limited(asked, 3)
    assert len({one.question.cluster for one in part}) == 3
    assert len(part) == 3 * 2 * 3
    assert limited(asked, 100) == asked
