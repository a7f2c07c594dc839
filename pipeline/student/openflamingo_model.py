"""OpenFlamingo as a model of transformers: CLIP, the perceiver, and a language model with gated cross-attention.

Parameters are named as in the published checkpoints (`perceiver.*`,
`lang_encoder.<decoder layers>.{i}.gated_cross_attn_layer.*`); a layer of the language model itself lies beside its
cross-attention as `decoder_layer`.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from transformers import AutoConfig, CLIPVisionConfig, CLIPVisionModel, GenerationMixin, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.modeling_utils import PreTrainedModel

from pipeline.errors import UserError
from pipeline.student.openflamingo_lm import LAYERS, language_model
from pipeline.student.perceiver import GatedCrossAttention, PerceiverResampler

FOLDER = "decoder_layer"  # the name of a layer of the language model inside its wrapper


class OpenFlamingoConfig(PreTrainedConfig):
    """Sizes of an OpenFlamingo.

    Args:
        vision_config, text_config: of the CLIP tower and of the language model (`mpt` or `gpt_neox`).
        image_token_id: stands where an image belongs to the text.
        cross_attn_every_n_layers: decoder layer i has cross-attention before it when (i + 1) is a multiple.
        latents, perceiver_layers: of the perceiver.
        num_attention_heads, head_dim: of perceiver and cross-attention.
    """

    model_type = "openflamingo"
    sub_configs_defaults: ClassVar = {
        "vision_config": CLIPVisionConfig,
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="mpt"),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 50278
    cross_attn_every_n_layers: int = 1
    latents: int = 64
    perceiver_layers: int = 6
    num_attention_heads: int = 8
    head_dim: int = 64


@dataclass
class OpenFlamingoOutput(CausalLMOutputWithCrossAttentions):
    """As its base, with the images' latents (B, I, Q, C), which generation reuses."""

    image_latents: torch.Tensor | None = None


class Sight:
    """What the decoder layers of one forward see: the language models' code hands nothing of the kind through."""

    latents_BIQC: torch.Tensor | None = None
    image_BL: torch.Tensor | None = None
    probs: list[torch.Tensor | None] | None = None


class FlamingoLayer(nn.Module):
    """A decoder layer, with cross-attention before it or without."""

    def __init__(self, gated_cross_attn_layer: GatedCrossAttention | None, decoder_layer: nn.Module, sight: Sight):
        super().__init__()
        self.gated_cross_attn_layer = gated_cross_attn_layer
        self.decoder_layer = decoder_layer
        self.sight = sight

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        sight = self.sight
        if self.gated_cross_attn_layer is not None:
            hidden_states, probs = self.gated_cross_attn_layer(hidden_states, sight.latents_BIQC, sight.image_BL)
            if sight.probs is not None:
                sight.probs.append(probs)
        return self.decoder_layer(hidden_states, *args, **kwargs)


class OpenFlamingo(PreTrainedModel, GenerationMixin):
    """OpenFlamingo 2.0. Text attends to the last image before it (`only_attend_immediate_media`)."""

    config_class = OpenFlamingoConfig
    config: OpenFlamingoConfig
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["FlamingoLayer"]
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: OpenFlamingoConfig):
        super().__init__(config)
        vision, text = config.vision_config, config.text_config
        self.vision_encoder = CLIPVisionModel(vision)
        # The patches leave the tower before its last norm, which belongs to the class token alone.
        self.vision_encoder.post_layernorm = nn.Identity()
        sizes = (config.num_attention_heads, config.head_dim)
        self.perceiver = PerceiverResampler(config, vision.hidden_size, config.latents, config.perceiver_layers, *sizes)
        self.lang_encoder = language_model(text)
        self._sight = Sight()
        blocks = self.blocks()
        for index, block in enumerate(blocks):
            crossed = (index + 1) % config.cross_attn_every_n_layers == 0
            cross = GatedCrossAttention(config, text.hidden_size, vision.hidden_size, *sizes) if crossed else None
            blocks[index] = FlamingoLayer(cross, block, self._sight)
        self.post_init()

    def blocks(self) -> nn.ModuleList:
        """The decoder layers, wrapped once the model is made."""
        return self.lang_encoder.get_submodule(LAYERS[self.config.text_config.model_type])

    def get_input_embeddings(self) -> nn.Module:
        return self.lang_encoder.get_input_embeddings()

    def set_attn_implementation(self, attn_implementation: str | dict, **options) -> None:
        """As in transformers, but a plain name is for perceiver and cross-attention: CLIP and the language model
        keep theirs."""
        if isinstance(attn_implementation, str):
            attn_implementation = {"": attn_implementation}
        super().set_attn_implementation(attn_implementation, **options)

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images (B, I, 3, Y, X) to latents (B, I, Q, C)."""
        batch, images = pixel_values.shape[:2]
        patches_NPC = self.vision_encoder(pixel_values=pixel_values.flatten(0, 1)).last_hidden_state[:, 1:]
        return self.perceiver(patches_NPC).unflatten(0, (batch, images))

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values=None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_latents: torch.Tensor | None = None,
        image_of_token: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        output_hidden_states: bool | None = None,
        **unknown,
    ) -> OpenFlamingoOutput:
        """Logits (B, L, V).

        Args:
            pixel_values: (B, I, 3, Y, X), one image for each image token of an example, zeros where it has fewer.
            image_latents: instead of them, what `encode` made of them.
            image_of_token: (B, L) number of image tokens up to and at each position; counted from ``input_ids`` where
                the whole text is given.
            labels: (B, L), not shifted, -100 where nothing is learnt; adds the mean cross-entropy as ``loss``.
            output_attentions: return the probabilities (B, H, L, I*Q) of each cross-attention; with attention "eager".

        Raises:
            UserError: packed sequences, which MPT cannot tell apart, or an argument that is not known.
        """
        if unknown or output_hidden_states:
            raise UserError(f"OpenFlamingo does not take {', '.join(unknown) or 'output_hidden_states'}")
        if image_latents is None:
            image_latents = self.encode(pixel_values)
        if image_of_token is None:
            image_of_token = (input_ids == self.config.image_token_id).cumsum(1)
        sight = self._sight
        sight.latents_BIQC, sight.image_BL = image_latents, image_of_token
        sight.probs = [] if output_attentions else None
        places = {} if position_ids is None else {"position_ids": position_ids}
        # Positions that begin again within a row are how packed texts are told apart; those of one text ascend.
        packed = attention_mask is None and position_ids is not None and bool((position_ids.diff(dim=1) != 1).any())
        if packed and self.config.text_config.model_type == "mpt":
            raise UserError("MPT knows no positions: packed sequences cannot be told apart, give one in each row")
        made = self.lang_encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **places,
        )
        crossed = None if sight.probs is None else tuple(sight.probs)
        sight.latents_BIQC = sight.image_BL = sight.probs = None
        loss = None
        if labels is not None:
            loss = self.loss_function(made.logits, labels, vocab_size=made.logits.shape[-1])
        return OpenFlamingoOutput(
            loss=loss,
            logits=made.logits,
            past_key_values=made.past_key_values,
            cross_attentions=crossed,
            image_latents=image_latents,
        )

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs) -> dict:
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        counted_BL = (input_ids == self.config.image_token_id).cumsum(1)
        return inputs | {"image_of_token": counted_BL[:, -inputs["input_ids"].shape[1] :]}

    def _update_model_kwargs_for_generation(self, outputs: OpenFlamingoOutput, model_kwargs: dict, *args, **kwargs):
        kept = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        return kept | {"image_latents": outputs.image_latents}
