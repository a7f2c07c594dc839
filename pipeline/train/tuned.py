"""The module that is trained: the student and the Aligner as one, and the sums of its two losses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.student.batch import IGNORED
from pipeline.train import crossentropy

if TYPE_CHECKING:
    from pipeline.align.loss import AlignmentLoss
    from pipeline.student.batch import StudentBatch
    from pipeline.student.capture import AttentionTap


class Tuned(nn.Module):
    """The student and the Aligner as one module, so that one wrapper (DDP, FSDP) sees every trained weight.

    Args:
        student: the model, a PEFT model too.
        align: the alignment loss.
        tap: on the student.
        logits_bytes: float32 logits of a micro-batch that take more are computed in chunks of this size.
    """

    def __init__(self, student: nn.Module, align: AlignmentLoss, tap: AttentionTap, logits_bytes: int = 256 << 20):
        super().__init__()
        self.student, self.align, self.tap = student, align, tap
        self.logits_bytes = logits_bytes
        self._tail = None  # what the student does with its logits, once it is known
        self._whole = False  # whether chunks were found impossible

    def forward(self, batch: StudentBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sums over a micro-batch: cross-entropy over its label tokens, alignment error over its words, and how many
        words that is."""
        self.tap.rows(batch.words)
        ce = self.language(batch)
        aligned, words = self.align.sums(self.tap, batch, batch.targets, batch.valid)
        return ce, aligned, words

    def language(self, batch: StudentBatch) -> torch.Tensor:
        """The student's forward: the sum of the cross-entropy over the label tokens."""
        # The logit at position p predicts token p + 1; positions that predict nothing learnt need no logits.
        following_BL = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
        needed_P = (following_BL != IGNORED).any(0).nonzero().squeeze(1)
        following_BP = following_BL[:, needed_P]
        head = self.get_output_embeddings()
        if not self._whole and following_BP.numel() * vocabulary(head) * 4 > self.logits_bytes:
            ce = self._chunked(batch, needed_P, following_BP, head)
            if ce is not None:
                return ce
        logits_BPV = self.student(**batch.inputs, logits_to_keep=needed_P, use_cache=False).logits.float()
        return F.cross_entropy(logits_BPV.flatten(0, 1), following_BP.flatten(), ignore_index=IGNORED, reduction="sum")

    def _chunked(
        self, batch: StudentBatch, needed_P: torch.Tensor, following_BP: torch.Tensor, head: nn.Module | None
    ) -> torch.Tensor | None:
        """The same without the logits of all positions at once; None where this model does not allow it."""
        if head is None:
            return self._give_up("it has no output layer of its own to call")
        first = self._tail is None
        with crossentropy.without_head(head, first) as seen:
            made = self.student(**batch.inputs, logits_to_keep=needed_P, use_cache=False).logits
        if seen.hidden_BPC is None or seen.hidden_BPC.shape[:2] != following_BP.shape:
            return self._give_up("its output layer is given other positions than those asked for")
        if any(hasattr(parameter, "full_tensor") for parameter in head.parameters()):
            return self._give_up("its output layer's weights are not held whole after its forward")
        if first:
            settings = self.student.config.get_text_config()
            self._tail = crossentropy.Tails(settings).find(seen.first_11V, made.detach())
            if self._tail is None:
                return self._give_up("what it does with its logits is not known")
        learnt_BP = following_BP != IGNORED
        rows = max(self.logits_bytes // (4 * vocabulary(head)), 1)
        return crossentropy.summed(seen.hidden_BPC[learnt_BP], following_BP[learnt_BP], head, self._tail, rows)

    def _give_up(self, why: str) -> None:
        print(f"logits of whole micro-batches are held at once for {type(self.student).__name__}: {why}", flush=True)
        self._whole = True

    # What wrappers ask a model for.

    def get_input_embeddings(self) -> nn.Module:
        return self.student.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        """The layer that makes logits: the student's own, or its language model's."""
        from transformers import PreTrainedModel

        for module in self.student.modules():
            if isinstance(module, PreTrainedModel) and (head := module.get_output_embeddings()) is not None:
                return head
        return None

    def tie_weights(self, *args, **kwargs) -> None:
        self.student.tie_weights(*args, **kwargs)

    @property
    def _no_split_modules(self) -> list[str]:
        return self.student._no_split_modules


def vocabulary(head: nn.Module | None) -> int:
    """The number of logits that an output layer gives at each position; 0 without one."""
    if head is None:
        return 0
    return getattr(head, "out_features", 0) or next(head.parameters()).shape[0]
