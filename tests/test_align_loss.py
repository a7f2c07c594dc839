"""Aligner, loss and schedule against plain loops."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from pipeline.align.aligner import Aligner
from pipeline.align.config import AlignConfig, ArmConfig
from pipeline.align.loss import AlignmentLoss
from pipeline.align.released import folded_tiles
from pipeline.align.schedule import factor, language_factor
from pipeline.errors import UserError
from pipeline.student.batch import Item, StudentBatch, WordRows
from pipeline.student.capture import Call, student_maps
from pipeline.student.planes import Piece, Planes, shares


def test_aligner_shapes_are_the_papers():
    """3x3 heads-32, 32-32, 32-heads without bias, 1x1 heads-1, for Llama's 32 heads."""
    convolutions = [m for m in Aligner(32, "sim").modules() if isinstance(m, torch.nn.Conv2d)]
    shapes = [tuple(c.weight.shape) for c in convolutions]
    assert shapes == [(32, 32, 3, 3), (32, 32, 3, 3), (32, 32, 3, 3), (1, 32, 1, 1)]
    assert [c.bias is None for c in convolutions] == [True, True, True, False]
    counts = {
        size: sum(isinstance(m, torch.nn.Conv2d) for m in Aligner(4, size).modules()) for size in ("light", "deep")
    }
    assert counts == {"light": 3, "deep": 6}
    assert Aligner(4, "deep")(torch.rand(5, 4, 32, 32)).shape == (5, 32, 32)


@pytest.mark.parametrize(("size", "normed"), [("light", (0, 1)), ("sim", (0, 1, 2)), ("deep", (0, 1, 4))])
def test_aligner_is_its_convolutions_one_by_one(size, normed):
    """Instance norm where the released code has it (not after the third and fourth of five), ReLU6 after each."""
    torch.manual_seed(5)
    aligner = Aligner(6, size, hidden=5)
    *wide, last = (m for m in aligner.modules() if isinstance(m, torch.nn.Conv2d))
    maps = torch.rand(4, 6, 9, 9)
    expected = maps
    for place, convolution in enumerate(wide):
        expected = F.conv2d(expected, convolution.weight, padding=1)
        if place in normed:
            mean, var = expected.mean((2, 3), keepdim=True), expected.var((2, 3), keepdim=True, correction=0)
            expected = (expected - mean) / (var + 1e-5).sqrt()
        expected = expected.clamp(0, 6)
    expected = (expected * last.weight.view(1, -1, 1, 1)).sum(1) + last.bias
    torch.testing.assert_close(aligner(maps), expected, atol=1e-5, rtol=1e-4)


class FakeTap:
    """What the loss needs of a tap, with given probabilities."""

    def __init__(self, probs: dict[int, torch.Tensor], heads: int):
        self.probs = probs
        self.layers = {i: SimpleNamespace(config=SimpleNamespace(num_attention_heads=heads)) for i in probs}

    def maps(self):
        return {i: p for i, p in self.probs.items() if len(p)}

    def calls(self, words):
        """Attention whose scores are the logarithms of the probabilities: each key is a unit vector."""
        return {index: self._call(probs, words) for index, probs in self.probs.items()}

    def _call(self, probs_RHK, words) -> Call:
        heads, keys = probs_RHK.shape[1:]
        table_BSHK = probs_RHK.new_zeros(*words.slots.shape, heads, keys)
        query_BSHK = table_BSHK.index_put((words.row_batch, words.row_slot), probs_RHK.clamp_min(1e-30).log())
        key_BHKK = torch.eye(keys).expand(len(words.slots), heads, keys, keys)
        return Call(query_BSHK.transpose(1, 2), key_BHKK, None, None, 1.0)


def fake(words_per_example=(2, 0, 3), heads=3, layers=2, seed=0):
    """Examples of two tiles of 4x5 patches, the second partly outside the image."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.arange(20).view(4, 5).numpy()
    pieces = [Piece(1 + grid, 0.0, 0.0, 0.25, 0.15), Piece(22 + grid, 0.0, 0.75, 0.25, 0.15)]
    items, items_words = [], 0
    for count in words_per_example:
        ranges = [(2 + 3 * i, 3 + 3 * i + i % 2) for i in range(count)]
        items.append(
            Item("k", torch.zeros(20), torch.zeros(20), [object()] * count, ranges, pieces=pieces if count else [])
        )
        items_words += count
    words = WordRows.build(items, [0] * len(items), "predict")
    planes = Planes.stack([item.pieces for item in items])
    probs = {
        i: torch.rand(len(words.row_pos), heads, 42, generator=generator).softmax(-1).requires_grad_()
        for i in range(layers)
    }
    batch = StudentBatch([], {}, torch.zeros(0), words, planes)
    batch.targets = torch.rand(items_words, 32, 32, generator=generator)
    batch.valid = torch.ones(items_words, dtype=torch.bool)
    return FakeTap(probs, heads), batch, pieces


def reference(tap, batch, pieces, module) -> list[float]:
    """The loss of each word with loops over words, layers, heads, tiles, cells and patches."""
    losses = []
    for w in range(len(batch.words)):
        rows = [r for r in range(len(batch.words.row_word)) if batch.words.row_word[r] == w]
        aligned = []
        for probs in tap.probs.values():
            plane = torch.zeros(probs.shape[1], 32, 32)
            for h in range(probs.shape[1]):
                mean = sum(probs[r, h] for r in rows) / len(rows)
                for piece in pieces:
                    height, width = piece.columns_HW.shape
                    for i in range(height):
                        for j in range(width):
                            y0, x0 = piece.top + i * piece.step_y, piece.left + j * piece.step_x
                            area_y = cell_overlap(y0, y0 + piece.step_y) / piece.step_y
                            area_x = cell_overlap(x0, x0 + piece.step_x) / piece.step_x
                            plane[h] += mean[piece.columns_HW[i, j]].item() * torch.outer(area_y, area_x) * 1024
            aligned.append(module.aligner(plane[None])[0])
        one = sum(aligned) / len(aligned)
        one = (one - one.min()) / (one.max() - one.min())
        target = (batch.targets[w] - batch.targets[w].min()) / (batch.targets[w].max() - batch.targets[w].min())
        losses.append(F.mse_loss(one, target).item())
    return losses


def cell_overlap(low: float, high: float) -> torch.Tensor:
    return torch.tensor([max(0.0, min(high, (c + 1) / 32) - max(low, c / 32)) for c in range(32)])


def test_without_an_aligner_the_attention_itself_is_compared_as_a_distribution():
    tap, batch, _ = fake()
    module = AlignmentLoss(3, "none", measure="kl")
    assert not list(module.parameters())
    raw = student_maps(tap, batch)
    expected = 0.0
    for w in range(len(batch.words)):
        found, target = raw[w].mean((0, 1)), batch.targets[w] / batch.targets[w].sum()
        found = found / found.sum()
        expected += float((target * (target / found).log()).sum())
    total, count = module.sums(tap, batch, batch.targets, batch.valid)
    assert count == 5
    assert total.item() == pytest.approx(expected, rel=1e-4)
    total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tap.probs.values())
    assert float(module.sums(*fake((0, 0))[:2], batch.targets[:0], batch.valid[:0])[0]) == 0


@pytest.mark.parametrize("measure", ["mse", "kl"])
def test_sharpened_targets_are_powers_of_the_maps(measure):
    tap, batch, _ = fake()
    plain, sharp = AlignmentLoss(3, "none", measure=measure), AlignmentLoss(3, "none", measure=measure, sharpen=3.0)
    with torch.no_grad():
        expected, count = plain.sums(tap, batch, batch.targets**3, batch.valid)
        found, counted = sharp.sums(tap, batch, batch.targets, batch.valid)
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
        assert counted == count
        assert found.item() != pytest.approx(plain.sums(tap, batch, batch.targets, batch.valid)[0].item(), rel=1e-2)


@pytest.mark.parametrize("aligner", ["sim", "none"])
def test_vectorised_loss_equals_loops(aligner):
    tap, batch, pieces = fake()
    torch.manual_seed(0)
    module = AlignmentLoss(3, aligner, weight=2.0)
    with torch.no_grad():
        expected = reference(tap, batch, pieces, module)
        total, count = module.sums(tap, batch, batch.targets, batch.valid)
        assert count == 5
        assert total.item() == pytest.approx(sum(expected), rel=1e-4)
        assert module(tap, batch).item() == pytest.approx(2 * sum(expected) / 5, rel=1e-4)
        batch.valid[1] = False
        total, count = module.sums(tap, batch, batch.targets, batch.valid)
        assert count == 4
        assert total.item() == pytest.approx(sum(expected) - expected[1], rel=1e-4)


@pytest.mark.parametrize("aggregation", ["mean", "max", "flow"])
def test_aggregations_equal_loops(aggregation):
    tap, batch, _ = fake(layers=3)
    torch.manual_seed(1)
    module = AlignmentLoss(3, "light", aggregation=aggregation)
    raw = student_maps(tap, batch).detach()
    with torch.no_grad():
        expected = 0.0
        for w in range(len(batch.words)):
            heads = []
            for h in range(3):
                layers = [raw[w, n, h] for n in range(3)]
                if aggregation == "mean":
                    heads.append(sum(layers) / 3)
                elif aggregation == "max":
                    heads.append(torch.maximum(torch.maximum(layers[0], layers[1]), layers[2]))
                else:
                    product = (layers[0].clamp_min(1e-6) * layers[1].clamp_min(1e-6)) * layers[2].clamp_min(1e-6)
                    heads.append(product ** (1 / 3))
            stacked = torch.stack(heads)
            one = module.aligner((stacked.max(0, keepdim=True).values if aggregation == "max" else stacked)[None])[0]
            one = (one - one.min()) / (one.max() - one.min())
            target = batch.targets[w]
            target = (target - target.min()) / (target.max() - target.min())
            expected += F.mse_loss(one, target).item()
    total, _ = module.sums(tap, batch, batch.targets, batch.valid)
    assert total.item() == pytest.approx(expected, rel=1e-3)
    total.backward()
    assert all(torch.isfinite(p.grad).all() for p in [*module.parameters(), *tap.probs.values()])


def test_kl_is_zero_for_the_same_distribution_and_positive_otherwise():
    tap, batch, _ = fake()
    module = AlignmentLoss(3, measure="kl")
    with torch.no_grad():
        found = module.maps(tap, batch)
        same = found.flatten(1).softmax(1).view_as(found)
        total, count = module.sums(tap, batch, same / same.amax((1, 2), keepdim=True), batch.valid)
        assert total.item() == pytest.approx(0, abs=1e-4)
        other, _ = module.sums(tap, batch, batch.targets, batch.valid)
        assert other.item() > 0.01 * count.item()


def test_released_way_equals_its_loops():
    """Tiles of 1 + 16 tokens: stretched to 25, folded to 5 x 5, put on a grid, resized, aligned row by row."""
    torch.manual_seed(2)
    grid = torch.arange(16).view(4, 4).numpy()
    counts = (1, 2, 3, 4)
    items = []
    for tiles in counts:
        pieces = [Piece(17 * t + 1 + grid, 0.0, 0.0, 0.25, 0.25) for t in range(tiles)]
        items.append(Item("k", torch.zeros(9), torch.zeros(9), [object()] * 2, [(2, 3), (4, 6)], pieces=pieces))
    words = WordRows.build(items, [0] * 4, "predict")
    probs = {i: torch.rand(len(words.row_pos), 3, 4 * 17) for i in range(2)}
    batch = StudentBatch(
        [],
        {"pixel_values": torch.zeros(4, 1, 4, 1), "cross_attention_mask": torch.zeros(0)},
        torch.zeros(0),
        words,
        Planes.stack([i.pieces for i in items]),
    )
    batch.targets, batch.valid = torch.rand(8, 32, 32), torch.ones(8, dtype=torch.bool)
    module = AlignmentLoss(3, compat=True)
    expected = torch.zeros(8, 32, 32)
    with torch.no_grad():
        for w in range(8):
            rows = [r for r in range(len(words.row_word)) if words.row_word[r] == w]
            for r in rows:
                tiles = counts[words.row_batch[r]]
                for probabilities in probs.values():
                    heads = []
                    for h in range(3):
                        squares = [
                            F.interpolate(
                                probabilities[r, h, 17 * t : 17 * t + 17][None, None], size=25, mode="linear"
                            ).view(5, 5)
                            for t in range(tiles)
                        ]
                        if tiles == 1:
                            canvas = squares[0]
                        else:
                            canvas = torch.zeros(5 if tiles == 2 else 10, 10)
                            for t, square in enumerate(squares):
                                canvas[t // 2 * 5 : t // 2 * 5 + 5, t % 2 * 5 : t % 2 * 5 + 5] = square
                        heads.append(
                            F.interpolate(canvas[None, None], size=(32, 32), mode="bilinear", antialias=True)[0, 0]
                        )
                    expected[w] += module.aligner(torch.stack(heads)[None])[0] / (len(rows) * 2)
        torch.testing.assert_close(module.maps(FakeTap(probs, 3), batch), expected, atol=1e-5, rtol=1e-5)


def test_no_words_and_constant_maps_give_zero_and_finite_gradients():
    tap, batch, _ = fake((0, 0))
    module = AlignmentLoss(3)
    total, count = module.sums(tap, batch, batch.targets, batch.valid)
    total.backward()
    assert (total.item(), count.item()) == (0.0, 0)
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())

    tap, batch, _ = fake((2,))
    batch.targets[0] = 0.5  # a constant target counts for nothing
    total, count = module.sums(tap, batch, batch.targets, batch.valid)
    assert count == 1
    for probs in tap.probs.values():  # so does attention that looks away from the image altogether
        probs.data.zero_()
        probs.data[:, :, 0] = 1
    total, count = module.sums(tap, batch, batch.targets, batch.valid)
    total.backward()
    assert total.item() == 0
    assert all(torch.isfinite(p.grad).all() for p in [*module.parameters(), *tap.probs.values()])


def test_shares_are_exact():
    """3 cells, intervals of 0.4: each gives its parts away in proportion, what lies beyond 1 is lost."""
    found = shares(0.0, 0.4, 3, side=3)
    expected = [[1 / 3 / 0.4, 0, 0], [1 - 1 / 3 / 0.4, (2 / 3 - 0.4) / 0.4, 0], [0, (0.8 - 2 / 3) / 0.4, 0.5]]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(("rows", "cols"), [(8, 8), (40, 40), (5, 7), (53, 31)])
def test_one_hot_attention_lands_on_its_patch(rows, cols):
    """The centre of mass is within half a cell of the patch's centre."""
    for r, c in ((0, 0), (rows // 2, cols // 3), (rows - 1, cols - 1)):
        y = torch.tensor(shares(0.0, 1 / rows, rows)[:, r])
        x = torch.tensor(shares(0.0, 1 / cols, cols)[:, c])
        cells = (torch.arange(32) + 0.5) / 32
        assert abs((y * cells).sum() / y.sum() - (r + 0.5) / rows) <= 0.5 / 32
        assert abs((x * cells).sum() / x.sum() - (c + 0.5) / cols) <= 0.5 / 32


def test_schedules():
    assert factor(AlignConfig(), 5, 10) == 1.0
    decay = AlignConfig(schedule="decay", decay=2.0)
    assert factor(decay, 0, 10) == 1.0
    assert factor(decay, 10, 10) == pytest.approx(math.exp(-2))
    inverse = AlignConfig(schedule="inverse", decay=2.0)
    assert all(factor(inverse, step, 10) == pytest.approx(1 - factor(decay, step, 10)) for step in range(11))
    first = AlignConfig(aligner_first=0.2)
    assert [language_factor(first, step, 10) for step in (0, 1, 2, 9)] == [1e-7, 1e-7, 1.0, 1.0]
    assert language_factor(AlignConfig(), 0, 10) == 1.0
    warm = AlignConfig(schedule="warmup", warmup=0.5)
    assert [factor(warm, step, 100) for step in (0, 25, 50, 100)] == [0.0, 0.5, 1.0, 1.0]


def test_settings_are_checked():
    for wrong in (
        {"aligner": "huge"},
        {"rows": "next"},
        {"roles": ["robot"]},
        {"warmup": 0.0},
        {"max_words": -1},
        {"side": 31},
    ):
        with pytest.raises(UserError, match=f"align.{next(iter(wrong))}"):
            AlignConfig(**wrong)
    for wrong in ({"targets": "nobody"}, {"lam": -1.0}, {"lam": math.nan}):
        with pytest.raises(UserError, match=r"arm\."):
            ArmConfig(name="x", **wrong)


@pytest.mark.parametrize("tiles", [1, 2, 4])
def test_benchmarked_way_of_the_released_code_gives_the_maps_of_paper_compat(tiles):
    """What the benchmark times as the authors' way is what `paper_compat` computes, position by position."""
    from benchmarks import released

    torch.manual_seed(3)
    weights = torch.rand(1, 3, 6, 4 * 17)
    rows = weights[0].transpose(0, 1)
    stored = released.cross_layer(weights, [tiles])
    expected = folded_tiles(rows, torch.full((6,), tiles), 4)
    torch.testing.assert_close(stored[0].permute(2, 0, 1).unflatten(2, (32, 32)), expected)

    aligner, words = Aligner(3), ["a", "red", "dog"]
    targets = {word: torch.rand(32, 32) for word in words}
    with torch.no_grad():
        found = released.loss([stored, 2 * stored], aligner, [[" a", " red", "x", "y", " dog", "."]], [targets])
        maps = (aligner(expected) + aligner(2 * expected)) / 2
        errors = []
        for place, word in zip((0, 1, 4), words, strict=True):
            one = (maps[place] - maps[place].min()) / (maps[place].max() - maps[place].min())
            errors.append(F.mse_loss(one, targets[word]))
    assert float(found) == pytest.approx(float(sum(errors) / 3), rel=1e-4)


def test_benchmarked_way_for_self_attention_takes_the_text_rows_and_the_image_columns():
    from benchmarks import released

    torch.manual_seed(4)
    weights = torch.rand(1, 2, 9, 9)
    image = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0, 0]], dtype=torch.bool)
    stored = released.self_layer(weights, ~image, image)
    expected = F.interpolate(
        weights[0][:, ~image[0]][:, :, image[0]].transpose(0, 1).reshape(5, 2, 2, 2), (32, 32), mode="bilinear"
    )
    torch.testing.assert_close(stored[0].permute(2, 0, 1).unflatten(2, (32, 32)), expected)
