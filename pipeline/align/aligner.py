"""The Aligner: the small convolutional network between the student's attention and the teacher's map."""

from itertools import pairwise

import torch
from torch import nn

# Wide 3x3 convolutions of each size; a 1x1 convolution to one channel follows. Lavender (arXiv 2502.06814).
DEPTHS = {"light": 2, "sim": 3, "deep": 5}


class Aligner(nn.Module):
    """Attention of all heads of one layer to one map.

    3x3 convolutions heads -> hidden, hidden -> hidden (none for `light`, one for `sim`, three for `deep`) and
    hidden -> heads, each without bias and followed by instance norm and ReLU6, then a 1x1 convolution heads -> 1. As in
    the released code, the third and fourth convolution of `deep` have no norm.

    Args:
        heads: attention heads, the input channels.
        size: ``light``, ``sim`` or ``deep``.
        hidden: channels in between.
    """

    def __init__(self, heads: int, size: str = "sim", hidden: int = 32):
        super().__init__()
        widths = [heads] + [hidden] * (DEPTHS[size] - 1) + [heads]
        blocks: list[nn.Module] = []
        for place, (inputs, outputs) in enumerate(pairwise(widths)):
            blocks.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
            if place not in (2, 3) or place == len(widths) - 2:
                blocks.append(nn.InstanceNorm2d(outputs))
            blocks.append(nn.ReLU6(inplace=True))
        self.body = nn.Sequential(*blocks, nn.Conv2d(heads, 1, 1))

    def forward(self, maps_NHSS: torch.Tensor) -> torch.Tensor:
        """(N, heads, S, S) to (N, S, S)."""
        return self.body(maps_NHSS)[:, 0]


class HeadMean(nn.Module):
    """In the Aligner's place, nothing but the mean over heads: the attention itself is compared.

    The Aligner's instance norm lets faint attention of any sign pass for the map; this does not.
    """

    def forward(self, maps_NHSS: torch.Tensor) -> torch.Tensor:
        """(N, heads, S, S) to (N, S, S)."""
        return maps_NHSS.mean(1)
