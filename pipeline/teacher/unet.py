"""Stable Diffusion with a UNet (1.x, 2.x, XL): its attention, its noise, and where a forward may end."""

import copy
import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention

from pipeline.errors import UserError
from pipeline.teacher.adapter import Adapter
from pipeline.teacher.capture import Capture, Layer
from pipeline.teacher.config import TeacherConfig
from pipeline.teacher.text import ClipText, Condition, TwoClipText

TRANSFORMER = ".transformer_blocks."  # in the name of every attention layer that the text reaches


class CaptureProcessor:
    """The plain attention of diffusers, which also hands queries and keys to a `Capture` if one comes with the call.

    Args:
        cross: the layer as it enters the maps, or None if it does not.
        keep: whether queries and keys are kept for refinement.

    The output is computed as `AttnProcessor2_0` does, so the model runs exactly as it would without the capture.
    """

    def __init__(self, cross: Layer | None = None, keep: bool = False):
        self.cross = cross
        self.keep = keep

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        capture: Capture | None = None,
    ) -> torch.Tensor:
        assert hidden_states.ndim == 3, hidden_states.shape
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, context.shape[1], context.shape[0])
            attention_mask = attention_mask.view(context.shape[0], attn.heads, -1, attention_mask.shape[-1])
        q = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        k = attn.to_k(context).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        v = attn.to_v(context).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        q = attn.norm_q(q) if attn.norm_q is not None else q
        k = attn.norm_k(k) if attn.norm_k is not None else k
        if capture is not None and self.cross is not None:
            capture.add(self.cross, q, k, q.shape[-1] ** -0.5)
        if capture is not None and self.keep:
            capture.keep(q, k)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        out = attn.to_out[0](out.transpose(1, 2).flatten(2).to(q.dtype))
        out = attn.to_out[1](out)
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor


class UNetAdapter(Adapter):
    """Stable Diffusion 1.x, 2.x and XL.

    Args:
        parts: `unet`, `vae`, `text_encoder`, `tokenizer`, `scheduler` (and the second text encoder and tokenizer of XL)
            as loaded by diffusers and transformers.
        cfg: settings; the layers they choose are read, and the UNet ends after the last block that is read.

    Raises:
        UserError: the settings choose no layer, or a side that the model does not have.
    """

    needs = (*Adapter.needs, "scheduler")

    def __init__(self, parts: dict, cfg: TeacherConfig, device: torch.device):
        unet = parts["unet"]
        sample = unet.config.sample_size
        assert isinstance(sample, int), sample
        super().__init__(parts, cfg, device, sample, unet.config.in_channels)
        self.top = sample
        self.text = TwoClipText(parts) if "text_encoder_2" in parts else ClipText(parts)
        self.alphas = parts["scheduler"].alphas_cumprod.double()
        self.prediction = parts["scheduler"].config.prediction_type
        self.layers, kept = choose_layers(cross_layers(unet), self_layers(unet), cfg)
        self.refine_side = kept[0][1] if kept else 0
        cross = {layer.name: layer for layer in self.layers}
        keep = {name for name, _ in kept}
        for name, module in unet.named_modules():
            if isinstance(module, Attention) and TRANSFORMER in name:
                module.set_processor(CaptureProcessor(cross.get(name), name in keep))
        self.whole = unet if cfg.inversion != "none" else None
        self.unet = cut(unet, {*cross, *keep})
        if cfg.compile:
            self.unet = torch.compile(self.unet)

    def noised(self, latents_BCYX: torch.Tensor, noise_BCYX: torch.Tensor, timestep: int) -> torch.Tensor:
        alpha = self.alphas[timestep]
        return latents_BCYX * alpha.sqrt().item() + noise_BCYX * (1 - alpha).sqrt().item()

    def forward(self, noised_BCYX: torch.Tensor, timestep: int, condition: Condition, capture: Capture) -> None:
        """What the model predicts (noise, velocity, sample) does not matter: its attention reads the noised latents."""
        self._run(self.unet, noised_BCYX, timestep, condition, condition.hidden_BTC, capture)

    def predict(
        self,
        noised_BCYX: torch.Tensor,
        timestep: int,
        alpha: float,
        condition: Condition,
        hidden_BTC: torch.Tensor | None = None,
        capture: Capture | None = None,
    ) -> torch.Tensor:
        """The noise that the whole model sees in the latents, whatever it was trained to predict; float32.

        Args:
            alpha: share of signal in the latents; on the way out it is that of the step before `timestep`.
            hidden_BTC: in the place of the condition's own, for optimisation.
        """
        hidden_BTC = condition.hidden_BTC if hidden_BTC is None else hidden_BTC
        found = self._run(self.whole, noised_BCYX, timestep, condition, hidden_BTC, capture).float()
        signal, noise = alpha**0.5, (1 - alpha) ** 0.5
        if self.prediction == "v_prediction":
            return signal * found + noise * noised_BCYX
        if self.prediction == "sample":
            return (noised_BCYX - signal * found) / noise
        return found

    def _run(self, unet, noised_BCYX, timestep, condition, hidden_BTC, capture) -> torch.Tensor:
        steps = torch.full((len(noised_BCYX),), timestep, device=self.device)
        extra = None
        if isinstance(self.text, TwoClipText):
            height, width = (extent * self.factor for extent in noised_BCYX.shape[-2:])
            ids = torch.tensor([height, width, 0, 0, height, width], device=self.device, dtype=self.dtype)
            extra = {"text_embeds": condition.pooled_BC, "time_ids": ids.expand(len(noised_BCYX), -1)}
        return unet(
            noised_BCYX.to(self.dtype),
            steps,
            encoder_hidden_states=hidden_BTC.to(self.dtype),
            added_cond_kwargs=extra,
            cross_attention_kwargs=None if capture is None else {"capture": capture},
            return_dict=False,
        )[0]


def cross_layers(unet) -> list[tuple[str, int]]:
    """(name, side) of each cross-attention layer in the order of the forward; side as for a square image of the
    model's own size."""
    return [(name, side) for name, side in _attention_layers(unet) if name.endswith(".attn2")]


def self_layers(unet) -> list[tuple[str, int]]:
    """(name, side) of each self-attention layer in the order of the forward."""
    return [(name, side) for name, side in _attention_layers(unet) if name.endswith(".attn1")]


def choose_layers(
    cross: Sequence[tuple[str, int]], selves: Sequence[tuple[str, int]], cfg: TeacherConfig
) -> tuple[list[Layer], list[tuple[str, int]]]:
    """The cross-attention layers that the settings choose, with weights that sum to one, and the self-attention
    layers (name, side) for refinement.

    Raises:
        UserError: nothing is left, or a side is not among the model's.
    """
    sides = sorted({side for _, side in cross})
    for side in cfg.resolutions:
        if side not in sides:
            raise UserError(f"teacher.resolutions has {side}, but this model attends at {sides}: choose among those")
    used = [(name, side) for name, side in cross if re.search(cfg.layers, name)]
    if cfg.resolutions:
        weights = dict(zip(cfg.resolutions, cfg.resolution_weights or [1.0] * len(cfg.resolutions), strict=True))
        used = [(name, side) for name, side in used if weights.get(side)]
        count = {side: sum(s == side for _, s in used) for side in weights}
        raw = [weights[side] / count[side] for _, side in used]
    else:
        raw = [1.0] * len(used)
    if not used:
        raise UserError(
            f"teacher.layers='{cfg.layers}' and teacher.resolutions={cfg.resolutions} leave no layer to read"
        )
    layers = [Layer(name, side, weight / sum(raw)) for (name, side), weight in zip(used, raw, strict=True)]
    if not cfg.refine:
        return layers, []
    side = cfg.refine_resolution or max(layer.side for layer in layers)
    kept = [(name, s) for name, s in selves if s == side]
    if not kept:
        known = sorted({s for _, s in selves})
        raise UserError(f"teacher.refine_resolution is {side}, but this model has self-attention at {known}")
    return layers, kept


def cut(unet, names: set[str]):
    """A UNet that shares the weights of `unet` and ends after the last of the named layers.

    Blocks, the layers inside the last block, its up- or downsampler and the output convolution that come later are
    not run. The attention up to there is bit-equal to that of the whole model (tested).
    """
    ordered = [name for name, _ in _attention_layers(unet)]
    last = max(ordered.index(name) for name in names)
    block, _, inner = ordered[last].partition(".attentions.")
    depth = int(inner.split(".")[0]) + 1

    out = shallow(unet)
    out.conv_norm_out, out.conv_out = None, torch.nn.Identity()
    kind, _, number = block.partition(".")
    if kind == "up_blocks":
        blocks = list(unet.up_blocks)[: int(number) + 1]
        blocks[-1] = shallow(blocks[-1])
        blocks[-1].resnets = torch.nn.ModuleList(list(blocks[-1].resnets)[:depth])
        blocks[-1].attentions = torch.nn.ModuleList(list(blocks[-1].attentions)[:depth])
        blocks[-1].upsamplers = None
        out.up_blocks = torch.nn.ModuleList(blocks)
        return out
    out.up_blocks = torch.nn.ModuleList()
    if kind == "down_blocks":
        blocks = list(unet.down_blocks)[: int(number) + 1]
        blocks[-1] = shallow(blocks[-1])
        blocks[-1].resnets = torch.nn.ModuleList(list(blocks[-1].resnets)[:depth])
        blocks[-1].attentions = torch.nn.ModuleList(list(blocks[-1].attentions)[:depth])
        blocks[-1].downsamplers = None
        out.down_blocks = torch.nn.ModuleList(blocks)
        out.mid_block = None
    return out


def shallow(module):
    """A copy of a module that shares parameters and submodules, but whose submodules can be replaced."""
    out = copy.copy(module)
    out._modules = dict(module._modules)
    return out


def _attention_layers(unet) -> list[tuple[str, int]]:
    """(name, side) of the attention layers of the blocks, in the order of the forward."""
    side = unet.config.sample_size
    out = []

    def collect(prefix: str, block) -> None:
        for name, module in block.named_modules():
            if isinstance(module, Attention) and TRANSFORMER in name:
                out.append((f"{prefix}.{name}", side))

    for number, block in enumerate(unet.down_blocks):
        collect(f"down_blocks.{number}", block)
        side //= 2 if getattr(block, "downsamplers", None) is not None else 1
    if unet.mid_block is not None:
        collect("mid_block", unet.mid_block)
    for number, block in enumerate(unet.up_blocks):
        collect(f"up_blocks.{number}", block)
        side *= 2 if getattr(block, "upsamplers", None) is not None else 1
    return out
