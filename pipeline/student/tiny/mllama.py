"""A tiny Llama 3.2 Vision: the real classes, a real tokenizer and chat template, and next to no weights.

The world's base model and the tests are built by the same function, so what is tested is what is trained.
"""

from collections.abc import Iterable
from pathlib import Path

SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
IMAGE = "<|image|>"
# Llama 3's way of cutting text before byte pairs are merged.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Llama 3.2 Vision's rules: texts are trimmed, and a system turn beside an image is refused.
TEMPLATE = """{{- bos_token }}
{%- set ns = namespace(images=false) %}
{%- for message in messages %}
{%- if message['content'] is not string %}
{%- for part in message['content'] %}{% if part['type'] == 'image' %}{% set ns.images = true %}{% endif %}{% endfor %}
{%- endif %}
{%- endfor %}
{%- for message in messages %}
{%- if message['role'] == 'system' and ns.images %}
{{- raise_exception('Prompting with images is incompatible with system messages.') }}
{%- endif %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{%- if message['content'] is string %}
{{- message['content'] | trim }}
{%- else %}
{%- for part in message['content'] %}
{%- if part['type'] == 'image' %}{{- '<|image|>' }}{% else %}{{- part['text'] | trim }}{% endif %}
{%- endfor %}
{%- endif %}
{{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""


def build_tokenizer(texts: Iterable[str], vocabulary: int = 1024):
    """A byte-level BPE tokenizer in the manner of Llama 3; frequent words of the texts become single tokens.

    Args:
        texts: what it is trained on.
        vocabulary: most tokens it may have, control tokens included. The image token comes on top, as in Llama.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = list(texts)
    # A word is a token of its own with a space before it and at the start of a turn; so are role names.
    starts = [text[:1].upper() + text[1:] for text in texts] + [text.strip() for text in texts]
    raw.train_from_iterator(texts + starts + ["system", "user", "assistant", "\n\n"] * 10, trainer)
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*SPECIAL, IMAGE)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=SPECIAL[0],
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        clean_up_tokenization_spaces=False,
        model_max_length=131072,
    )


def _start(model, gate: float) -> None:
    """Starting weights for a narrow model: Llama's own (deviation 0.02, gates shut) suit widths of thousands.

    Projections start with unit gain, gates open, and patches know their row and column at once, by sines and cosines.
    """
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("cross_attn_attn_gate", "cross_attn_mlp_gate", "gate_attn", "gate_ffn")):
                parameter.fill_(gate)
            elif parameter.ndim == 2 and ("_proj." in name or ".fc" in name or "multi_modal_projector" in name):
                parameter.normal_(0, parameter.shape[1] ** -0.5)
        positions = model.model.vision_model.gated_positional_embedding.embedding
        side, quarter = round((len(positions) - 1) ** 0.5), positions.shape[1] // 4
        angle_SQ = torch.arange(side)[:, None] * torch.linspace(1, side / 2, quarter) * torch.pi / side
        wave_SD = torch.cat([angle_SQ.sin(), angle_SQ.cos()], dim=1)
        rows, columns = wave_SD[:, None].expand(-1, side, -1), wave_SD[None].expand(side, -1, -1)
        positions[1:, : 4 * quarter] = torch.cat([rows, columns], dim=2).flatten(0, 1)
        model.model.vision_model.patch_embedding.weight.normal_(0, 0.08)


def build_mllama(
    directory: str | Path,
    texts: Iterable[str],
    *,
    hidden: int = 112,
    layers: int = 5,
    cross: tuple[int, ...] = (1, 3),
    heads: int = 4,
    key_heads: int = 2,
    vision_hidden: int = 64,
    vision_layers: int = 2,
    global_layers: int = 1,
    image_size: int = 64,
    patch_size: int = 8,
    max_num_tiles: int = 1,
    vocabulary: int = 1024,
    gate: float = 1.0,
    seed: int = 0,
) -> Path:
    """Writes an untrained `MllamaForConditionalGeneration` with its processor.

    Args:
        directory: where to; made if absent.
        texts: turns that the tokenizer learns its words from.
        hidden, layers, heads, key_heads: the text model's width, depth and attention heads.
        cross: which of the layers attend to the image.
        vision_hidden, vision_layers, global_layers: the vision tower's width and its two depths.
        image_size, patch_size: pixels of a tile and of a patch.
        max_num_tiles: tiles an image may be split into.
        vocabulary: most tokens of the tokenizer.
        gate: start of the cross-attention gates, before tanh. At Llama's own 0 nothing would flow at first.
        seed: of the weights.
    """
    import torch
    from transformers import GenerationConfig, MllamaConfig, MllamaForConditionalGeneration, MllamaProcessor
    from transformers.models.mllama.image_processing_pil_mllama import (
        MllamaImageProcessorPil,
        get_all_supported_aspect_ratios,
    )

    directory = Path(directory)
    tokenizer = build_tokenizer(texts, vocabulary)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE)
    image_processor = MllamaImageProcessorPil(
        size={"height": image_size, "width": image_size}, max_image_tiles=max_num_tiles
    )
    processor = MllamaProcessor(image_processor, tokenizer, chat_template=TEMPLATE)
    config = MllamaConfig(
        text_config={
            "vocab_size": image_id,
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "cross_attention_layers": list(cross),
            "num_attention_heads": heads,
            "num_key_value_heads": key_heads,
            "intermediate_size": 2 * hidden,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "hidden_size": vision_hidden,
            "num_hidden_layers": vision_layers,
            "num_global_layers": global_layers,
            "attention_heads": max(vision_hidden // 32, 1),
            "intermediate_size": 4 * vision_hidden,
            "image_size": image_size,
            "patch_size": patch_size,
            "max_num_tiles": max_num_tiles,
            "supported_aspect_ratios": [list(ratio) for ratio in get_all_supported_aspect_ratios(max_num_tiles)],
            "intermediate_layers_indices": [0],
            "vision_output_dim": 2 * vision_hidden,
        },
        image_token_index=image_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MllamaForConditionalGeneration(config)
        _start(model, gate)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory
