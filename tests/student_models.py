"""Tiny models of the real classes of transformers, with the special tokens and chat templates of their kind."""

import json
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
NATIVE = (
    "qwen2_5_vl",
    "qwen3_vl",
    "llava",
    "llava_next",
    "llava_onevision",
    "internvl",
    "idefics3",
    "gemma3",
    "idefics2",
    "idefics2_split",
    "paligemma",
    "minicpmv4_6",
)
FLAMINGOS = {"openflamingo-3b": ("mosaic_gpt", 1), "openflamingo-4b": ("gpt_neox", 2), "openflamingo-9b": ("mpt", 4)}
KINDS = ("mllama", "minicpm-llama3-v25", *NATIVE, *FLAMINGOS)


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
    split, kind = kind.endswith("_split"), kind.removesuffix("_split")
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
    elif kind == "idefics2":
        tok = tokenizer(CHATML, "<image>", ("<|im_start|>", "<|im_end|>", "<fake_token_around_image>"))
        vision = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 96,
            "patch_size": 8,
        }
        perceiver = {
            "hidden_size": 32,
            "resampler_n_latents": 8,
            "resampler_depth": 3,
            "resampler_n_heads": 4,
            "resampler_head_dim": 8,
            "num_key_value_heads": 2,
        }
        config = hf.Idefics2Config(
            vision_config=vision,
            perceiver_config=perceiver,
            text_config=TEXT | {"model_type": "mistral"},
            image_token_id=tok.convert_tokens_to_ids("<image>"),
        )
        processor = image_class(size={"shortest_edge": 30, "longest_edge": 92}, do_image_splitting=split)
    elif kind == "minicpmv4_6":
        names = ("image_start", "image_end", "slice_start", "slice_end", "image_id_start", "image_id_end")
        texts = ("<image>", "</image>", "<slice>", "</slice>", "<image_id>", "</image_id>")
        tok = tokenizer(
            CHATML,
            "<|image_pad|>",
            ("<|im_start|>", "<|im_end|>", "<|video_pad|>"),
            **{f"{name}_token": text for name, text in zip(names, texts, strict=True)},
        )
        vision = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 4,
        }
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
            vision_config=vision,
            insert_layer_id=0,
            image_token_id=tok.convert_tokens_to_ids("<|image_pad|>"),
            video_token_id=tok.convert_tokens_to_ids("<|video_pad|>"),
        )
        processor = image_class(patch_size=4, scale_resolution=64)
    elif kind == "paligemma":
        tok = tokenizer("", "<image>")
        tok.chat_template = None  # it has none
        vision = {
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 4,
            "vision_use_head": False,
        }
        config = hf.PaliGemmaConfig(
            vision_config=vision,
            text_config=TEXT | {"model_type": "gemma", "head_dim": 8},
            image_token_index=tok.convert_tokens_to_ids("<image>"),
            projection_dim=32,
        )
        processor = image_class(size=square, image_seq_length=64)
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
            if name.endswith(("image_newline", "mm_input_projection_weight", "perceiver_resampler.latents")):
                weight.normal_()
    model.save_pretrained(directory)
    tok.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


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

    from pipeline.world.student import build_tokenizer

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


def build_student(kind: str, directory: Path):
    """The settings that load a tiny model of this kind."""
    from pipeline.student.config import ModelConfig

    if kind == "mllama":
        from pipeline.world.student import build_mllama

        build_mllama(directory, TEXTS, max_num_tiles=4, image_size=32, vocabulary=400)
        return ModelConfig(name=kind, path=str(directory))
    if kind == "minicpm-llama3-v25":
        from minicpm_models import build_minicpm

        return ModelConfig(name=kind, path=str(build_minicpm(directory)))
    if kind in FLAMINGOS:
        return ModelConfig(name=kind, **build_openflamingo(kind, directory))
    return ModelConfig(name=kind, path=str(build(kind, directory)))
