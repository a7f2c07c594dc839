"""Tiny OpenFlamingos as they are published: a checkpoint of what was trained, a language model and a CLIP beside it."""

import json
from pathlib import Path

import torch

from pipeline.student.tiny.mllama import build_tokenizer
from pipeline.student.tiny.native import TEXTS

# name -> (language model, cross-attention before every so many layers)
FLAMINGOS = {"openflamingo-3b": ("mosaic_gpt", 1), "openflamingo-4b": ("gpt_neox", 2), "openflamingo-9b": ("mpt", 4)}
LATENTS, VISION, WIDTH = 8, 32, 48  # of the tiny OpenFlamingos: latents, channels of CLIP, channels of the text


def published_openflamingo(kind: str, layers: int, rows: int) -> dict[str, torch.Tensor]:
    """What a published checkpoint of OpenFlamingo 2.0 holds: its names, its shapes at a tiny width, random values."""
    language, every = FLAMINGOS[kind]
    inner = 8 * 64
    shapes = {"perceiver.latents": (LATENTS, VISION)}
    for i in range(6):
        at = f"perceiver.layers.{i}"
        for norm in ("norm_media", "norm_latents"):
            shapes |= {f"{at}.0.{norm}.weight": (VISION,), f"{at}.0.{norm}.bias": (VISION,)}
        shapes |= {f"{at}.0.to_q.weight": (inner, VISION), f"{at}.0.to_kv.weight": (2 * inner, VISION)}
        shapes |= {f"{at}.0.to_out.weight": (VISION, inner)}
        shapes |= {f"{at}.1.0.weight": (VISION,), f"{at}.1.0.bias": (VISION,)}
        shapes |= {f"{at}.1.1.weight": (4 * VISION, VISION), f"{at}.1.3.weight": (VISION, 4 * VISION)}
    shapes |= {"perceiver.norm.weight": (VISION,), "perceiver.norm.bias": (VISION,)}
    blocks = "gpt_neox.layers" if language == "gpt_neox" else "transformer.blocks"
    for i in range(every - 1, layers, every):
        at = f"lang_encoder.{blocks}.{i}.gated_cross_attn_layer"
        shapes |= {f"{at}.attn_gate": (1,), f"{at}.ff_gate": (1,)}
        shapes |= {f"{at}.attn.norm.weight": (WIDTH,), f"{at}.attn.norm.bias": (WIDTH,)}
        shapes |= {f"{at}.attn.to_q.weight": (inner, WIDTH), f"{at}.attn.to_kv.weight": (2 * inner, VISION)}
        shapes |= {f"{at}.attn.to_out.weight": (WIDTH, inner)}
        shapes |= {f"{at}.ff.0.weight": (WIDTH,), f"{at}.ff.0.bias": (WIDTH,)}
        shapes |= {f"{at}.ff.1.weight": (4 * WIDTH, WIDTH), f"{at}.ff.3.weight": (WIDTH, 4 * WIDTH)}
    if language == "gpt_neox":
        shapes |= {"lang_encoder.gpt_neox.embed_in.weight": (rows, WIDTH)}
    else:
        shapes |= {"lang_encoder.transformer.wte.weight": (rows, WIDTH)}
    torch.manual_seed(1)
    # Gates are open, and attention sharper than at the start of a training, so that comparisons mean something.
    return {name: torch.randn(shape) * (0.3 if len(shape) > 1 else 1.0) for name, shape in shapes.items()}


def build_openflamingo(kind: str, directory: Path) -> dict:
    """Writes a published checkpoint, a language model and a CLIP of their real classes; returns settings to load it."""
    import transformers as hf

    torch.manual_seed(0)
    language, _ = FLAMINGOS[kind]
    tok = build_tokenizer(TEXTS, vocabulary=300)
    rows = len(tok) + 2  # and the two tokens that OpenFlamingo adds
    layers = 4
    text = directory / "language"
    if language == "gpt_neox":
        config = hf.GPTNeoXConfig(
            vocab_size=320,
            hidden_size=WIDTH,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=512,
        )
        hf.GPTNeoXForCausalLM(config).save_pretrained(text)
    else:
        config = hf.MptConfig(d_model=WIDTH, n_heads=4, n_layers=layers, max_seq_len=512, vocab_size=320)
        model = hf.MptForCausalLM(config)
        model.save_pretrained(text)
        if language == "mosaic_gpt":
            _as_mosaic(text, model)
    tok.save_pretrained(text)
    sizes = {"hidden_size": VISION, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    clip = hf.CLIPConfig(
        vision_config=sizes | {"image_size": 32, "patch_size": 8, "hidden_act": "quick_gelu"},
        text_config=sizes | {"vocab_size": 50},
        projection_dim=16,
    )
    hf.CLIPModel(clip).save_pretrained(directory / "vision")
    square = {"height": 32, "width": 32}
    hf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=square).save_pretrained(directory / "vision")
    (directory / "model").mkdir()
    torch.save(published_openflamingo(kind, layers, rows), directory / "model" / "checkpoint.pt")
    parts = {"language": str(text), "vision": str(directory / "vision")}
    return {"path": str(directory / "model"), "family": "openflamingo", "parts": parts}


def _as_mosaic(folder: Path, model) -> None:
    """Rewrites an MPT in the names and the config of its first version, with norms of queries and keys."""
    old = {".norm_1.": ".ln_1.", ".norm_2.": ".ln_2.", ".norm_f.": ".ln_f."}
    old |= {".ffn.up_proj.": ".mlp.mlp_up.", ".ffn.down_proj.": ".mlp.mlp_down."}
    weights = {}
    for name, value in model.state_dict().items():
        for new, before in old.items():
            name = name.replace(new, before)
        if name != "lm_head.weight":
            weights[name] = value
    for layer in range(model.config.n_layers):
        for norm in ("q_ln", "k_ln"):
            weights[f"transformer.blocks.{layer}.attn.{norm}.weight"] = 1 + 0.3 * torch.randn(WIDTH)
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    config = {
        "model_type": "mosaic_gpt",
        "d_model": WIDTH,
        "n_heads": 4,
        "n_layers": model.config.n_layers,
        "mlp_ratio": 4,
        "max_seq_len": 512,
        "vocab_size": 320,
        "no_bias": True,
        "alibi": True,
        "alibi_bias_max": 8,
        "attn_qk_ln": True,
        "attn_clip_qkv": None,
        "softmax_scale": None,
        "prefix_lm": False,
        "logit_scale": None,
        "embedding_fraction": 1.0,
        "auto_map": {"AutoConfig": "configuration_mosaic_gpt.MosaicGPTConfig"},
    }
    (folder / "config.json").write_text(json.dumps(config))
