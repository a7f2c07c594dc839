"""Reads the attention of chosen text positions while the model runs its usual fused kernel.

One attention function is registered with transformers. It returns the fused kernel's output untouched and, in layers
that are tapped, computes the probabilities of the wanted rows only, in float32, over all keys, with gradients.

A model whose text attends to the latents of a perceiver or resampler (a *relay*) has that attention captured too, over
all latents: its family names the modules (`Family.relays`), says how several of them compose (`Family.through`) and
gives its pieces ``latents_Q``; `student_maps` then hands each latent's attention on to the patches. Modules of our own
call `tapped_attention` instead of a kernel and say so by ``calls_tap = True``.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn

from pipeline.errors import UserError
from pipeline.student.batch import StudentBatch, WordRows
from pipeline.student.planes import latent_maps, project, project_latents

if TYPE_CHECKING:
    from pipeline.student.family import Family

# transformers looks for "sdpa" and "flash" in the name when it decides how to prepare masks.
NAME = "sdpa_lavender"
SUPPORTED = ("sdpa", "eager", NAME)


class AttentionTap:
    """Captures attention rows of a model during its forward.

    Usage::

        tap = AttentionTap(model, family)
        tap.rows(batch.words)
        model(**batch.inputs)
        tap.maps()  # {layer: (R, H, K)}

    The model keeps running through the tap until `close`; without rows it only costs a function call. Works with
    PEFT, DDP, FSDP2 and non-reentrant gradient checkpointing.

    Args:
        model: the student, wrapped or not.
        family: its family, which names the layers.

    Raises:
        UserError: the model runs an attention kernel that cannot be tapped.
        ValueError: the family's chosen layers do not look at the image.
    """

    def __init__(self, model: nn.Module, family: "Family"):
        _register()
        self.layers = family.layers(model)
        if not self.layers:
            raise UserError("this model has no attention from text to image")
        self._words: WordRows | None = None
        self._captured: dict[int | str, torch.Tensor] = {}
        self._model = model
        self._through = family.through
        self.relays = {f"relay {number}": module for number, module in enumerate(family.relays(model))}
        self._checkpointed = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
        self._previous = []
        tapped = self.layers | self.relays
        configs = {id(m.config): m.config for m in tapped.values() if not getattr(m, "calls_tap", False)}
        for config in configs.values():
            current = config._attn_implementation
            if current not in SUPPORTED:
                raise UserError(f"attention '{current}' cannot be tapped: set model.attention=sdpa")
            self._previous.append((config, current))
        for config in configs.values():
            _switch(model, config, NAME)
        for index, module in tapped.items():
            module.lavender_tap = (self, index)

    def rows(self, words: WordRows | None) -> None:
        """Sets the rows that the next forward captures and forgets the last ones; None captures nothing.

        With gradient checkpointing the backward of one forward comes before the rows of the next.

        Raises:
            UserError: the model uses reentrant gradient checkpointing, whose first pass carries no gradients.
        """
        self._captured = {}
        self._words = words if words is not None and len(words.row_batch) else None
        if self._words is None:
            return
        for module in self._checkpointed:
            function = getattr(module, "_gradient_checkpointing_func", None)
            if module.gradient_checkpointing and getattr(function, "keywords", {}).get("use_reentrant", False):
                raise UserError(
                    "reentrant gradient checkpointing loses the gradient of the attention: "
                    "enable it with use_reentrant=False"
                )

    def maps(self) -> dict[int, torch.Tensor]:
        """What the last forward captured: float32 probabilities (R, H, K) by layer; empty without rows.

        Raises:
            RuntimeError: there were rows but some tapped layer did not run.
        """
        if self._words is None:
            return {}
        missing = [index for index in self.layers if index not in self._captured]
        if missing:
            raise RuntimeError(f"no attention captured in layers {missing}: run the model's forward after tap.rows")
        return {index: self._captured[index] for index in self.layers}

    def relayed(self) -> torch.Tensor:
        """The last forward's attention from latents to the relay's keys: (N, Q, K) float32, the mean over its heads.

        Raises:
            RuntimeError: the relay did not run, or there were no rows.
        """
        missing = [name for name in self.relays if name not in self._captured]
        if missing or not self.relays:
            raise RuntimeError("no attention captured in the perceiver: run the model's forward after tap.rows")
        return self._through([self._captured[name] for name in self.relays])

    def capture(
        self,
        index: int | str,
        module: nn.Module,
        query_BHLD: torch.Tensor,
        key_BHKD: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float | None,
        is_causal: bool | None,
    ) -> None:
        """Called by the attention function of a tapped layer."""
        words = self._words
        if words is None:
            return
        if index in self.relays:
            rows_NQ = torch.arange(query_BHLD.shape[2], device=query_BHLD.device).expand(len(query_BHLD), -1)
            probs_NHQK = slot_probabilities(module, query_BHLD, key_BHKD, mask, scaling, is_causal, rows_NQ)
            self._captured.setdefault(index, probs_NHQK.mean(1))
            return
        probs_BHSK = slot_probabilities(module, query_BHLD, key_BHKD, mask, scaling, is_causal, words.slots)
        rows_RHK = probs_BHSK[words.row_batch, :, words.row_slot]
        # Gradient checkpointing runs the layer again in backward. The rows must be computed again there, so that the
        # graph saves the same tensors, but the loss was made of the first pass's.
        self._captured.setdefault(index, rows_RHK)

    def close(self) -> None:
        """Gives the model back as it was."""
        for module in (*self.layers.values(), *self.relays.values()):
            if getattr(module, "lavender_tap", (None,))[0] is self:
                del module.lavender_tap
        for config, name in self._previous:
            _switch(self._model, config, name)
        self._previous = []
        self.rows(None)

    def __enter__(self) -> "AttentionTap":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def slot_probabilities(
    module: nn.Module,
    query_BHLD: torch.Tensor,
    key_BHKD: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    is_causal: bool | None,
    slots_BS: torch.Tensor,
) -> torch.Tensor:
    """(B, H, S, K): attention probabilities, float32, of the query positions in ``slots_BS``.

    Args:
        module: the attention module, asked for ``is_causal`` where the call does not say.
        query_BHLD, key_BHKD: after rotary embedding and norms; the key may have fewer heads.
        mask: additive or boolean, (B, 1 or H, L, K); None is causal for modules that are.
        scaling: of the scores; None is 1/sqrt(D).
    """
    batch, heads, length, depth = query_BHLD.shape
    key_heads, keys = key_BHKD.shape[1:3]
    slots = slots_BS.shape[1]
    index_BHSD = slots_BS[:, None, :, None].expand(-1, heads, -1, depth)
    query_BHSD = query_BHLD.gather(2, index_BHSD).float() * (depth**-0.5 if scaling is None else scaling)
    # Query heads that share a key head become further rows of it, which saves repeating the keys.
    grouped = query_BHSD.reshape(batch, key_heads, -1, depth)
    scores_BHSK = (grouped @ key_BHKD.float().transpose(2, 3)).view(batch, heads, slots, keys)
    if mask is not None:
        picked = mask.expand(batch, -1, -1, -1).gather(
            2, slots_BS[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
        )[..., :keys]
        if picked.dtype == torch.bool:
            scores_BHSK = scores_BHSK.masked_fill(~picked, torch.finfo(torch.float32).min)
        else:
            scores_BHSK = scores_BHSK + picked.float()
    elif length > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        later_BSK = torch.arange(keys, device=slots_BS.device) > slots_BS[:, :, None]
        scores_BHSK = scores_BHSK.masked_fill(later_BSK[:, None], torch.finfo(torch.float32).min)
    return scores_BHSK.softmax(-1)


def student_maps(tap: AttentionTap, batch: StudentBatch) -> torch.Tensor:
    """Raw attention of each word on the whole image: (W, layers, H, 32, 32), float32, see `planes.project`.

    The mean over a word's rows; no Aligner, no normalisation. Behind a relay: attention to the latents times the
    latents' own attention to the patches.
    """
    captured = tap.maps()
    words = batch.words
    if not captured:
        heads = next(iter(tap.layers.values())).config.num_attention_heads
        side = batch.planes.rows_y.shape[2]
        return batch.planes.rows_y.new_zeros(len(words), len(tap.layers), heads, side, side)
    count_W = torch.zeros(len(words), device=words.row_word.device).index_add_(
        0, words.row_word, torch.ones(len(words.row_word), device=words.row_word.device)
    )
    latents_BNSS = None if batch.planes.latents is None else latent_maps(tap.relayed(), batch.planes)
    maps = []
    for probs_RHK in captured.values():
        mean_WHK = probs_RHK.new_zeros(len(words), *probs_RHK.shape[1:]).index_add(0, words.row_word, probs_RHK)
        mean_WHK = mean_WHK / count_W[:, None, None]
        if latents_BNSS is None:
            maps.append(project(mean_WHK, batch.planes, words.word_example))
        else:
            most = words.slots.shape[1]
            maps.append(project_latents(mean_WHK, latents_BNSS, batch.planes, words.word_example, most))
    return torch.stack(maps, 1)


def tapped_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """The function registered with transformers: its own fused attention, and the tap where there is one.

    Returns the output (B, L, H, D) and None. Without a mask it is causal unless ``is_causal`` or the module says no.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    tap = getattr(module, "lavender_tap", None)
    if tap is not None:
        tap[0].capture(tap[1], module, query, key, attention_mask, scaling, kwargs.get("is_causal"))
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, tapped_attention)
    # Without a mask function of the same name transformers would drop the padding mask without a word.
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _switch(model: nn.Module, config, name: str) -> None:
    """Sets the attention of the submodel that ``config`` belongs to, and of it only."""
    from transformers import PreTrainedModel

    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config is config:
            module.set_attn_implementation(name)
            return
    raise UserError(f"cannot tap {type(model).__name__}: no submodel owns the config of its attention layers")
