"""The parts that OpenFlamingo adds to a vision tower and a language model: perceiver and gated cross-attention.

Flamingo (Alayrac et al., arXiv 2204.14198, section 3.1 and appendix A.1) as OpenFlamingo 2.0 trained it (Awadalla et
al., arXiv 2308.01390). Modules are named as in its checkpoints. Every attention goes through the attention functions
of transformers, so that it runs fused kernels and can be tapped.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class LatentAttention(nn.Module):
    """What both kinds of attention share: eight heads of 64 channels, no biases.

    Args:
        config: says which attention function runs (``_attn_implementation``); its submodel owns this module.
        heads, depth: attention heads and channels of each.
        width, source: channels of what asks and of what is asked.
    """

    is_causal = False

    def __init__(self, config: "PreTrainedConfig", heads: int, depth: int, width: int, source: int):
        super().__init__()
        self.config, self.heads, self.depth = config, heads, depth
        self.to_q = nn.Linear(width, heads * depth, bias=False)
        self.to_kv = nn.Linear(source, 2 * heads * depth, bias=False)
        self.to_out = nn.Linear(heads * depth, width, bias=False)

    def attend(
        self, query_BLC: torch.Tensor, source_BKC: torch.Tensor, mask_B1LK: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, L, C) before the output projection, and the probabilities where the attention function gives them.

        Args:
            mask_B1LK: bool, true where a query may look; None is everywhere.
        """
        query_BHLD = self._heads(self.to_q(query_BLC))
        key_BHKD, value_BHKD = (self._heads(half) for half in self.to_kv(source_BKC).chunk(2, dim=-1))
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        out_BLHD, probs_BHLK = attention(
            self, query_BHLD, key_BHKD, value_BHKD, mask_B1LK, scaling=self.depth**-0.5, dropout=0.0, is_causal=False
        )
        return out_BLHD.flatten(2), probs_BHLK

    def _heads(self, value_BLC: torch.Tensor) -> torch.Tensor:
        return value_BLC.unflatten(-1, (self.heads, self.depth)).transpose(1, 2)


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
    """The attention function without a fused kernel, which also returns its probabilities (B, H, L, K)."""
    scores_BHLK = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores_BHLK = scores_BHLK.masked_fill(~attention_mask, torch.finfo(scores_BHLK.dtype).min)
    probs_BHLK = scores_BHLK.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (probs_BHLK @ value).transpose(1, 2), probs_BHLK


class PerceiverAttention(LatentAttention):
    """Latents look at the image's patches and, in the same softmax, at themselves."""

    def __init__(self, config: "PreTrainedConfig", width: int, heads: int, depth: int):
        super().__init__(config, heads, depth, width, width)
        self.norm_media = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)

    def forward(self, patches_BPC: torch.Tensor, latents_BQC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What latents take from patches and latents, (B, Q, C), and the probabilities where the kernel gives them."""
        latents_BQC = self.norm_latents(latents_BQC)
        source_BKC = torch.cat([self.norm_media(patches_BPC), latents_BQC], dim=1)
        out_BQC, probs_BHQK = self.attend(latents_BQC, source_BKC)
        return self.to_out(out_BQC), probs_BHQK


def feed_forward(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False)
    )


class PerceiverResampler(nn.Module):
    """A fixed number of latents made of any number of patches.

    Args:
        config: see `LatentAttention`.
        width: channels of patches and latents.
        latents: how many.
        layers: attention and feed-forward, so many times.
        heads, depth: of each attention.
    """

    def __init__(self, config: "PreTrainedConfig", width: int, latents: int, layers: int, heads: int, depth: int):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, width))
        self.layers = nn.ModuleList(
            nn.ModuleList([PerceiverAttention(config, width, heads, depth), feed_forward(width)]) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, patches_BPC: torch.Tensor) -> torch.Tensor:
        """(B, P, C) patches to (B, Q, C) latents."""
        latents_BQC = self.latents.expand(len(patches_BPC), -1, -1)
        for attention, forward in self.layers:
            latents_BQC = latents_BQC + attention(patches_BPC, latents_BQC)[0]
            latents_BQC = latents_BQC + forward(latents_BQC)
        return self.norm(latents_BQC)


class MaskedCrossAttention(LatentAttention):
    """Text looks at the latents of the last image before it."""

    def __init__(self, config: "PreTrainedConfig", width: int, source: int, heads: int, depth: int):
        super().__init__(config, heads, depth, width, source)
        self.norm = nn.LayerNorm(width)

    def forward(
        self, text_BLC: torch.Tensor, latents_BIQC: torch.Tensor, image_BL: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What text takes from the images, (B, L, C), and the probabilities where the kernel gives them.

        Args:
            latents_BIQC: Q latents of each of I images.
            image_BL: number of the image that each position looks at, from 1; 0 looks at none and takes nothing.
        """
        images, latents = latents_BIQC.shape[1:3]
        mask_B1LK = None
        if images > 1:  # of one image all latents are in sight, and kernels are fastest without a mask
            owner_K = torch.arange(1, images + 1, device=image_BL.device).repeat_interleave(latents)
            # A position without an image may look anywhere, as a softmax over nothing is NaN; it takes nothing below.
            mask_B1LK = ((image_BL[:, :, None] == owner_K) | (image_BL == 0)[:, :, None])[:, None]
        out_BLC, probs_BHLK = self.attend(self.norm(text_BLC), latents_BIQC.flatten(1, 2), mask_B1LK)
        out_BLC = out_BLC.masked_fill((image_BL == 0)[:, :, None], 0.0)
        return self.to_out(out_BLC), probs_BHLK


class GatedCrossAttention(GradientCheckpointingLayer):
    """Cross-attention and feed-forward before a layer of the language model, each behind a gate that starts closed."""

    def __init__(self, config: "PreTrainedConfig", width: int, source: int, heads: int, depth: int):
        super().__init__()
        self.attn = MaskedCrossAttention(config, width, source, heads, depth)
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.ff = feed_forward(width)
        self.ff_gate = nn.Parameter(torch.zeros(1))

    def forward(
        self, text_BLC: torch.Tensor, latents_BIQC: torch.Tensor, image_BL: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        seen_BLC, probs_BHLK = self.attn(text_BLC, latents_BIQC, image_BL)
        text_BLC = text_BLC + seen_BLC * self.attn_gate.tanh()
        return text_BLC + self.ff(text_BLC) * self.ff_gate.tanh(), probs_BHLK
