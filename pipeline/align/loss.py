"""The alignment loss: word maps of the student, through the Aligner, against the teacher's."""

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pipeline.align.aligner import Aligner, HeadMean
from pipeline.align.parallel import ParallelAttention
from pipeline.align.released import released_maps
from pipeline.student.capture import AttentionTap, layer_maps

if TYPE_CHECKING:
    from pipeline.align.config import AlignConfig
    from pipeline.student.batch import StudentBatch

SPREAD = 1e-6  # a map whose values differ by less is constant
# Maps that go through the Aligner together; at 32 x 32 cells and 32 channels each needs 1 MiB for its gradient. On an
# accelerator (128) starting kernels would cost more than memory does.
AT_ONCE = {"cpu": 4}


class AlignmentLoss(nn.Module):
    """Distance between aligned student maps and teacher maps.

    Per word: mean over its attention rows, onto the image plane per head, the Aligner layer by layer with the same
    weights, mean over layers, min-max to [0, 1], mean squared error over cells (Lavender, arXiv 2502.06814). Other
    orders and measures are settings, see `AlignConfig`.

    Args:
        heads: attention heads of the student's tapped layers.
        aligner: ``light``, ``sim``, ``deep`` or ``none``.
        hidden: the Aligner's channels.
        weight: factor of the value that calling the module gives.
        aggregation: ``per-layer``, ``mean``, ``max`` or ``flow``.
        measure: ``mse`` or ``kl``.
        compat: go from attention to maps as the released code does.
        sharpen: power to which the targets are raised.
        parallel: attention that is learnt instead of the student's own; its heads are ``heads``.
    """

    def __init__(
        self,
        heads: int,
        aligner: str = "sim",
        hidden: int = 32,
        weight: float = 1.0,
        aggregation: str = "per-layer",
        measure: str = "mse",
        compat: bool = False,
        sharpen: float = 1.0,
        parallel: ParallelAttention | None = None,
    ):
        super().__init__()
        channels = 1 if aggregation == "max" else heads
        self.aligner = HeadMean() if aligner == "none" else Aligner(channels, aligner, hidden)
        self.direct = aligner == "none"
        self.weight, self.aggregation, self.measure, self.compat = weight, aggregation, measure, compat
        self.sharpen, self.parallel = sharpen, parallel

    @classmethod
    def for_tap(cls, tap: AttentionTap, cfg: "AlignConfig", weight: float = 1.0) -> "AlignmentLoss":
        """The loss for a tapped model and the run's settings.

        Raises:
            UserError: ``align.attention=learned`` for a model that keeps the image apart from the text.
        """
        heads = {module.config.num_attention_heads for module in tap.layers.values()}
        if len(heads) != 1:
            raise ValueError(f"the tapped layers have different numbers of heads: {sorted(heads)}")
        settings = (cfg.aligner, cfg.hidden, weight, cfg.aggregation, cfg.measure, cfg.paper_compat, cfg.sharpen)
        if cfg.attention == "model":
            return cls(heads.pop(), *settings)
        tap.keep_hidden()
        parallel = ParallelAttention(list(tap.layers), next(iter(tap.layers.values())).config.hidden_size)
        return cls(parallel.heads, *settings, parallel=parallel)

    def forward(self, tap: AttentionTap, batch: "StudentBatch") -> torch.Tensor:
        """``weight`` times the mean over the batch's words with a usable map in ``batch.targets``; 0 without any."""
        if batch.targets is None:
            raise ValueError("batch.targets is empty: put the teacher's maps (W, 32, 32) there")
        valid = batch.valid
        if valid is None:
            valid = torch.ones(len(batch.words), dtype=torch.bool, device=batch.targets.device)
        total, count = self.sums(tap, batch, batch.targets, valid)
        return self.weight * total / count.clamp_min(1)

    def sums(
        self, tap: AttentionTap, batch: "StudentBatch", targets_WSS: torch.Tensor, valid_W: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum over words of each word's error, and the number of words in it, both scalars.

        Divide by the number of words of the whole global batch. The sum depends on every weight of the Aligner even
        without words, so that all ranks have the same gradients to exchange.

        Args:
            tap: after the model's forward with ``tap.rows(batch.words)``.
            targets_WSS: maps in [0, 1], of 32 cells a side whatever the side that is compared.
            valid_W: false for words to leave out; a constant target is left out by itself.
        """
        counted_W = valid_W & varies(targets_WSS)
        tie = sum((parameter.sum() for parameter in self.parameters()), targets_WSS.new_zeros(())) * 0.0
        if not len(batch.words):
            return tie, counted_W.sum()
        found_WSS = self.maps(tap, batch)
        targets_WSS = targets_WSS**self.sharpen
        if targets_WSS.shape[-1] != found_WSS.shape[-1]:
            targets_WSS = functional.adaptive_avg_pool2d(targets_WSS, found_WSS.shape[-1])
        error_W = self._error(found_WSS, targets_WSS.to(found_WSS.dtype))
        return torch.where(counted_W & varies(found_WSS), error_W, 0.0).sum() + tie, counted_W.sum()

    def maps(self, tap: AttentionTap, batch: "StudentBatch") -> torch.Tensor:
        """The student's aligned maps before any normalisation: (W, S, S)."""
        if self.compat:
            return released_maps(tap, batch, self.aligner)
        layers = self.parallel(tap, batch) if self.parallel else layer_maps(tap, batch)
        if self.aggregation == "per-layer":
            aligned = [self._aligned(raw_WHSS) for raw_WHSS in layers]
            return torch.stack(aligned, 1).mean(1)
        raw_WNHSS = torch.stack(layers, 1)
        if self.aggregation == "max":
            return self.aligner(raw_WNHSS.amax((1, 2))[:, None])
        if self.aggregation == "flow":
            # The layers' product, as its n-th root: it orders cells alike and does not vanish with many layers.
            return self.aligner(raw_WNHSS.clamp_min(SPREAD).log().mean(1).exp())
        return self.aligner(raw_WNHSS.mean(1))

    def _aligned(self, raw_WHSS: torch.Tensor) -> torch.Tensor:
        """(W, S, S): the Aligner on one layer's maps, some at a time and again in backward.

        What its convolutions keep of all words and layers would be more than all else that a step with gradient
        checkpointing needs.
        """
        if self.direct:
            return self.aligner(raw_WHSS)
        some = AT_ONCE.get(raw_WHSS.device.type, 128)
        parts = [
            checkpoint(self.aligner, part_MHSS, use_reentrant=False, preserve_rng_state=False)
            for part_MHSS in raw_WHSS.split(some)
        ]
        return torch.cat(parts).float()  # half precision under autocast

    def _error(self, found_WSS: torch.Tensor, targets_WSS: torch.Tensor) -> torch.Tensor:
        """(W,) each word's error."""
        if self.measure == "mse":
            return (min_max(found_WSS) - min_max(targets_WSS)).square().mean((1, 2))
        share_WS = targets_WSS.flatten(1) / targets_WSS.sum((1, 2)).clamp_min(SPREAD)[:, None]
        if self.direct:  # attention already, but for the share that lies off the image
            found_WS = found_WSS.flatten(1).clamp_min(SPREAD)
            log_WS = (found_WS / found_WS.sum(1, keepdim=True)).log()
        else:
            log_WS = found_WSS.flatten(1).log_softmax(1)
        return functional.kl_div(log_WS, share_WS, reduction="none").sum(1)


def varies(maps_WSS: torch.Tensor) -> torch.Tensor:
    """(W,) whether each map has different values at all."""
    if not len(maps_WSS):
        return torch.zeros(0, dtype=torch.bool, device=maps_WSS.device)
    return maps_WSS.amax((1, 2)) - maps_WSS.amin((1, 2)) > SPREAD


def min_max(maps_WSS: torch.Tensor) -> torch.Tensor:
    """Each map moved and scaled to [0, 1]; a constant one becomes 0."""
    low_W11, high_W11 = maps_WSS.amin((1, 2), keepdim=True), maps_WSS.amax((1, 2), keepdim=True)
    return (maps_WSS - low_W11) / (high_W11 - low_W11).clamp_min(SPREAD)
