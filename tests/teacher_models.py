"""Tiny random diffusion pipelines from the real classes, for the tests of the teacher."""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

MERGES = [("c", "i"), ("r", "c"), ("ci", "rc"), ("l", "e</w>"), ("circ", "le</w>"), ("r", "e"), ("re", "d</w>"),
          ("t", "h"), ("th", "e</w>"), ("Ã", "©</w>"), ("c", "a"), ("ca", "f")]  # fmt: skip


def clip_tokenizer(**options) -> CLIPTokenizer:
    """CLIP's byte-level BPE with every byte and a few merges, so that words have one or many tokens."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = alphabet + [c + "</w>" for c in alphabet] + ["".join(pair) for pair in MERGES]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=MERGES, model_max_length=77, **options)


def text_encoder(tokenizer: CLIPTokenizer, width: int = 32, layers: int = 2, act: str = "quick_gelu") -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        hidden_act=act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def sd_parts(version: int = 1, sample: int = 16, seed: int = 0) -> dict:
    """Components of a Stable Diffusion of major version 1, or 2 (velocity, linear projections, heads of one width, the
    text side of OpenCLIP, which pads with exclamation marks)."""
    torch.manual_seed(seed)
    tokenizer = clip_tokenizer() if version == 1 else clip_tokenizer(pad_token="!")
    unet = UNet2DConditionModel(
        sample_size=sample,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2 if version == 1 else (2, 4, 4),
        use_linear_projection=version == 2,
    )
    return {
        "vae": tiny_vae(4, sample),
        "text_encoder": text_encoder(tokenizer, act="quick_gelu" if version == 1 else "gelu").eval(),
        "tokenizer": tokenizer,
        "unet": sharpen(unet),
        "scheduler": DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="epsilon" if version == 1 else "v_prediction",
        ),
    }


def save_sd(path, version: int = 1, **options) -> str:
    """A directory as `StableDiffusionPipeline.save_pretrained` writes it."""
    pipeline = StableDiffusionPipeline(
        **sd_parts(version, **options), safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.save_pretrained(path)
    return str(path)


# --- larger families --------------------------------------------------------------------------------------------------


def t5_tokenizer() -> T5Tokenizer:
    """A unigram vocabulary with single letters and a few pieces, so that words have one or many tokens."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(piece, -2.0) for piece in ("▁red", "▁circ", "le", "▁the", "▁is", "▁near", "▁Where", "caf")]
    pieces += [(chr(code), -6.0) for code in range(33, 127)] + [("é", -6.0)]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def t5_encoder(width: int = 16) -> T5EncoderModel:
    config = T5Config(vocab_size=200, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


def projected_encoder(tokenizer: CLIPTokenizer, width: int, projection: int) -> CLIPTextModelWithProjection:
    config = text_encoder(tokenizer, width, act="gelu").config
    config.projection_dim = projection
    return CLIPTextModelWithProjection(config).eval()


def tiny_vae(channels: int, sample: int) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=2 * sample,
        shift_factor=0.1 if channels == 16 else None,
        use_quant_conv=channels != 16,
        use_post_quant_conv=channels != 16,
    ).eval()


def sharpen(model, factor: float = 12.0):
    """Random weights attend almost evenly; larger queries make maps differ between words and places."""
    for name, parameter in model.named_parameters():
        if name.endswith(("to_q.weight", "norm_q.weight")):
            parameter.data *= factor
    return model.eval()


def sdxl() -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    tokenizer, second = clip_tokenizer(), clip_tokenizer()
    second.pad_token = "!"
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=32 + 16,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
    )
    return StableDiffusionXLPipeline(
        vae=tiny_vae(4, 8),
        text_encoder=text_encoder(tokenizer).eval(),
        text_encoder_2=projected_encoder(second, 16, 24),
        tokenizer=tokenizer,
        tokenizer_2=second,
        unet=sharpen(unet),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
    )


def sd3(t5: bool = True, dual: bool = False) -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    tokenizer, second = clip_tokenizer(), clip_tokenizer()
    second.pad_token = "!"
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=16 + 16,
        pos_embed_max_size=8,
        qk_norm="rms_norm" if dual else None,
        dual_attention_layers=(0,) if dual else (),
    )
    return StableDiffusion3Pipeline(
        transformer=sharpen(transformer, 4.0),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(16, 8),
        text_encoder=projected_encoder(tokenizer, 16, 16),
        tokenizer=tokenizer,
        text_encoder_2=projected_encoder(second, 8, 16),
        tokenizer_2=second,
        text_encoder_3=t5_encoder(32) if t5 else None,
        tokenizer_3=t5_tokenizer() if t5 else None,
    )


def flux(guided: bool = True) -> FluxPipeline:
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=guided,
        axes_dims_rope=(4, 4, 8),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(16, 8),
        text_encoder=text_encoder(tokenizer, 16).eval(),
        tokenizer=tokenizer,
        text_encoder_2=t5_encoder(32),
        tokenizer_2=t5_tokenizer(),
        transformer=sharpen(transformer, 4.0),
    )
