"""A tiny MiniCPM-Llama3-V 2.5 as it is published: its names and shapes at a small width, random values."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from pipeline.student.tiny.mllama import build_tokenizer
from pipeline.student.tiny.native import TEXTS

WIDTH, VISION, INNER, LATENTS, VOCABULARY = 256, 32, 48, 6, 400
CONTROL = ("<unk>", "<image>", "</image>", "<slice>", "</slice>")
# Takes contents that are a string (MiniCPM) or a list of parts (Llama 3.2), and trims texts like the published ones.
CHAT = (
    "{%- for message in messages %}"
    "{%- if loop.first %}{{- bos_token }}{% endif %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{%- if message['content'] is string %}{{- message['content'] | trim }}"
    "{%- else %}{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{{- 'IMAGE' }}{% else %}{{- part['text'] | trim }}{% endif %}"
    "{%- endfor %}{% endif %}"
    "{{- '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# The published config.json, its sizes apart.
CONFIG = {
    "architectures": ["MiniCPMV"],
    "auto_map": {"AutoConfig": "configuration_minicpm.MiniCPMVConfig", "AutoModel": "modeling_minicpmv.MiniCPMV"},
    "attention_bias": False,
    "attention_dropout": 0.0,
    "batch_vision_input": True,
    "bos_token_id": 128000,
    "drop_vision_last_layer": False,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": WIDTH,
    "image_size": 448,
    "initializer_range": 0.02,
    "intermediate_size": INNER,
    "max_position_embeddings": 2048,
    "mm_use_im_start_end": True,
    "model_type": "minicpmv",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "patch_size": 8,
    "pretraining_tp": 1,
    "query_num": LATENTS,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "slice_config": {
        "max_slice_nums": 9,
        "patch_size": 8,
        "scale_resolution": 32,
        "model_type": "minicpmv",
    },
    "slice_mode": True,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.40.0",
    "use_cache": False,
    "vision_config": {
        "hidden_size": VISION,
        "image_size": 80,
        "intermediate_size": INNER,
        "model_type": "idefics2",
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "patch_size": 8,
    },
    "vocab_size": VOCABULARY,
}


def published_minicpm() -> dict[str, torch.Tensor]:
    """Every tensor of the published checkpoint, float32."""
    half = WIDTH // 2  # channels of the keys: 2 of 4 heads
    shapes = {"llm.model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for i in range(2):
        at = f"llm.model.layers.{i}"
        shapes |= {f"{at}.self_attn.{name}.weight": (WIDTH, WIDTH) for name in ("q_proj", "o_proj")}
        shapes |= {f"{at}.self_attn.{name}.weight": (half, WIDTH) for name in ("k_proj", "v_proj")}
        shapes |= {f"{at}.mlp.{name}.weight": (INNER, WIDTH) for name in ("gate_proj", "up_proj")}
        shapes |= {f"{at}.mlp.down_proj.weight": (WIDTH, INNER)}
        shapes |= {f"{at}.{name}.weight": (WIDTH,) for name in ("input_layernorm", "post_attention_layernorm")}
    shapes |= {"llm.model.norm.weight": (WIDTH,), "llm.lm_head.weight": (VOCABULARY, WIDTH)}
    shapes |= {
        "vpm.embeddings.patch_embedding.weight": (VISION, 3, 8, 8),
        "vpm.embeddings.patch_embedding.bias": (VISION,),
        "vpm.embeddings.position_embedding.weight": (100, VISION),
        "vpm.post_layernorm.weight": (VISION,),
        "vpm.post_layernorm.bias": (VISION,),
    }
    for i in range(2):
        at = f"vpm.encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{at}.self_attn.{name}.weight": (VISION, VISION), f"{at}.self_attn.{name}.bias": (VISION,)}
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{at}.{name}.weight": (VISION,), f"{at}.{name}.bias": (VISION,)}
        shapes |= {f"{at}.mlp.fc1.weight": (INNER, VISION), f"{at}.mlp.fc1.bias": (INNER,)}
        shapes |= {f"{at}.mlp.fc2.weight": (VISION, INNER), f"{at}.mlp.fc2.bias": (VISION,)}
    shapes |= {
        "resampler.query": (LATENTS, WIDTH),
        "resampler.proj": (WIDTH, WIDTH),
        "resampler.kv_proj.weight": (WIDTH, VISION),
        "resampler.attn.in_proj_weight": (3 * WIDTH, WIDTH),
        "resampler.attn.in_proj_bias": (3 * WIDTH,),
        "resampler.attn.out_proj.weight": (WIDTH, WIDTH),
        "resampler.attn.out_proj.bias": (WIDTH,),
    }
    for name in ("ln_q", "ln_kv", "ln_post"):
        shapes |= {f"resampler.{name}.weight": (WIDTH,), f"resampler.{name}.bias": (WIDTH,)}
    torch.manual_seed(3)
    made = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            made[name] = torch.randn(shape) * 0.1 + float("norm" in name or ".ln_" in name) * name.endswith("weight")
        else:
            fan = torch.Size(shape[1:]).numel()
            sharp = 3.0 if name.endswith(("q_proj.weight", "k_proj.weight", "in_proj_weight")) else 1.0
            made[name] = torch.randn(shape) * sharp * fan**-0.5
    made["resampler.query"] = torch.randn(LATENTS, WIDTH)
    made["llm.model.embed_tokens.weight"] = torch.randn(VOCABULARY, WIDTH)
    return made


def build_minicpm(directory: Path, tokenizer=None) -> Path:
    """Writes the checkpoint, its config and a tokenizer, whose ids must fit in 400 (None makes a small one)."""
    directory.mkdir(parents=True, exist_ok=True)
    if tokenizer is None:
        tokenizer = build_tokenizer(TEXTS, vocabulary=320)
        tokenizer.add_special_tokens({"additional_special_tokens": list(CONTROL)})
        tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(directory)
    save_file(published_minicpm(), directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory
