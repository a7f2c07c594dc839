"""Tiny models of transformers' own classes that put image tokens into the text, with tokenizer and image processor.

Sizes are chosen so that every branch of the real code runs: several tiles, merged patches, a perceiver.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from pipeline.student.tiny.mllama import build_tokenizer

TEXTS = ["What colour is the circle?", "a small red circle and a blue square", "red", "two", "List the colours."] * 3
PARTS = (
    "{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{{- 'IMAGE' }}{% else %}{{- part['text'] | trim }}{% endif %}{% endfor %}"
)
CHATML = (
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\n' }}"
    + PARTS
    + "{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"
)
VICUNA = (
    "{%- for message in messages %}{%- if message['role'] == 'user' %}{{- 'USER: ' }}"
    "{%- elif message['role'] == 'assistant' %}{{- 'ASSISTANT: ' }}{% endif %}"
    + PARTS
    + "{%- if message['role'] == 'assistant' %}{{- '</s>' }}{% endif %}{{- ' ' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'ASSISTANT:' }}{% endif %}"
)
GEMMA = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    + PARTS
    + "{{- '<end_of_turn>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{% endif %}"
)
TEXT = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 2,
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
SQUARE = {"height": 32, "width": 32}


def tokenizer(template: str, image: str, special: tuple[str, ...] = (), **named: str):
    """A byte-level tokenizer whose ids fit in 400, with these control tokens.

    Args:
        template: of the chat; IMAGE in it stands for ``image``.
        image: the image token.
        special: further control tokens.
        named: control tokens that the processor asks the tokenizer for by name.
    """
    made = build_tokenizer(TEXTS, vocabulary=300)
    made.add_special_tokens({"additional_special_tokens": [*special, image, *named.values()]})
    made.chat_template = template.replace("IMAGE", image) or None
    for name, token in named.items():
        made._set_model_specific_special_tokens({name: token})
    return made


def build(kind: str, directory: Path) -> Path:
    """Writes an untrained model of this `model_type` and what belongs to it.

    Args:
        kind: one of `BUILDERS`.
    """
    import transformers as hf

    torch.manual_seed(0)
    config, tok, image_processor = BUILDERS[kind]()
    model = hf.AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():  # untrained attention is nearly uniform; sharper makes comparisons mean something
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.mul_(8)
            if name.endswith(("image_newline", "mm_input_projection_weight", "perceiver_resampler.latents")):
                weight.normal_()
    model.save_pretrained(directory)
    tok.save_pretrained(directory)
    image_processor.save_pretrained(directory)
    return directory


def _image_class(kind: str) -> type:
    """The image processor of a `model_type` that works with PIL."""
    import transformers as hf
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    return getattr(hf, IMAGE_PROCESSOR_MAPPING_NAMES[kind]["pil"])


def _qwen(kind: str) -> tuple:
    import transformers as hf

    tok = tokenizer(
        CHATML.replace("IMAGE", "<|vision_start|>IMAGE<|vision_end|>"),
        "<|image_pad|>",
        ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"),
    )
    ids = {
        "image_token_id": tok.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": tok.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": tok.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tok.convert_tokens_to_ids("<|vision_end|>"),
    }
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {
        "hidden_size": 32,
        "depth": 1,
        "num_heads": 2,
        "intermediate_size": 48,
        "patch_size": 4,
        "out_hidden_size": 32,
    }
    text = TEXT | {"rope_parameters": rope}
    if kind == "qwen3_vl":
        vision |= {"deepstack_visual_indexes": [], "num_position_embeddings": 64}
        config = hf.Qwen3VLConfig(text_config=text | {"head_dim": 8}, vision_config=vision, **ids)
    else:
        vision |= {"window_size": 16, "fullatt_block_indexes": [0]}
        config = hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    size = {"shortest_edge": 32 * 32, "longest_edge": 72 * 72}
    return config, tok, _image_class(kind)(patch_size=4, size=size)


def _llava(kind: str) -> tuple:
    import transformers as hf

    tok = tokenizer(VICUNA, "<image>", ("</s>",))
    image_id = tok.convert_tokens_to_ids("<image>")
    tower = VISION | {"num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
    clip = tower | {"model_type": "clip_vision_model", "projection_dim": 32}
    text = TEXT | {"model_type": "llama"}
    if kind == "llava":
        config = hf.LlavaConfig(vision_config=clip, text_config=text, image_token_index=image_id)
        return config, tok, hf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE)
    if kind == "llava_next":
        pins = [[32, 64], [64, 32], [64, 64], [32, 96], [96, 32]]
        config = hf.LlavaNextConfig(
            vision_config=clip, text_config=text, image_token_index=image_id, image_grid_pinpoints=pins
        )
        made = _image_class(kind)(size={"shortest_edge": 32}, crop_size=SQUARE, image_grid_pinpoints=pins)
        return config, tok, made
    # As in the published models, tiles are no whole number of patches: the last pixels of each are not seen.
    pins = [[36 * a, 36 * b] for a in range(1, 5) for b in range(1, 5)]
    config = hf.LlavaOnevisionConfig(
        vision_config=tower | {"model_type": "siglip_vision_model", "vision_use_head": False, "image_size": 36},
        text_config=TEXT | {"model_type": "qwen2"},
        image_token_index=image_id,
        image_grid_pinpoints=pins,
        vision_aspect_ratio="anyres_max_4",
    )
    return config, tok, _image_class(kind)(size={"height": 36, "width": 36}, image_grid_pinpoints=pins)


def _internvl() -> tuple:
    import transformers as hf

    tok = tokenizer(
        CHATML, "<IMG_CONTEXT>", ("<|im_start|>", "<|im_end|>"), start_image_token="<img>", end_image_token="</img>"
    )
    config = hf.InternVLConfig(
        vision_config=VISION | {"image_size": [32, 32], "patch_size": [4, 4]},
        text_config=TEXT | {"model_type": "qwen2"},
        image_token_id=tok.convert_tokens_to_ids("<IMG_CONTEXT>"),
    )
    return config, tok, _image_class("internvl")(size=SQUARE, min_patches=1, max_patches=6)


def _idefics3() -> tuple:
    import transformers as hf

    rows = tuple(f"<row_{r + 1}_col_{c + 1}>" for r in range(4) for c in range(4))
    tok = tokenizer(
        CHATML, "<image>", ("<|im_start|>", "<|im_end|>", "<fake_token_around_image>", "<global-img>", *rows)
    )
    config = hf.Idefics3Config(
        vision_config=VISION | {"image_size": 32, "patch_size": 4},
        text_config=TEXT | {"model_type": "llama"},
        image_token_id=tok.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    made = _image_class("idefics3")(size={"longest_edge": 96}, max_image_size={"longest_edge": 32})
    return config, tok, made


def _idefics2(split: bool) -> tuple:
    import transformers as hf

    tok = tokenizer(CHATML, "<image>", ("<|im_start|>", "<|im_end|>", "<fake_token_around_image>"))
    perceiver = {
        "hidden_size": 32,
        "resampler_n_latents": 8,
        "resampler_depth": 3,
        "resampler_n_heads": 4,
        "resampler_head_dim": 8,
        "num_key_value_heads": 2,
    }
    config = hf.Idefics2Config(
        vision_config=VISION | {"image_size": 96, "patch_size": 8},
        perceiver_config=perceiver,
        text_config=TEXT | {"model_type": "mistral"},
        image_token_id=tok.convert_tokens_to_ids("<image>"),
    )
    made = _image_class("idefics2")(size={"shortest_edge": 30, "longest_edge": 92}, do_image_splitting=split)
    return config, tok, made


def _minicpm46() -> tuple:
    import transformers as hf

    names = ("image_start", "image_end", "slice_start", "slice_end", "image_id_start", "image_id_end")
    texts = ("<image>", "</image>", "<slice>", "</slice>", "<image_id>", "</image_id>")
    tok = tokenizer(
        CHATML,
        "<|image_pad|>",
        ("<|im_start|>", "<|im_end|>", "<|video_pad|>"),
        **{f"{name}_token": text for name, text in zip(names, texts, strict=True)},
    )
    text = TEXT | {
        "model_type": "qwen3_5_text",
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        "partial_rotary_factor": 1.0,
    }
    config = hf.MiniCPMV4_6Config(
        text_config=text,
        vision_config=VISION | {"num_hidden_layers": 2, "image_size": 64, "patch_size": 4},
        insert_layer_id=0,
        image_token_id=tok.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tok.convert_tokens_to_ids("<|video_pad|>"),
    )
    return config, tok, _image_class("minicpmv4_6")(patch_size=4, scale_resolution=64)


def _paligemma() -> tuple:
    import transformers as hf

    tok = tokenizer("", "<image>")  # it has no chat template
    vision = {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 4, "vision_use_head": False}
    config = hf.PaliGemmaConfig(
        vision_config=VISION | vision,
        text_config=TEXT | {"model_type": "gemma", "head_dim": 8},
        image_token_index=tok.convert_tokens_to_ids("<image>"),
        projection_dim=32,
    )
    return config, tok, _image_class("paligemma")(size=SQUARE, image_seq_length=64)


def _gemma3() -> tuple:
    import transformers as hf

    tok = tokenizer(
        GEMMA,
        "<image_soft_token>",
        ("<start_of_turn>", "<end_of_turn>"),
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
    )
    tok.chat_template = GEMMA.replace("IMAGE", "<start_of_image>")
    text = TEXT | {"head_dim": 8, "num_hidden_layers": 3, "sliding_window": 16}
    text["layer_types"] = ["sliding_attention", "full_attention", "full_attention"]
    config = hf.Gemma3Config(
        text_config=text,
        vision_config=VISION | {"image_size": 32, "patch_size": 4, "vision_use_head": False},
        mm_tokens_per_image=16,
        image_token_index=tok.convert_tokens_to_ids("<image_soft_token>"),
        boi_token_index=tok.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tok.convert_tokens_to_ids("<end_of_image>"),
    )
    return config, tok, _image_class("gemma3")(size=SQUARE, do_pan_and_scan=False)


# `model_type` -> what makes (config, tokenizer, image processor); `idefics2_split` cuts images into tiles
BUILDERS: dict[str, Callable[[], tuple]] = {
    "qwen2_5_vl": lambda: _qwen("qwen2_5_vl"),
    "qwen3_vl": lambda: _qwen("qwen3_vl"),
    "llava": lambda: _llava("llava"),
    "llava_next": lambda: _llava("llava_next"),
    "llava_onevision": lambda: _llava("llava_onevision"),
    "internvl": _internvl,
    "idefics3": _idefics3,
    "gemma3": _gemma3,
    "idefics2": lambda: _idefics2(split=False),
    "idefics2_split": lambda: _idefics2(split=True),
    "paligemma": _paligemma,
    "minicpmv4_6": _minicpm46,
}
