"""Where image tokens lie on the image, and how attention over them becomes a map of the whole image.

A patch is a rectangle of the image; its attention is spread evenly over it, and a cell of the map gets the part that
falls inside. Rectangles are given in fractions of the WHOLE image, so any size, tiling or padding is exact: a patch
that lies half in the padding gives half of its attention to the image and loses the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

SIDE = 32  # cells on a side of a map


@dataclass(frozen=True)
class Piece:
    """A regular grid of patches: a tile, a slice or the whole image.

    Args:
        columns_HW: key index of the token of each patch, row by row.
        top, left: corner of the grid in fractions of the image's height and width.
        step_y, step_x: height and width of one patch in the same fractions.
    """

    columns_HW: np.ndarray
    top: float
    left: float
    step_y: float
    step_x: float


@dataclass
class Planes:
    """The geometry of a batch: B examples of up to T pieces of up to h x w patches.

    Args:
        columns: (B, T, h, w) long, key index of each patch's token; 0 where there is none.
        rows_y: (B, T, 32, h), share of each patch row's height that lies in each row of cells; 0 where there is none.
        rows_x: (B, T, 32, w), the same for widths.
    """

    columns: torch.Tensor
    rows_y: torch.Tensor
    rows_x: torch.Tensor

    def to(self, device: torch.device | str) -> "Planes":
        return Planes(*(value.to(device, non_blocking=True) for value in (self.columns, self.rows_y, self.rows_x)))

    @classmethod
    def stack(cls, examples: Sequence[Sequence[Piece]], side: int = SIDE) -> "Planes":
        """Joins the pieces of each example; an example without an image has none. Maps get side x side cells."""
        pieces = [piece for example in examples for piece in example]
        tiles = max((len(example) for example in examples), default=0)
        height = max((piece.columns_HW.shape[0] for piece in pieces), default=0)
        width = max((piece.columns_HW.shape[1] for piece in pieces), default=0)
        columns = np.zeros((len(examples), tiles, height, width), np.int64)
        rows_y = np.zeros((len(examples), tiles, side, height), np.float32)
        rows_x = np.zeros((len(examples), tiles, side, width), np.float32)
        for b, example in enumerate(examples):
            for t, piece in enumerate(example):
                h, w = piece.columns_HW.shape
                columns[b, t, :h, :w] = piece.columns_HW
                rows_y[b, t, :, :h] = shares(piece.top, piece.step_y, h, side)
                rows_x[b, t, :, :w] = shares(piece.left, piece.step_x, w, side)
        return cls(torch.from_numpy(columns), torch.from_numpy(rows_y), torch.from_numpy(rows_x))


def shares(start: float, step: float, count: int, side: int = SIDE) -> np.ndarray:
    """(side, count): the share of interval j, [start + j step, start + (j+1) step], inside cell i of [0, 1]."""
    low_N = start + step * np.arange(count)
    cell_C = np.arange(side)[:, None] / side
    overlap_CN = np.minimum(cell_C + 1 / side, low_N + step) - np.maximum(cell_C, low_N)
    return np.clip(overlap_CN, 0, None) / step


def project(probs_WHK: torch.Tensor, planes: Planes, example_W: torch.Tensor) -> torch.Tensor:
    """Attention over keys onto the image: (W, H, S, S) for planes of S cells a side, in units of an even spread.

    A value of 1 is what every cell has when all attention goes to the image and is spread evenly; the unit keeps
    maps of models with a hundred keys and with six thousand in the same range, which the Aligner's normalisation
    needs.

    Args:
        probs_WHK: attention of each word and head over all keys.
        planes: the batch's geometry.
        example_W: the example of each word.
    """
    words, heads, _ = probs_WHK.shape
    _, tiles, height, width = planes.columns.shape
    side = planes.rows_y.shape[2]
    index_WHN = planes.columns[example_W].reshape(words, 1, -1).expand(-1, heads, -1)
    patches_WHTHW = probs_WHK.gather(2, index_WHN).view(words, heads, tiles, height, width)
    rows_y_WTSH, rows_x_WTSW = planes.rows_y[example_W], planes.rows_x[example_W]
    cells_WHSS = probs_WHK.new_zeros(words, heads, side, side)
    for t in range(tiles):
        spread_WHSW = torch.einsum("wsh,wnhv->wnsv", rows_y_WTSH[:, t], patches_WHTHW[:, :, t])
        cells_WHSS = cells_WHSS + torch.einsum("wnsv,wcv->wnsc", spread_WHSW, rows_x_WTSW[:, t])
    return cells_WHSS * side**2
