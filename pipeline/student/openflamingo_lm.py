"""The language models under OpenFlamingo: MPT with a fused kernel, MPT's first version, and GPT-NeoX as it is.

transformers' `MptAttention` writes its attention out and knows no norm of queries and keys; the 3B model (on
`mpt-1b-redpajama-200b`, model type `mosaic_gpt`) has one. Both run here on scaled dot-product attention, under the
names of the published weights.
"""

import re
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional
from transformers import MptConfig
from transformers.models.mpt.modeling_mpt import MptAttention, MptForCausalLM

from pipeline.errors import UserError

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedConfig, PreTrainedModel

# model type -> where its decoder layers are, as in the names of the published weights
LAYERS = {"mpt": "transformer.blocks", "gpt_neox": "gpt_neox.layers"}
EMBEDDINGS = {"mpt": "transformer.wte.weight", "gpt_neox": "gpt_neox.embed_in.weight"}

# names in `mosaic_gpt` weights -> names in `mpt` weights
_RENAMED = tuple(
    (re.compile(old), new)
    for old, new in (
        (r"\.ln_([12])\.", r".norm_\1."),
        (r"\.ln_f\.", ".norm_f."),
        (r"\.mlp\.mlp_up\.", ".ffn.up_proj."),
        (r"\.mlp\.mlp_down\.", ".ffn.down_proj."),
    )
)
# GPT-NeoX weights of old versions carry buffers that are made anew
_BUFFERS = re.compile(r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$")


class FusedAttention(MptAttention):
    """MPT's self-attention on the fused kernel, with the norms of queries and keys where the config asks for them."""

    def __init__(self, config: MptConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.q_ln = self.k_ln = nn.Identity()
        if config.attn_config.qk_ln:
            self.q_ln, self.k_ln = (
                nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon, bias=False) for _ in range(2)
            )

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_bias: torch.Tensor,
        past_key_values: "Cache | None" = None,
        attention_mask: torch.Tensor | None = None,
        **_,
    ) -> tuple[torch.Tensor, None]:
        """As `MptAttention.forward`: ALiBi (H, 1, most keys) and a mask (B, 1, L, K), true where nothing is seen."""
        qkv_BLC = self.Wqkv(hidden_states)
        if self.clip_qkv:
            qkv_BLC = qkv_BLC.clamp(-self.clip_qkv, self.clip_qkv)
        query, key, value = qkv_BLC.chunk(3, dim=-1)
        query, key, value = (
            part.unflatten(-1, (self.n_heads, self.head_dim)).transpose(1, 2)
            for part in (self.q_ln(query).to(value.dtype), self.k_ln(key).to(value.dtype), value)
        )
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        bias_BHLK = position_bias[None, :, :, -key.shape[2] :].to(query.dtype)
        if attention_mask is not None:
            bias_BHLK = bias_BHLK.masked_fill(attention_mask, torch.finfo(query.dtype).min)
        out_BHLD = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=bias_BHLK,
            dropout_p=self.attn_dropout_p if self.training else 0.0,
            scale=self.softmax_scale,
        )
        return self.out_proj(out_BHLD.transpose(1, 2).flatten(2)), None


class Mpt(MptForCausalLM):
    """MPT on the fused kernel."""

    def __init__(self, config: MptConfig):
        super().__init__(config)
        for index, block in enumerate(self.transformer.blocks):
            block.attn = FusedAttention(config, index)


def language_model(config: "PreTrainedConfig") -> "PreTrainedModel":
    """The language model of a config, without weights."""
    if config.model_type == "mpt":
        # The mask must be the one that MPT's code inverts; its attention runs fused all the same.
        config._attn_implementation = "eager"
        return Mpt(config)
    from transformers import GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(config)


def text_config(found: dict, name: str) -> "PreTrainedConfig":
    """The config of a language model from the content of its ``config.json``.

    Args:
        found: the content.
        name: for messages.

    Raises:
        UserError: another architecture, or one of MPT's options that this code does not compute.
    """
    from transformers import GPTNeoXConfig

    kind = found.get("model_type")
    if kind == "gpt_neox":
        return GPTNeoXConfig.from_dict(found)
    if kind not in ("mpt", "mosaic_gpt"):
        raise UserError(f"OpenFlamingo's language models are mpt, mosaic_gpt and gpt_neox; {name} is '{kind}'")
    if kind == "mosaic_gpt":
        names = {"attn_qk_ln": "qk_ln", "attn_clip_qkv": "clip_qkv"}
        names |= {name: name for name in ("softmax_scale", "alibi", "alibi_bias_max", "prefix_lm")}
        attention = {new: found[old] for old, new in names.items() if found.get(old) is not None}
        found = found | {"attn_config": attention, "expansion_ratio": found.get("mlp_ratio", 4)}
    else:
        attention = found.get("attn_config") or {}
    wanted = (
        ("alibi", attention.get("alibi"), True),
        ("alibi_bias_max", attention.get("alibi_bias_max", 8), 8),
        ("prefix_lm", bool(attention.get("prefix_lm")), False),
        ("attn_type", attention.get("attn_type", "multihead_attention"), "multihead_attention"),
        ("no_bias", found.get("no_bias"), True),
        ("expansion_ratio", found.get("expansion_ratio", 4), 4),
        ("logit_scale", found.get("logit_scale"), None),
        ("embedding_fraction", found.get("embedding_fraction", 1.0), 1.0),
    )
    for option, value, supported in wanted:
        if value != supported:
            raise UserError(f"the language model {name} has {option}={value}: only {supported} is supported")
    kept = ("qk_ln", "clip_qkv", "softmax_scale")
    fields = ("d_model", "n_heads", "n_layers", "max_seq_len", "vocab_size")
    return MptConfig(
        **{field: found[field] for field in fields},
        attn_config={option: attention[option] for option in kept if attention.get(option) is not None},
    )


def text_weights(weights: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """The weights of a language model under the names of its class here, without what is not a weight."""
    renamed = {}
    for name, value in weights.items():
        if _BUFFERS.search(name):
            continue
        if kind == "mosaic_gpt":
            for old, new in _RENAMED:
                name = old.sub(new, name)
        renamed[name] = value
    return renamed
