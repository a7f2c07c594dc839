"""MiniCPM-Llama3-V 2.5 as a model of transformers: Llama 3, the vision tower of Idefics2, and a resampler between them.

The architecture of Yao et al., arXiv 2408.01800, section 3.1. Parameters are named as in the published checkpoint
(`llm.*`, `vpm.*`, `resampler.*`), and so are the settings in its config.
"""

from dataclasses import fields
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional
from transformers import GenerationMixin, LlamaConfig, LlamaForCausalLM, PreTrainedConfig, initialization
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer

from pipeline.student.perceiver import eager_attention

HEAD = 128  # channels of a head of the resampler's attention
IMAGE = ("pixel_values", "target_sizes", "patch_positions", "image_mask")  # inputs of the first step of generation only


class MiniCPMVConfig(LlamaConfig):
    """The published config: Llama's own settings side by side with the others.

    Args:
        vision_config: of the vision tower.
        query_num: latents of the resampler, which are the image tokens of a slice.
        patch_size: pixels on a side of a patch.
        slice_mode: cut large images into slices.
        slice_config: ``max_slice_nums`` and ``scale_resolution``, the side of a slice in pixels.
        drop_vision_last_layer: the vision tower goes without its last layer.
    """

    model_type = "minicpmv"
    sub_configs: ClassVar = {"vision_config": Idefics2VisionConfig}

    vision_config: dict | PreTrainedConfig | None = None
    query_num: int = 96
    patch_size: int = 14
    slice_mode: bool = True
    slice_config: dict | None = None
    drop_vision_last_layer: bool = False

    def __post_init__(self, **kwargs):
        if not isinstance(self.vision_config, PreTrainedConfig):
            stated = dict(self.vision_config or {})
            stated.pop("model_type", None)  # the published one says "idefics2", which is the whole model's
            self.vision_config = Idefics2VisionConfig(**stated)
        super().__post_init__(**kwargs)

    def llama(self) -> LlamaConfig:
        """The language model's settings alone, as an object of its own: its attention is switched by itself."""
        names = {one.name for one in fields(LlamaConfig)} - {"architectures", "transformers_version"}
        text = LlamaConfig.from_dict({name: value for name, value in self.to_dict().items() if name in names})
        text._attn_implementation = self._attn_implementation
        return text


class ResamplerAttention(nn.Module):
    """`torch.nn.MultiheadAttention` by its parameters, run through the attention functions of transformers, so that
    it uses fused kernels and can be tapped."""

    is_causal = False

    def __init__(self, config: MiniCPMVConfig, width: int):
        super().__init__()
        self.config, self.heads = config, width // HEAD
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(
        self, value_NPC: torch.Tensor, key_NPC: torch.Tensor, query_QC: torch.Tensor, mask_NP: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(N, Q, C), and the probabilities (N, H, Q, P) where the attention function gives them.

        Args:
            mask_NP: bool, true where there is a patch.
        """
        projected = zip(
            (query_QC[None], key_NPC, value_NPC), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True
        )
        query, key, value = (self._heads(functional.linear(x, weight, bias)) for x, weight, bias in projected)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        out_NQHD, probs_NHQP = attention(
            self,
            query.expand(len(key), -1, -1, -1),
            key,
            value,
            mask_NP[:, None, None].expand(-1, -1, len(query_QC), -1),
            scaling=HEAD**-0.5,
            dropout=0.0,
            is_causal=False,
        )
        return self.out_proj(out_NQHD.flatten(2)), probs_NHQP

    def _heads(self, value_NLC: torch.Tensor) -> torch.Tensor:
        return value_NLC.unflatten(-1, (self.heads, HEAD)).transpose(1, 2)


class Resampler(nn.Module):
    """A fixed number of latents made of a slice's patches, whose keys (not values) know their place in the slice.

    Args:
        config: see `MiniCPMVConfig`; says which attention function runs.
        width: channels of the latents, which are the language model's.
        source: channels of the patches.
    """

    def __init__(self, config: MiniCPMVConfig, width: int, source: int):
        super().__init__()
        if width % HEAD:
            raise ValueError(f"the resampler's {width} channels are not a multiple of {HEAD}")
        self.query = nn.Parameter(torch.empty(config.query_num, width))
        self.kv_proj = nn.Linear(source, width, bias=False) if source != width else nn.Identity()
        self.attn = ResamplerAttention(config, width)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.proj = nn.Parameter(torch.empty(width, width))

    def forward(self, patches_NPC: torch.Tensor, sizes_N2: torch.Tensor) -> torch.Tensor:
        """(N, Q, C) of slices with so many rows and columns of patches, row by row, padded at the end."""
        value_NPC = self.ln_kv(self.kv_proj(patches_NPC))
        place_P = torch.arange(value_NPC.shape[1], device=value_NPC.device)
        position_NPC = positions(place_P, sizes_N2[:, 1:], value_NPC.shape[2]).to(value_NPC.dtype)
        mask_NP = place_P < sizes_N2.prod(1, keepdim=True)
        made_NQC, _ = self.attn(value_NPC, value_NPC + position_NPC, self.ln_q(self.query), mask_NP)
        return self.ln_post(made_NQC) @ self.proj


def positions(place_P: torch.Tensor, cols_N1: torch.Tensor, width: int) -> torch.Tensor:
    """(N, P, C) float32: sines and cosines of the column (first half of the channels) and the row of each patch.

    Args:
        place_P: number of the patch, row by row.
        cols_N1: patches in a row of each slice.
    """
    turn_F = 1.0 / 10000 ** (torch.arange(width // 4, device=place_P.device, dtype=torch.float32) / (width // 4))
    parts = []
    for number_NP in (place_P % cols_N1, place_P // cols_N1):
        angle_NPF = number_NP[..., None].float() * turn_F
        parts += [angle_NPF.sin(), angle_NPF.cos()]
    return torch.cat(parts, -1)


def line_positions(length: int, side: int) -> torch.Tensor:
    """(length,) long: places of patches in one line, in a table of side x side, of which they use the first row.

    To the last bit as Idefics2 computed them when the weights were trained, on the CPU: later versions of transformers
    round otherwise, which moves the patches that lie exactly between two places (patch 28 of 49 in a table of 70).
    """
    boundaries = torch.arange(1 / side, 1.0, 1 / side)
    return torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / torch.tensor(length)), boundaries, right=True)


class Tower(Idefics2VisionTransformer):
    """The vision tower, with the places of the patches as an input."""

    def forward(self, pixel_values: torch.Tensor, patch_positions: torch.Tensor) -> torch.Tensor:
        """(N, P, C), see `MiniCPMV.forward`."""
        embeddings = self.embeddings
        patches_NPC = embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        patches_NPC = patches_NPC + embeddings.position_embedding(patch_positions.clamp_min(0))
        mask = create_bidirectional_mask(self.config, patches_NPC, patch_positions >= 0)
        made = self.encoder(inputs_embeds=patches_NPC, attention_mask=mask)
        return self.post_layernorm(made.last_hidden_state)


class MiniCPMV(PreTrainedModel, GenerationMixin):
    """MiniCPM-Llama3-V 2.5.

    Two properties of the published code are kept, because its weights were trained with them. The vision tower numbers
    the patches of a slice in one line over the first row of its position table, by their place among as many patches
    as the largest slice has; and the padding of smaller slices up to that number is attended to like patches. The
    published code takes the largest slice of the whole batch; here it is that of the same image (`line_positions` of
    as many), which is the same for one image and does not make an example depend on its neighbours.
    """

    config_class = MiniCPMVConfig
    config: MiniCPMVConfig
    base_model_prefix = ""
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["LlamaDecoderLayer", "Idefics2EncoderLayer", "Resampler"]
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: MiniCPMVConfig):
        super().__init__(config)
        self.llm = LlamaForCausalLM(config.llama())
        self.vpm = Tower(config.vision_config)
        if config.drop_vision_last_layer:
            self.vpm.encoder.layers = self.vpm.encoder.layers[:-1]
        self.resampler = Resampler(config, config.hidden_size, config.vision_config.hidden_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ResamplerAttention):
            initialization.xavier_uniform_(module.in_proj_weight)
            initialization.zeros_(module.in_proj_bias)
        elif isinstance(module, Resampler):
            initialization.normal_(module.query, std=0.02)
            initialization.normal_(module.proj, std=module.proj.shape[0] ** -0.5)

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.llm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.llm.get_output_embeddings()

    def set_attn_implementation(self, attn_implementation: str | dict, **options) -> None:
        """As in transformers, but a plain name is for the resampler alone: tower and language model keep theirs."""
        if isinstance(attn_implementation, str):
            attn_implementation = {"": attn_implementation}
        super().set_attn_implementation(attn_implementation, **options)

    def encode(
        self, pixel_values: torch.Tensor, target_sizes: torch.Tensor, patch_positions: torch.Tensor
    ) -> torch.Tensor:
        """The image tokens (N, Q, C) of N slices, see `forward`."""
        pixels = pixel_values.to(self.vpm.embeddings.patch_embedding.weight.dtype)
        return self.resampler(self.vpm(pixels, patch_positions), target_sizes)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        target_sizes: torch.Tensor | None = None,
        patch_positions: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """What `LlamaForCausalLM` gives.

        Args:
            pixel_values: (N, 3, patch, P * patch), the slices of all examples in order: the patches of each in one
                line, row by row, then zeros.
            target_sizes: (N, 2) long, rows and columns of patches.
            patch_positions: (N, P) long, the place of each patch in the tower's table; -1 for padding beyond the
                largest slice of the same image, which nothing attends to.
            image_mask: (B, L) bool, true at the image tokens; the slices fill them in order. Without any the slices
                run and change nothing.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            tokens_NQC = self.encode(pixel_values, target_sizes, patch_positions).to(inputs_embeds.dtype)
            inputs_embeds = inputs_embeds.masked_scatter(image_mask[..., None], tokens_NQC)
        return self.llm(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, is_first_iteration: bool | None = False, **kwargs
    ) -> dict:
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        if is_first_iteration or inputs.get("image_mask") is None:
            return inputs
        if kwargs.get("use_cache", True):
            return {name: value for name, value in inputs.items() if name not in IMAGE}
        more = input_ids.shape[1] - inputs["image_mask"].shape[1]  # without a cache all is run again, answer included
        return inputs | {"image_mask": functional.pad(inputs["image_mask"], (0, more))}
