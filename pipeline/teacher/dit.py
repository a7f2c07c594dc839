"""Diffusion transformers in which image and text attend together: Stable Diffusion 3 and Flux.

A block's one attention runs over image and text tokens; what is read is the part of the image's rows that falls on
the text. SD3 puts the image first, Flux the text; Flux's later blocks get one sequence and are told nothing of the
border between the two, so it travels with the capture.
"""

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb

from pipeline.errors import UserError
from pipeline.teacher.adapter import Adapter
from pipeline.teacher.capture import Capture, Layer
from pipeline.teacher.config import TeacherConfig
from pipeline.teacher.text import Condition, FluxText, SD3Text
from pipeline.teacher.unet import choose_layers, shallow

GUIDANCE = 1.0  # what guidance-distilled models are told: none


class JointProcessor:
    """SD3's attention as diffusers computes it, handing the image's queries and all keys to a `Capture`.

    Args:
        layer: the layer as it enters the maps, or None if it does not.
        keep: whether the image's queries and keys are kept for refinement.
    """

    def __init__(self, layer: Layer | None = None, keep: bool = False):
        self.layer = layer
        self.keep = keep

    def __call__(
        self,
        attn,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        capture: Capture | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        assert attention_mask is None
        cells = hidden_states.shape[1]
        q, k, v = (_heads(attn, part(hidden_states)) for part in (attn.to_q, attn.to_k, attn.to_v))
        q = attn.norm_q(q) if attn.norm_q is not None else q
        k = attn.norm_k(k) if attn.norm_k is not None else k
        if encoder_hidden_states is not None:
            parts = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            text_q, text_k, text_v = (_heads(attn, part(encoder_hidden_states)) for part in parts)
            text_q = attn.norm_added_q(text_q) if attn.norm_added_q is not None else text_q
            text_k = attn.norm_added_k(text_k) if attn.norm_added_k is not None else text_k
            q, k, v = torch.cat([q, text_q], 2), torch.cat([k, text_k], 2), torch.cat([v, text_v], 2)
        if capture is not None and self.layer is not None:
            capture.add_joint(self.layer, q[:, :, :cells], k, slice(cells, None), q.shape[-1] ** -0.5)
        if capture is not None and self.keep:
            capture.keep(q[:, :, :cells], k[:, :, :cells])
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).to(q.dtype)
        image = attn.to_out[1](attn.to_out[0](out[:, :cells]))
        if encoder_hidden_states is None:
            return image
        text = out[:, cells:]
        return image, text if attn.context_pre_only else attn.to_add_out(text)


class FluxProcessor:
    """Flux's attention as diffusers computes it, in both kinds of block; see `JointProcessor`."""

    def __init__(self, layer: Layer | None = None, keep: bool = False):
        self.layer = layer
        self.keep = keep

    def __call__(
        self,
        attn,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        capture: Capture | None = None,
        words: int = 0,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """`words` is the number of text tokens, for blocks that get text and image as one sequence."""
        assert attention_mask is None
        shape = (-1, attn.head_dim)
        q, k, v = (part(hidden_states).unflatten(-1, shape) for part in (attn.to_q, attn.to_k, attn.to_v))
        q, k = attn.norm_q(q), attn.norm_k(k)
        if encoder_hidden_states is not None:
            words = encoder_hidden_states.shape[1]
            parts = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            text_q, text_k, text_v = (part(encoder_hidden_states).unflatten(-1, shape) for part in parts)
            q = torch.cat([attn.norm_added_q(text_q), q], 1)
            k = torch.cat([attn.norm_added_k(text_k), k], 1)
            v = torch.cat([text_v, v], 1)
        if image_rotary_emb is not None:
            q = apply_rotary_emb(q, image_rotary_emb, sequence_dim=1)
            k = apply_rotary_emb(k, image_rotary_emb, sequence_dim=1)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if capture is not None and self.layer is not None:
            capture.add_joint(self.layer, q[:, :, words:], k, slice(0, words), q.shape[-1] ** -0.5)
        if capture is not None and self.keep:
            capture.keep(q[:, :, words:], k[:, :, words:])
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).to(q.dtype)
        if encoder_hidden_states is None:
            return out
        image = attn.to_out[1](attn.to_out[0](out[:, words:].contiguous()))
        return image, attn.to_add_out(out[:, :words].contiguous())


def _heads(attn, projected_BNC: torch.Tensor) -> torch.Tensor:
    return projected_BNC.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


class _TransformerAdapter(Adapter):
    """What both have in common: rectified flow, one grid, blocks in a row.

    A timestep is a thousandth of the share of noise: latents at t are (1 - t/1000) signal and t/1000 noise.
    """

    needs = (*Adapter.needs, "text_encoder_2", "tokenizer_2")

    def _choose(self, names: Sequence[str], cfg: TeacherConfig) -> tuple[dict[str, Layer], set[str]]:
        if cfg.inversion != "none":
            raise UserError(f"teacher.inversion={cfg.inversion} needs a model with a UNet: use teacher.inversion=none")
        places = [(name, self.top) for name in names]
        self.layers, kept = choose_layers(places, places, cfg)
        kept = [(name, side) for name, side in kept if re.search(cfg.layers, name)]
        self.refine_side = self.top if kept else 0
        return {layer.name: layer for layer in self.layers}, {name for name, _ in kept}

    def noised(self, latents_BCYX: torch.Tensor, noise_BCYX: torch.Tensor, timestep: int) -> torch.Tensor:
        share = timestep / 1000
        return (1 - share) * latents_BCYX + share * noise_BCYX


class SD3Adapter(_TransformerAdapter):
    """Stable Diffusion 3 and 3.5. Layers are `transformer_blocks.N.attn`."""

    def __init__(self, parts: dict, cfg: TeacherConfig, device: torch.device):
        transformer = parts["transformer"]
        config = transformer.config
        super().__init__(parts, cfg, device, config.sample_size, config.in_channels, config.patch_size)
        most = config.pos_embed_max_size * self.factor * self.patch
        if self.longest > most:
            raise UserError(f"teacher.image_size is {self.side}: this model knows places up to {most} pixels a side")
        self.top = config.sample_size // config.patch_size
        self.columns = config.attention_head_dim  # as wide as the values of fused attention, so it costs nothing
        self.text = SD3Text(parts)
        names = [f"transformer_blocks.{number}.attn" for number in range(len(transformer.transformer_blocks))]
        used, keep = self._choose(names, cfg)
        for name, block in zip(names, transformer.transformer_blocks, strict=True):
            block.attn.set_processor(JointProcessor(used.get(name), name in keep))
            if block.attn2 is not None:
                block.attn2.set_processor(JointProcessor())
        last = max(names.index(name) for name in (*used, *keep))
        self.transformer = shallow(transformer)
        self.transformer.transformer_blocks = transformer.transformer_blocks[: last + 1]
        if cfg.compile:
            self.transformer = torch.compile(self.transformer)

    def forward(self, noised_BCYX: torch.Tensor, timestep: int, condition: Condition, capture: Capture) -> None:
        self.transformer(
            hidden_states=noised_BCYX.to(self.dtype),
            timestep=torch.full((len(noised_BCYX),), timestep, device=self.device, dtype=self.dtype),
            encoder_hidden_states=condition.hidden_BTC,
            pooled_projections=condition.pooled_BC,
            joint_attention_kwargs={"capture": capture},
            return_dict=False,
        )


class FluxAdapter(_TransformerAdapter):
    """Flux.1. Layers are `transformer_blocks.N.attn`, then `single_transformer_blocks.N.attn`."""

    def __init__(self, parts: dict, cfg: TeacherConfig, device: torch.device):
        transformer = parts["transformer"]
        # The transformer states no size; the published pipeline works at 128 latents a side.
        super().__init__(parts, cfg, device, 128, transformer.config.in_channels // 4, 2)
        self.top = self.side // self.factor // 2
        self.columns = transformer.config.attention_head_dim
        self.text = FluxText(parts)
        self.guided = transformer.config.guidance_embeds
        double = [f"transformer_blocks.{number}.attn" for number in range(len(transformer.transformer_blocks))]
        single = [
            f"single_transformer_blocks.{number}.attn" for number in range(len(transformer.single_transformer_blocks))
        ]
        used, keep = self._choose(double + single, cfg)
        for name in double + single:
            transformer.get_submodule(name).set_processor(FluxProcessor(used.get(name), name in keep))
        last = max((double + single).index(name) for name in (*used, *keep))
        self.transformer = shallow(transformer)
        self.transformer.transformer_blocks = transformer.transformer_blocks[: last + 1]
        self.transformer.single_transformer_blocks = transformer.single_transformer_blocks[
            : max(0, last + 1 - len(double))
        ]
        if cfg.compile:
            self.transformer = torch.compile(self.transformer)

    def forward(self, noised_BCYX: torch.Tensor, timestep: int, condition: Condition, capture: Capture) -> None:
        batch, _, height, width = noised_BCYX.shape
        patches = noised_BCYX.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (B, C, Y/2, 2, X/2, 2)
        hidden_BNC = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
        words = condition.hidden_BTC.shape[1]
        self.transformer(
            hidden_states=hidden_BNC.to(self.dtype),
            timestep=torch.full((batch,), timestep / 1000, device=self.device, dtype=self.dtype),
            guidance=torch.full((batch,), GUIDANCE, device=self.device) if self.guided else None,
            encoder_hidden_states=condition.hidden_BTC,
            pooled_projections=condition.pooled_BC,
            txt_ids=torch.zeros(words, 3, device=self.device, dtype=self.dtype),
            img_ids=places.to(self.device, self.dtype),
            joint_attention_kwargs={"capture": capture, "words": words},
            return_dict=False,
        )
