"""Where image tokens lie on the image, and how attention over them becomes a map of the whole image.

A patch is a rectangle of the image; its attention is spread evenly over it, and a cell of the map gets the part that
falls inside. Rectangles are given in fractions of the WHOLE image, so any size, tiling or padding is exact: a patch
that lies half in the padding gives half of its attention to the image and loses the rest.

Where a perceiver or resampler (a *relay*) stands between the patches and the text, text attends to latents that have
no place of their own. A latent's attention is then handed on to the patches by the relay's own attention.
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
        columns_HW: key index of the token of each patch, row by row; behind a relay, of each patch among its keys.
        top, left: corner of the grid in fractions of the image's height and width.
        step_y, step_x: height and width of one patch in the same fractions.
        latents_Q: behind a relay, key index of the token of each of its Q latents; None without.
    """

    columns_HW: np.ndarray
    top: float
    left: float
    step_y: float
    step_x: float
    latents_Q: np.ndarray | None = None


@dataclass
class Planes:
    """The geometry of a batch: B examples of up to T pieces of up to h x w patches.

    Args:
        columns: (B, T, h, w) long, key index of each patch's token; 0 where there is none.
        rows_y: (B, T, 32, h), share of each patch row's height that lies in each row of cells; 0 where there is none.
        rows_x: (B, T, 32, w), the same for widths.
        latents: (B, T, Q) long, behind a relay the key index of each latent's token, and `columns` counts the relay's
            keys; None without a relay.
        source: (B, T) long, which row of the relay's own batch is this piece. The relay's batch is taken to hold the
            pieces of the first example, then of the second, and so on; a family whose relay runs on something else
            (an empty image for a text-only example) sets it in its ``collate``.
    """

    columns: torch.Tensor
    rows_y: torch.Tensor
    rows_x: torch.Tensor
    latents: torch.Tensor | None = None
    source: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> "Planes":
        values = (self.columns, self.rows_y, self.rows_x, self.latents, self.source)
        return Planes(*(None if value is None else value.to(device, non_blocking=True) for value in values))

    def shift(self, by_B: torch.Tensor) -> None:
        """Moves the image's tokens by so many places of padding, for models that have them among the text."""
        if self.latents is None:
            self.columns = self.columns + by_B[:, None, None, None]
        else:
            self.latents = self.latents + by_B[:, None, None]

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
        made = [torch.from_numpy(columns), torch.from_numpy(rows_y), torch.from_numpy(rows_x)]
        if pieces and pieces[0].latents_Q is not None:
            latents = np.zeros((len(examples), tiles, len(pieces[0].latents_Q)), np.int64)
            source = np.zeros((len(examples), tiles), np.int64)
            count = 0
            for b, example in enumerate(examples):
                for t, piece in enumerate(example):
                    latents[b, t], source[b, t] = piece.latents_Q, count
                    count += 1
            made += [torch.from_numpy(latents), torch.from_numpy(source)]
        return cls(*made)


def shares(start: float, step: float, count: int, side: int = SIDE) -> np.ndarray:
    """(side, count): the share of interval j, [start + j step, start + (j+1) step], inside cell i of [0, 1]."""
    low_N = start + step * np.arange(count)
    cell_C = np.arange(side)[:, None] / side
    overlap_CN = np.minimum(cell_C + 1 / side, low_N + step) - np.maximum(cell_C, low_N)
    return np.clip(overlap_CN, 0, None) / step


def project(probs_BHSK: torch.Tensor, planes: Planes) -> torch.Tensor:
    """Attention over keys onto the image: (B, H, S, C, C) for planes of C cells a side, in units of an even spread.

    A value of 1 is what every cell has when all attention goes to the image and is spread evenly; the unit keeps
    maps of models with a hundred keys and with six thousand in the same range, which the Aligner's normalisation
    needs.

    Args:
        probs_BHSK: attention of S positions of each example over all keys.
        planes: the batch's geometry.
    """
    batch, heads, slots, _ = probs_BHSK.shape
    _, tiles, height, width = planes.columns.shape
    side = planes.rows_y.shape[2]
    # All of a tile's patches side by side, then all columns of cells with one product, then all rows.
    if not tiles:
        return probs_BHSK.new_zeros(batch, heads, slots, side, side)
    index_BHSN = planes.columns.flatten(1)[:, None, None].expand(-1, heads, slots, -1)
    patches_BMTHW = probs_BHSK.gather(3, index_BHSN).view(batch, -1, tiles, height, width)
    strips = [
        (patches_BMHW.reshape(batch, -1, width) @ rows_x_BCW.transpose(1, 2)).view(batch, -1, height, side)
        for patches_BMHW, rows_x_BCW in zip(patches_BMTHW.unbind(2), planes.rows_x.unbind(1), strict=True)
    ]
    down_BCP = planes.rows_y.transpose(1, 2).flatten(2) * side**2
    return (down_BCP[:, None] @ torch.cat(strips, 2)).view(batch, heads, slots, side, side)


def latent_maps(relay_NQK: torch.Tensor, planes: Planes) -> torch.Tensor:
    """Where each latent looks: (B, T Q, S, S), the share of its attention that falls into each cell.

    Args:
        relay_NQK: the relay's attention from latents to its keys, for the N pieces of its batch.
        planes: the batch's geometry, with ``latents``.
    """
    examples, tiles, height, width = planes.columns.shape
    latents = relay_NQK.shape[1]
    piece_BTQK = relay_NQK[planes.source]
    index_BTQP = planes.columns.flatten(2)[:, :, None].expand(-1, -1, latents, -1)
    patches_BTQHW = piece_BTQK.gather(3, index_BTQP).view(examples, tiles, latents, height, width)
    # A piece that an example does not have has no share in any cell.
    spread_BTQSW = torch.einsum("btsh,btqhw->btqsw", planes.rows_y, patches_BTQHW)
    return torch.einsum("btqsw,btcw->btqsc", spread_BTQSW, planes.rows_x).flatten(1, 2)


def patches_of(relays_NQK: Sequence[torch.Tensor]) -> torch.Tensor:
    """The attention of a perceiver's latents to patches, (N, Q, P), from that of its layers, whose last Q keys are the
    latents themselves.

    Every layer adds to a latent, so the layers' attention is averaged; what latents give to latents is left out, and
    the rest scaled to sum to one.
    """
    latents = relays_NQK[0].shape[1]
    patches_NQP = torch.stack(list(relays_NQK)).mean(0)[..., :-latents]
    return patches_NQP / patches_NQP.sum(-1, keepdim=True)


def project_latents(probs_BHSK: torch.Tensor, latents_BNCC: torch.Tensor, planes: Planes) -> torch.Tensor:
    """`project` through a relay: (B, H, S, C, C), attention to each latent times where the latent looks.

    Args:
        probs_BHSK: attention of S positions of each example over all keys.
        latents_BNCC: what `latent_maps` gives.
        planes: the batch's geometry.
    """
    batch, heads, slots, _ = probs_BHSK.shape
    side = latents_BNCC.shape[-1]
    index_BHSN = planes.latents.flatten(1)[:, None, None].expand(-1, heads, slots, -1)
    share_BMN = probs_BHSK.gather(3, index_BHSN).flatten(1, 2)
    return (share_BMN @ latents_BNCC.flatten(2)).view(batch, heads, slots, side, side) * side**2
