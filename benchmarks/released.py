"""The way of the code released with the paper from attention to loss, step by step, for timing only.

What its `diffag_xattn_manager.py` does (AstraZeneca/vlm, llama_finetune/src/llama_recipes/diffag), in our words:
attention is eager in all layers and gives out its weights. Each layer that looks at the image clones them and,
instance by instance, stretches the image tokens of EVERY text position and head to a square number, folds them into a
square, puts the squares of the tiles onto a canvas, resizes that to 32x32, and lays the result out as heads x cells x
positions, which is cloned and stored. After the forward the stored layers are stacked and each layer's maps go
through the Aligner, one map a position. Their mean is taken apart in Python: token by token, maps are added up under
the token's text; word by word, they are averaged, scaled to [0, 1], resized again and compared with the teacher's map
of that text.

Two things are kinder to it than it is: the text of a position is that of the label instead of a decoded prediction, so
that words match from the first step on, and nothing is decoded more than once.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch.nn import functional

SIDE = 32
EPSILON = 1e-6


def resized(maps_NHYX: torch.Tensor) -> torch.Tensor:
    """To 32x32 as torchvision's ``Resize``: bilinear with antialiasing."""
    return functional.interpolate(maps_NHYX, size=(SIDE, SIDE), mode="bilinear", antialias=True)


def cross_layer(weights_BHLK: torch.Tensor, tiles_B: Sequence[int], slots: int = 4) -> torch.Tensor:
    """What a cross-attention layer stores: (B, H, 1024, L).

    Args:
        weights_BHLK: its attention, over ``slots`` tiles of equal length.
        tiles_B: tiles in use in each image.
    """
    kept = []
    weights_BHLK = weights_BHLK.clone()
    _, heads, length, keys = weights_BHLK.shape
    side = math.isqrt(keys // slots - 1) + 1
    for weights_HLK, tiles in zip(weights_BHLK, tiles_B, strict=True):
        tokens_HLTN = weights_HLK.unflatten(2, (slots, keys // slots))
        lines_MHN = tokens_HLTN.permute(1, 2, 0, 3).reshape(length * slots, heads, -1)
        lines_MHN = functional.interpolate(lines_MHN, size=side * side, mode="linear", align_corners=False)
        squares_LHTSS = lines_MHN.view(length, slots, heads, side, side).transpose(1, 2)
        if tiles == 1:
            canvas = squares_LHTSS[:, :, 0]
        else:
            canvas = weights_HLK.new_zeros(length, heads, side if tiles == 2 else 2 * side, 2 * side)
            for tile in range(tiles):
                y, x = tile // 2 * side, tile % 2 * side
                canvas[:, :, y : y + side, x : x + side] = squares_LHTSS[:, :, tile]
        kept.append(resized(canvas).permute(1, 2, 3, 0).reshape(heads, SIDE * SIDE, length))
    return torch.stack(kept).clone()


def self_layer(weights_BHLL: torch.Tensor, text_BL: torch.Tensor, image_BL: torch.Tensor) -> torch.Tensor:
    """What a self-attention layer stores of the text's attention to the image: (B, H, 1024, most text positions).

    Args:
        weights_BHLL: its attention.
        text_BL, image_BL: which positions are text, and which the image's.
    """
    kept = []
    weights_BHLL = weights_BHLL.clone()
    most = int(text_BL.sum(1).max())
    for weights_HLL, text_L, image_L in zip(weights_BHLL, text_BL, image_BL, strict=True):
        block_HLN = weights_HLL[:, text_L.nonzero()[:, 0]][:, :, image_L.nonzero()[:, 0]]
        side = math.isqrt(block_HLN.shape[2] - 1) + 1
        lines_HLN = functional.interpolate(block_HLN.clone(), size=side * side, mode="linear", align_corners=False)
        maps_LHSS = resized(lines_HLN.transpose(0, 1).reshape(-1, len(block_HLN), side, side))
        kept.append(functional.pad(maps_LHSS, (0, 0, 0, 0, 0, 0, 0, most - len(maps_LHSS))))
    return torch.stack(kept).permute(0, 2, 3, 4, 1).flatten(2, 3).clone()


def loss(
    stored: Sequence[torch.Tensor],
    aligner: Callable[[torch.Tensor], torch.Tensor],
    tokens_B: Sequence[Sequence[str]],
    maps_B: Sequence[Mapping],
) -> torch.Tensor:
    """The mean over instances of the mean error over words.

    Args:
        stored: (B, H, 1024, L) of each layer.
        aligner: (N, H, 32, 32) to (N, 32, 32), float32.
        tokens_B: for each instance, the text of the token that each position predicts.
        maps_B: for each, the teacher's maps (32, 32) by word.
    """
    layers_NBHCL = torch.stack(list(stored))
    found = []
    for layer_BHCL in layers_NBHCL:
        maps_MHSS = layer_BHCL.permute(0, 3, 1, 2).flatten(0, 1).unflatten(2, (SIDE, SIDE))
        found.append(aligner(maps_MHSS).unflatten(0, (layer_BHCL.shape[0], -1)))
    mean_BLSS = torch.stack(found).mean(0)
    errors = []
    for maps_LSS, tokens, targets in zip(mean_BLSS, tokens_B, maps_B, strict=True):
        sums: dict[str, torch.Tensor] = {}
        counts: dict[str, int] = {}
        for map_SS, token in zip(maps_LSS, tokens, strict=False):
            word = token.strip()
            sums[word] = sums[word] + map_SS if word in sums else map_SS.clone()
            counts[word] = counts.get(word, 0) + 1
        scaled = {}
        for word, total in sums.items():
            mean = total / counts[word]
            scaled[word] = resized(((mean - mean.min()) / (mean.max() - mean.min() + EPSILON))[None, None])[0, 0]
        same = [functional.mse_loss(scaled[word], target) for word, target in targets.items() if word in scaled]
        errors.append(sum(same) / max(len(same), 1))
    return sum(errors) / len(errors)
