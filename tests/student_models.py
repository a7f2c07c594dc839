"""Tiny models of the real classes of transformers, with the special tokens and chat templates of their kind."""

from pathlib import Path

import torch

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
KINDS = ("qwen2_5_vl", "qwen3_vl", "llava", "llava_next", "llava_onevision", "internvl", "idefics3", "gemma3")


def tokenizer(template: str, image: str, special: tuple[str, ...] = (), **named: str):
    """A byte-level tokenizer whose ids fit in 400, with these control tokens."""
    from pipeline.world.student import build_tokenizer

    made = build_tokenizer(TEXTS, vocabulary=300)
    made.add_special_tokens({"additional_special_tokens": [*special, image, *named.values()]})
    made.chat_template = template.replace("IMAGE", image)
    for name, token in named.items():
        made._set_model_specific_special_tokens({name: token})
    return made


def build(kind: str, directory: Path) -> Path:
    """Writes a tiny model of this kind, untrained, and what belongs to it."""
    import transformers as hf
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    torch.manual_seed(0)
    image_class = getattr(hf, IMAGE_PROCESSOR_MAPPING_NAMES[kind]["pil"])
    square = {"height": 32, "width": 32}
    if kind in ("qwen2_5_vl", "qwen3_vl"):
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
            text |= {"head_dim": 8}
            config = hf.Qwen3VLConfig(text_config=text, vision_config=vision, **ids)
        else:
            vision |= {"window_size": 16, "fullatt_block_indexes": [0]}
            config = hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
        processor = image_class(patch_size=4, size={"shortest_edge": 32 * 32, "longest_edge": 72 * 72})
    elif kind.startswith("llava"):
        tok = tokenizer(VICUNA, "<image>", ("</s>",))
        image_id = tok.convert_tokens_to_ids("<image>")
        clip = {
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "projection_dim": 32,
        }
        text = TEXT | {"model_type": "llama"}
        pins = [[32, 64], [64, 32], [64, 64], [32, 96], [96, 32]]
        if kind == "llava":
            config = hf.LlavaConfig(vision_config=clip, text_config=text, image_token_index=image_id)
            processor = hf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=square)
        elif kind == "llava_next":
            config = hf.LlavaNextConfig(
                vision_config=clip, text_config=text, image_token_index=image_id, image_grid_pinpoints=pins
            )
            processor = image_class(size={"shortest_edge": 32}, crop_size=square, image_grid_pinpoints=pins)
        else:
            pins = [[32 * a, 32 * b] for a in range(1, 5) for b in range(1, 5)]
            siglip = clip | {"model_type": "siglip_vision_model", "vision_use_head": False}
            siglip.pop("projection_dim")
            config = hf.LlavaOnevisionConfig(
                vision_config=siglip,
                text_config=TEXT | {"model_type": "qwen2"},
                image_token_index=image_id,
                image_grid_pinpoints=pins,
                vision_aspect_ratio="anyres_max_4",
            )
            processor = image_class(size=square, image_grid_pinpoints=pins)
    elif kind == "internvl":
        tok = tokenizer(
            CHATML,
            "<IMG_CONTEXT>",
            ("<|im_start|>", "<|im_end|>"),
            start_image_token="<img>",
            end_image_token="</img>",
        )
        vision = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": [32, 32],
            "patch_size": [4, 4],
        }
        config = hf.InternVLConfig(
            vision_config=vision,
            text_config=TEXT | {"model_type": "qwen2"},
            image_token_id=tok.convert_tokens_to_ids("<IMG_CONTEXT>"),
        )
        processor = image_class(size=square, min_patches=1, max_patches=6)
    elif kind == "idefics3":
        rows = tuple(f"<row_{r + 1}_col_{c + 1}>" for r in range(4) for c in range(4))
        tok = tokenizer(
            CHATML, "<image>", ("<|im_start|>", "<|im_end|>", "<fake_token_around_image>", "<global-img>", *rows)
        )
        vision = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 4,
        }
        config = hf.Idefics3Config(
            vision_config=vision,
            text_config=TEXT | {"model_type": "llama"},
            image_token_id=tok.convert_tokens_to_ids("<image>"),
            scale_factor=2,
        )
        processor = image_class(size={"longest_edge": 96}, max_image_size={"longest_edge": 32})
    else:
        tok = tokenizer(
            GEMMA,
            "<image_soft_token>",
            ("<start_of_turn>", "<end_of_turn>"),
            boi_token="<start_of_image>",
            eoi_token="<end_of_image>",
        )
        tok.chat_template = GEMMA.replace("IMAGE", "<start_of_image>")
        vision = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 4,
            "vision_use_head": False,
        }
        text = TEXT | {"head_dim": 8, "num_hidden_layers": 3, "sliding_window": 16}
        text["layer_types"] = ["sliding_attention", "full_attention", "full_attention"]
        config = hf.Gemma3Config(
            text_config=text,
            vision_config=vision,
            mm_tokens_per_image=16,
            image_token_index=tok.convert_tokens_to_ids("<image_soft_token>"),
            boi_token_index=tok.convert_tokens_to_ids("<start_of_image>"),
            eoi_token_index=tok.convert_tokens_to_ids("<end_of_image>"),
        )
        processor = image_class(size=square, do_pan_and_scan=False)
    model = hf.AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():  # untrained attention is nearly uniform; sharper makes the comparisons mean something
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.mul_(8)
            if name.endswith(("image_newline", "mm_input_projection_weight")):
                weight.normal_()
    model.save_pretrained(directory)
    tok.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory
