"""From attention to word maps as the code released with the paper does it, for comparing with its numbers.

Its way, which the rest of this package does not follow: the tokens of a tile, class token included, are taken for a
vector, stretched linearly to the next square number and folded into a square, so that straight lines turn into
diagonals; tiles go onto a grid of two by two in order, whatever their real layout and padding; each token's map goes
through the Aligner by itself, and a word gets the mean of the results.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from pipeline.student.planes import SIDE

if TYPE_CHECKING:
    from pipeline.student.batch import StudentBatch
    from pipeline.student.capture import AttentionTap


def released_maps(tap: "AttentionTap", batch: "StudentBatch", aligner: nn.Module) -> torch.Tensor:
    """(W, 32, 32): mean over layers and over a word's rows of the aligned maps."""
    words, planes = batch.words, batch.planes
    tiles_B = planes.rows_y.flatten(2).any(2).sum(1)
    slots = batch.inputs["pixel_values"].shape[2] if "cross_attention_mask" in batch.inputs else 0
    layers = []
    for probs_RHK in tap.maps().values():
        if slots:
            squares_RHSS = folded_tiles(probs_RHK, tiles_B[words.row_batch], slots)
        else:
            squares_RHSS = folded_image(probs_RHK, planes.columns.flatten(1), planes, words.row_batch)
        layers.append(aligner(squares_RHSS))
    rows_RSS = torch.stack(layers).mean(0)
    count_W = torch.bincount(words.row_word, minlength=len(words)).to(rows_RSS.dtype)
    sum_WSS = rows_RSS.new_zeros(len(words), SIDE, SIDE).index_add(0, words.row_word, rows_RSS)
    return sum_WSS / count_W[:, None, None]


def fold(tokens_RHN: torch.Tensor) -> torch.Tensor:
    """(R, H, N) to (R, H, S, S) with the smallest S of which the square is at least N."""
    side = math.isqrt(tokens_RHN.shape[2] - 1) + 1
    stretched = functional.interpolate(tokens_RHN, size=side * side, mode="linear", align_corners=False)
    return stretched.unflatten(2, (side, side))


def shrink(squares_RHYX: torch.Tensor) -> torch.Tensor:
    """Bilinear to 32 x 32 with antialiasing, as torchvision's ``Resize``."""
    return functional.interpolate(squares_RHYX, size=(SIDE, SIDE), mode="bilinear", antialias=True)


def folded_tiles(probs_RHK: torch.Tensor, tiles_R: torch.Tensor, slots: int) -> torch.Tensor:
    """Cross-attention over ``slots`` tiles of equal length: (R, H, 32, 32).

    Args:
        probs_RHK: probabilities.
        tiles_R: tiles in use in the row's image: one is taken alone, two lie side by side, more in a square.
        slots: tiles in all.
    """
    rows, heads, keys = probs_RHK.shape
    square_RHTSS = fold(probs_RHK.reshape(rows, heads * slots, keys // slots)).unflatten(1, (heads, slots))
    side = square_RHTSS.shape[-1]
    canvas = probs_RHK.new_zeros(rows, heads, 2 * side, 2 * side)
    for tile in range(min(slots, 4)):
        used = (tile < tiles_R)[:, None, None, None]
        y, x = tile // 2 * side, tile % 2 * side
        part = torch.where(used, square_RHTSS[:, :, tile], 0.0)
        canvas = canvas + functional.pad(part, (x, side - x, y, side - y))
    one, two, many = shrink(square_RHTSS[:, :, 0]), shrink(canvas[:, :, :side]), shrink(canvas)
    count = tiles_R[:, None, None, None]
    return torch.where(count == 1, one, torch.where(count == 2, two, many))


def folded_image(probs_RHK: torch.Tensor, columns_BN: torch.Tensor, planes, example_R: torch.Tensor) -> torch.Tensor:
    """Self-attention: all image tokens of an example in sequence as one vector: (R, H, 32, 32).

    Examples with different numbers of image tokens stretch differently, so each number is done at once.
    """
    used_BN = (planes.rows_y.any(2)[..., :, None] & planes.rows_x.any(2)[..., None, :]).flatten(1)
    count_R = used_BN.sum(1)[example_R]
    out = probs_RHK.new_zeros(*probs_RHK.shape[:2], SIDE, SIDE)
    for count in count_R.unique().tolist():
        picked = (count_R == count).nonzero()[:, 0]
        examples = example_R[picked]
        columns = torch.where(used_BN, columns_BN, torch.iinfo(torch.long).max)[examples].sort(1).values[:, :count]
        tokens = probs_RHK[picked].gather(2, columns[:, None].expand(-1, probs_RHK.shape[1], -1))
        out = out.index_copy(0, picked, shrink(fold(tokens)))
    return out
