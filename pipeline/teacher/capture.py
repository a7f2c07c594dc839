"""Attention of words over the image, summed up inside the attention calls of a diffusion model.

Head mean, layer weights, the merge of tokens to words and the resize are all linear, so summing on the fly gives what
storing every head of every layer and step would give, at the cost of one running sum per grid size.

Shape legend: B windows in a batch, H heads, N image cells (row-major), T text positions, W words, D head width,
Y and X rows and columns of a grid.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from pipeline.teacher.config import MAP_SIDE

TINY = 1e-12
SCORES = 1 << 19  # most attention scores of a window held at once (2 MiB in float32); more heads go one after another


@dataclass(frozen=True)
class Layer:
    """An attention layer that is read: its side (of a square image's grid), and its weight in the sum of all."""

    name: str
    side: int
    weight: float


@dataclass
class Capture:
    """What one batch of windows has gathered; handed through the model's forward to the processors.

    Args:
        grids: (rows, columns) of every side that is used.
        tokens_BTW: for each word the weight of each text position (see `token_weights`).
        content_BT: 1 for content tokens, 0 for start, end and padding; given if maps are renormalised over them.
        refine: how often the maps are carried along the self-attention of `pairs`.
        refine_side: the side on which `pairs` live.
        sums: per side, weighted head means of every text position so far, (B, N, T) float32.
        words: per side, the same already merged to words, (B, W, N) float32.
        pairs: queries and keys (B, H, N, D) of the self-attention layers of this forward, if refinement needs them.
    """

    grids: dict[int, tuple[int, int]]
    tokens_BTW: torch.Tensor
    content_BT: torch.Tensor | None = None
    refine: int = 0
    refine_side: int = 0
    sums: dict[int, torch.Tensor] = field(default_factory=dict)
    words: dict[int, torch.Tensor] = field(default_factory=dict)
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def add(self, layer: Layer, q_BHND: torch.Tensor, k_BHTD: torch.Tensor, scale: float) -> None:
        """Adds a cross-attention layer: queries of the image, keys of the text."""
        self._check(layer, q_BHND)
        mean_BNT = head_mean(q_BHND, k_BHTD, scale)
        if self.content_BT is not None:
            total_BN1 = torch.einsum("bnt,bt->bn", mean_BNT, self.content_BT).unsqueeze(-1)
            mean_BNT = mean_BNT / total_BN1.clamp_min(TINY)
        _accumulate(self.sums, layer, mean_BNT)

    def add_joint(self, layer: Layer, q_BHND: torch.Tensor, k_BHSD: torch.Tensor, text: slice, scale: float) -> None:
        """Adds a layer in which the image attends to image and text together.

        Fused attention with the words' token weights in the place of the values is the sum of a word's attention for
        each head: the (N, S) matrix is never built.

        Args:
            q_BHND: queries of the image.
            k_BHSD: keys of image and text in the layer's own order.
            text: where the text lies among the S keys.
        """
        self._check(layer, q_BHND)
        columns_BTW = self.tokens_BTW
        if self.content_BT is not None:
            columns_BTW = torch.cat([columns_BTW, self.content_BT.unsqueeze(-1)], dim=-1)
        v_BSW = columns_BTW.new_zeros(len(columns_BTW), k_BHSD.shape[2], columns_BTW.shape[2])
        v_BSW[:, text] = columns_BTW
        mean_BNW = fused_mean(q_BHND, k_BHSD, v_BSW, scale)
        if self.content_BT is not None:
            mean_BNW = mean_BNW[..., :-1] / mean_BNW[..., -1:].clamp_min(TINY)
        _accumulate(self.words, layer, mean_BNW.transpose(1, 2).contiguous())

    def keep(self, q_BHND: torch.Tensor, k_BHND: torch.Tensor) -> None:
        """Keeps the queries and keys of the image in a self-attention layer until `word_maps`."""
        self.pairs.append((q_BHND, k_BHND))

    def word_maps(self) -> torch.Tensor:
        """The maps gathered so far on the common plane, (B, W, 32, 32) float32; leaves the capture empty."""
        merged = {s: torch.einsum("bnt,btw->bwn", sum_BNT, self.tokens_BTW) for s, sum_BNT in self.sums.items()}
        for side, words_BWN in self.words.items():
            merged[side] = merged[side] + words_BWN if side in merged else words_BWN
        grids = {side: maps_BWN.unflatten(-1, self.grids[side]) for side, maps_BWN in merged.items()}
        if self.refine:
            target = self.grids[self.refine_side]
            x_BWN = sum(resize(maps_BWYX, target) for maps_BWYX in grids.values()).flatten(-2)
            grids = {self.refine_side: spread(x_BWN, self.pairs, self.refine).unflatten(-1, target)}
        self.sums, self.words, self.pairs = {}, {}, []
        return sum(resize(maps_BWYX, (MAP_SIDE, MAP_SIDE)) for maps_BWYX in grids.values())

    def _check(self, layer: Layer, q_BHND: torch.Tensor) -> None:
        rows, columns = self.grids[layer.side]
        assert q_BHND.shape[2] == rows * columns, f"{layer.name}: {q_BHND.shape[2]} cells, not {rows}x{columns}"


def _accumulate(sums: dict[int, torch.Tensor], layer: Layer, values: torch.Tensor) -> None:
    if layer.side in sums:
        sums[layer.side].add_(values, alpha=layer.weight)
    else:
        sums[layer.side] = values * layer.weight


def head_mean(q_BHND: torch.Tensor, k_BHTD: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(QK^T) in float32, averaged over the heads: (B, N, T). Heads are taken a few at a time."""
    _, heads, cells, _ = q_BHND.shape
    together = max(1, min(heads, SCORES // (cells * k_BHTD.shape[2])))
    out = None
    for first in range(0, heads, together):
        q, k = q_BHND[:, first : first + together].float(), k_BHTD[:, first : first + together].float()
        part = torch.softmax((q * scale) @ k.transpose(-1, -2), dim=-1).sum(1)
        out = part if out is None else out.add_(part)
    return out.div_(heads)


def fused_mean(
    q_BHND: torch.Tensor, k_BHSD: torch.Tensor, v_BSW: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """softmax(QK^T) @ V averaged over heads, (B, N, W) float32, V being the same for all heads and of any width.

    V is cut into pieces as wide as a head, the last one padded: fused kernels want equal widths and plain strides, and
    without one the (N, S) matrix would be built.
    """
    width, heads = q_BHND.shape[-1], q_BHND.shape[1]
    pieces = []
    for first in range(0, v_BSW.shape[2], width):
        piece_BSW = v_BSW[..., first : first + width].to(q_BHND.dtype)
        count = piece_BSW.shape[-1]
        v_BHSD = F.pad(piece_BSW, (0, width - count)).contiguous().unsqueeze(1).expand(-1, heads, -1, -1)
        out_BHND = F.scaled_dot_product_attention(q_BHND, k_BHSD, v_BHSD, scale=scale)
        pieces.append(out_BHND[..., :count].float().mean(1))
    return torch.cat(pieces, dim=-1)


def spread(x_BWN: torch.Tensor, pairs: list[tuple[torch.Tensor, torch.Tensor]], power: int) -> torch.Tensor:
    """S^power @ x, S being the self-attention averaged over heads and over the layers in `pairs`: the maps are the
    values of fused attention, so S itself is never built.

    Rows of S sum to one, so a map's mean passes as it is and only what differs from it, scaled to one, is carried: what
    a map shows is small beside its mean, and in half precision the values would be rounded to it.
    """
    for _ in range(power):
        mean_BW1 = x_BWN.mean(-1, keepdim=True)
        span_BW1 = (x_BWN - mean_BW1).abs().amax(-1, keepdim=True).clamp_min(TINY)
        x_BNW = ((x_BWN - mean_BW1) / span_BW1).transpose(1, 2)
        total_BNW = sum(fused_mean(q_BHND, k_BHND, x_BNW) for q_BHND, k_BHND in pairs)
        x_BWN = total_BNW.transpose(1, 2) / len(pairs) * span_BW1 + mean_BW1
    return x_BWN


def token_weights(rows: list[list[list[list[list[int]]]]], positions: int, width: int) -> torch.Tensor:
    """(B, T, W) weights that merge text positions to words: the mean over a word's positions, added up over the
    streams of text where a model has several, and the mean over the words of a phrase that shares its map.

    Args:
        rows: per window, per map, per word that it is made of, per stream, the text positions.
        positions: T.
        width: W; windows with fewer maps end in columns of zeros.
    """
    out = torch.zeros(len(rows), positions, width)
    for row, maps in enumerate(rows):
        for column, words in enumerate(maps):
            for streams in words:
                for own in streams:
                    out[row, own, column] += 1 / len(own) / len(words)
    return out


def resize(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(..., Y, X) resized to (..., *size): exact area means where a side shrinks, bilinear where it grows."""
    if tuple(maps.shape[-2:]) == size:
        return maps
    rows = _resize_matrix(maps.shape[-2], size[0]).to(maps)
    columns = _resize_matrix(maps.shape[-1], size[1]).to(maps)
    return rows @ maps @ columns.T


def _resize_matrix(old: int, new: int) -> torch.Tensor:
    """(new, old) weights; every row sums to one."""
    out = torch.zeros(new, old, dtype=torch.float64)
    for cell in range(new):
        if new < old:
            start, end = cell * old / new, (cell + 1) * old / new
            for source in range(math.floor(start), math.ceil(end)):
                out[cell, source] = (min(end, source + 1) - max(start, source)) * new / old
        else:
            centre = min(max((cell + 0.5) * old / new - 0.5, 0.0), old - 1.0)
            low = min(int(centre), max(old - 2, 0))
            out[cell, low] += 1 - (centre - low)
            if old > 1:
                out[cell, low + 1] += centre - low
    return out.float()
