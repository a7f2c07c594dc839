"""Published shapes of the paper's students, so that benchmarks and estimates need no download.

The tokenizer is a small one made in place, so texts take more tokens than with the real vocabulary; the embeddings
have the published number of rows all the same.
"""

from collections.abc import Callable
from pathlib import Path

from pipeline.student.tiny.mllama import IMAGE, TEMPLATE, build_tokenizer
from pipeline.student.tiny.native import SQUARE, TEXTS


def write(name: str, folder: Path) -> None:
    """Writes config, tokenizer and image processor, and no weights.

    Args:
        name: one of `SHAPES`.
    """
    config, *parts = SHAPES[name]()
    for part in (config, *parts):
        part.save_pretrained(folder)


def _llama(layers: int, hidden: int, heads: int, inner: int) -> tuple:
    """Llama 3.2 Vision; every fifth text layer from the fourth attends to the image."""
    from transformers import MllamaConfig
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    tok = build_tokenizer(TEXTS)
    tok.chat_template = TEMPLATE
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    text = {
        "vocab_size": 128256,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "intermediate_size": inner,
        "cross_attention_layers": list(range(3, layers, 5)),
        "max_position_embeddings": 131072,
        "rope_parameters": rope,
        "bos_token_id": tok.bos_token_id,
        "eos_token_id": tok.eos_token_id,
        "pad_token_id": tok.pad_token_id,
    }
    vision = {
        "hidden_size": 1280,
        "num_hidden_layers": 32,
        "num_global_layers": 8,
        "attention_heads": 16,
        "intermediate_size": 5120,
        "image_size": 560,
        "patch_size": 14,
        "max_num_tiles": 4,
        "intermediate_layers_indices": [3, 7, 15, 23, 30],
        "vision_output_dim": 7680,
    }
    config = MllamaConfig(text_config=text, vision_config=vision, image_token_index=tok.convert_tokens_to_ids(IMAGE))
    return config, tok, MllamaImageProcessorPil(size={"height": 560, "width": 560}, max_image_tiles=4)


def _minicpm() -> tuple:
    """MiniCPM-Llama3-V 2.5: Llama 3 8B and a SigLIP of 27 layers."""
    from pipeline.student.minicpm_model import MiniCPMVConfig
    from pipeline.student.tiny.minicpm import CHAT, CONFIG, CONTROL

    tok = build_tokenizer(TEXTS)
    tok.add_special_tokens({"additional_special_tokens": list(CONTROL)})
    tok.chat_template = CHAT
    stated = {name: value for name, value in CONFIG.items() if name not in ("auto_map", "model_type", "torch_dtype")}
    stated |= {
        "bos_token_id": tok.bos_token_id,
        "eos_token_id": tok.eos_token_id,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 8192,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "patch_size": 14,
        "query_num": 96,
        "slice_config": {"max_slice_nums": 9, "patch_size": 14, "scale_resolution": 448},
        "vision_config": {
            "hidden_size": 1152,
            "image_size": 980,
            "intermediate_size": 4304,
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
        },
        "vocab_size": 128256,
    }
    return MiniCPMVConfig(**stated), tok


def _flamingo(text: dict, every: int, rows: int) -> tuple:
    """OpenFlamingo with CLIP ViT-L/14 and cross-attention before every so many layers of the language model."""
    from transformers import CLIPImageProcessorPil

    from pipeline.student.openflamingo import END, TEMPLATE, OpenFlamingoConfig
    from pipeline.student.openflamingo import IMAGE as TOKEN

    tok = build_tokenizer(TEXTS)
    tok.add_special_tokens({"additional_special_tokens": [END, TOKEN]})
    tok.chat_template = TEMPLATE
    vision = {
        "hidden_size": 1024,
        "image_size": 224,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "hidden_act": "quick_gelu",
    }
    config = OpenFlamingoConfig(
        vision_config=vision,
        text_config=text | {"vocab_size": rows},
        image_token_id=tok.convert_tokens_to_ids(TOKEN),
        cross_attn_every_n_layers=every,
    )
    square = dict.fromkeys(SQUARE, 224)
    return config, tok, CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size=square)


def _mpt(width: int, heads: int, layers: int, norm: bool) -> dict:
    options = {"attn_config": {"qk_ln": True}} if norm else {}
    sizes = {"d_model": width, "n_heads": heads, "n_layers": layers, "max_seq_len": 2048}
    return sizes | options | {"model_type": "mpt"}


_NEOX = {
    "model_type": "gpt_neox",
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "max_position_embeddings": 2048,
}

# name in conf/model -> what makes (config, tokenizer, and an image processor where there is one)
SHAPES: dict[str, Callable[[], tuple]] = {
    "llama32-11b": lambda: _llama(40, 4096, 32, 14336),
    "llama32-90b": lambda: _llama(100, 8192, 64, 28672),
    "minicpm-llama3-v25": _minicpm,
    "openflamingo-3b": lambda: _flamingo(_mpt(2048, 16, 24, norm=True), 1, 50280),
    "openflamingo-4b": lambda: _flamingo(dict(_NEOX), 2, 50280),
    "openflamingo-9b": lambda: _flamingo(_mpt(4096, 32, 32, norm=False), 4, 50280),
}
