"""Attention learnt beside the student's own, for alignment only (the ``learn_xattn`` of Lavender, arXiv 2502.06814).

In models that have the image among the text, new query and key projections of a layer's input say where each word
looks. The alignment reaches the hidden states and leaves the model's own attention to its own work.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from pipeline.student.capture import word_mean
from pipeline.student.planes import project

if TYPE_CHECKING:
    from pipeline.student.batch import StudentBatch
    from pipeline.student.capture import AttentionTap


class ParallelAttention(nn.Module):
    """Maps of words from projections of its own.

    Args:
        layers: the layers that are read.
        width: of their hidden states.
        heads, depth: of the projections, which have no bias and no rotary embedding.
    """

    def __init__(self, layers: Sequence[int], width: int, heads: int = 8, depth: int = 32):
        super().__init__()
        self.heads = heads
        self.query = nn.ModuleDict({str(index): nn.Linear(width, heads * depth, bias=False) for index in layers})
        self.key = nn.ModuleDict({str(index): nn.Linear(width, heads * depth, bias=False) for index in layers})

    def forward(self, tap: "AttentionTap", batch: "StudentBatch") -> list[torch.Tensor]:
        """(W, heads, S, S) for each layer, in the units of `planes.project`: a softmax over the image's tokens."""
        words, planes = batch.words, batch.planes
        side = planes.rows_y.shape[2]
        if not len(words):
            return [planes.rows_y.new_zeros(0, self.heads, side, side)] * len(self.query)
        examples, tiles, height, width = planes.columns.shape
        used_BN = (planes.rows_y.any(2)[..., :, None] & planes.rows_x.any(2)[..., None, :]).flatten(1)
        # The same geometry for probabilities over the image's tokens alone, in the order of the pieces.
        count = tiles * height * width
        order = torch.arange(count, device=used_BN.device).view(1, tiles, height, width).expand(examples, -1, -1, -1)
        alone = replace(planes, columns=order)
        found = []
        for index, hidden_BLC in tap.hidden(words).items():
            query_BSC = taken(hidden_BLC, words.slots).float()
            image_BNC = taken(hidden_BLC, planes.columns.flatten(1)).float()
            query_BHSD = self.query[str(index)](query_BSC).unflatten(2, (self.heads, -1)).transpose(1, 2)
            key_BHND = self.key[str(index)](image_BNC).unflatten(2, (self.heads, -1)).transpose(1, 2)
            scores_BHSN = query_BHSD @ key_BHND.transpose(2, 3) * query_BHSD.shape[-1] ** -0.5
            scores_BHSN = scores_BHSN.float().masked_fill(~used_BN[:, None, None], torch.finfo(torch.float32).min)
            found.append(word_mean(project(scores_BHSN.softmax(-1), alone), words))
        return found


def taken(hidden_BLC: torch.Tensor, places_BN: torch.Tensor) -> torch.Tensor:
    """(B, N, C): hidden states at some positions of each example."""
    return hidden_BLC.gather(1, places_BN[:, :, None].expand(-1, -1, hidden_BLC.shape[2]))
