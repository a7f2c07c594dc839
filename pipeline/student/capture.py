"""Reads the attention of chosen text positions while the model runs its usual fused kernel.

One attention function is registered with transformers. It returns the fused kernel's output untouched and, in layers
that are tapped, keeps what the probabilities follow from: the queries of the wanted rows, the keys and the mask. The
probabilities of these rows are computed from them in float32, over all keys, with gradients, when they are asked for;
for maps of words, a few heads at a time, so that they are never held for all heads at once.

A model whose text attends to the latents of a perceiver or resampler (a *relay*) has that attention captured too, over
all latents: its family names the modules (`Family.relays`), says how several of them compose (`Family.through`) and
gives its pieces ``latents_Q``; `student_maps` then hands each latent's attention on to the patches. Modules of our own
call `tapped_attention` instead of a kernel and say so by ``calls_tap = True``.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pipeline.errors import UserError
from pipeline.student.batch import StudentBatch, WordRows
from pipeline.student.planes import Planes, latent_maps, project, project_latents

if TYPE_CHECKING:
    from pipeline.student.family import Family

# transformers looks for "sdpa" and "flash" in the name when it decides how to prepare masks.
NAME = "sdpa_lavender"
SUPPORTED = ("sdpa", "eager", NAME)
# Probabilities held at once on the way to maps: 8 MiB of them. Fewer heads at a time than this allows would be slower.
HELD = 2 << 20


@dataclass(frozen=True)
class Call:
    """The arguments of one call of attention, as far as probabilities depend on them.

    Args:
        query_BHLD: after rotary embedding and norms; of all positions or of some, see ``place_BL``.
        key_BHKD: the same; it may have fewer heads.
        mask: additive or boolean, (B, 1 or H, L, K), for the same positions as the queries; None masks nothing.
        place_BL: the position of each query where later keys are hidden from it; None hides none.
        scaling: of the scores.
        probs_BHLK: the probabilities, if they are so few that they were computed on the spot.
    """

    query_BHLD: torch.Tensor
    key_BHKD: torch.Tensor
    mask: torch.Tensor | None
    place_BL: torch.Tensor | None
    scaling: float
    probs_BHLK: torch.Tensor | None = None

    @property
    def size(self) -> int:
        """How many probabilities there are."""
        return self.query_BHLD.shape[:3].numel() * self.key_BHKD.shape[2]

    def at(self, slots_BS: torch.Tensor) -> "Call":
        """The same call for the queries at some positions only."""
        _, heads, _, depth = self.query_BHLD.shape
        index_B1S1 = slots_BS[:, None, :, None]
        query_BHSD = self.query_BHLD.gather(2, index_B1S1.expand(-1, heads, -1, depth))
        mask = self.mask
        if mask is not None:
            _, layers, _, keys = mask.shape
            mask = mask.expand(len(slots_BS), -1, -1, -1).gather(2, index_B1S1.expand(-1, layers, -1, keys))
        place_BS = None if self.place_BL is None else self.place_BL.expand(len(slots_BS), -1).gather(1, slots_BS)
        return Call(query_BHSD, self.key_BHKD, mask, place_BS, self.scaling)


class AttentionTap:
    """Reads attention rows of a model's forward.

    Usage::

        tap = AttentionTap(model, family)
        tap.rows(batch.words)
        model(**batch.inputs)
        student_maps(tap, batch)  # (W, layers, H, 32, 32)
        tap.maps()  # {layer: (R, H, K)}

    `rows` may be left out in a training loop that hands the loss its batch after the forward; the queries of all
    positions are then kept until the next forward, instead of those of the words. The model keeps running through the
    tap until `close`. Works with PEFT, DDP, FSDP2 and non-reentrant gradient checkpointing.

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
        self._told = False  # whether `rows` says what is wanted
        self._words: WordRows | None = None
        self._calls: dict[int | str, Call] = {}
        self._hidden: dict[int, torch.Tensor] = {}
        self._hooks: list = []
        self._in_text = family.in_text and not family.relays(model)
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
        # On what runs first: a relay, or else the innermost model that holds the layers. PEFT and wrappers pass by the
        # hooks of the outer ones, and a checkpointed layer that runs again in backward passes by this one.
        first = next(iter(self.relays.values()), None) or _holder(model, next(iter(self.layers.values())))
        self._hook = first.register_forward_pre_hook(self._begin)

    def rows(self, words: WordRows | None) -> None:
        """Sets the rows that forwards read from now on and forgets the last ones; None reads nothing.

        With gradient checkpointing the backward of one forward comes before the rows of the next.

        Raises:
            UserError: the model uses reentrant gradient checkpointing, whose first pass carries no gradients.
        """
        self._forget()
        self._told = True
        self._words = words if words is not None and len(words.row_batch) else None
        if self._words is not None:
            self._refuse_reentrant()

    def calls(self, words: WordRows) -> dict[int, Call]:
        """What the tapped layers' attention was called with at ``words.slots`` in the last forward, by layer.

        Args:
            words: those given to `rows`, or any of the batch if `rows` was never called.

        Raises:
            RuntimeError: the rows are not those of the last forward, or some tapped layer did not run.
            UserError: see `rows`.
        """
        if self._told and self._words is not words:
            raise RuntimeError("these are not the words of the last tap.rows: call it before the model's forward")
        self._refuse_reentrant()
        missing = [index for index in self.layers if index not in self._calls]
        if missing:
            raise RuntimeError(f"no attention captured in layers {missing}: run the model's forward after tap.rows")
        found = {index: self._calls[index] for index in self.layers}
        return found if self._told else {index: call.at(words.slots) for index, call in found.items()}

    def maps(self) -> dict[int, torch.Tensor]:
        """Probabilities of the rows in the last forward: float32 (R, H, K) by layer; empty without rows.

        Raises:
            RuntimeError: there were rows but some tapped layer did not run.
        """
        words = self._words
        if words is None:
            return {}
        return {
            index: probabilities(call)[words.row_batch, :, words.row_slot] for index, call in self.calls(words).items()
        }

    def keep_hidden(self) -> None:
        """From now on keeps the input of the tapped layers' attention too, for `hidden`.

        Raises:
            UserError: the image's tokens are not among the text, so their hidden states are not there.
        """
        if not self._in_text:
            raise UserError("align.attention=learned needs a model that has the image's tokens among the text")
        for index, module in self.layers.items():
            self._hooks.append(module.register_forward_pre_hook(partial(self._keep, index), with_kwargs=True))

    def hidden(self, words: WordRows) -> dict[int, torch.Tensor]:
        """The input of the tapped layers' attention in the last forward: (B, L, C) by layer. Raises as `calls`."""
        self.calls(words)
        return {index: self._hidden[index] for index in self.layers}

    def _keep(self, index: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not self._told or self._words is not None:
            self._hidden.setdefault(index, args[0] if args else kwargs["hidden_states"])

    def relayed(self) -> torch.Tensor:
        """The last forward's attention from latents to the relay's keys: (N, Q, K) float32, the mean over its heads.

        Raises:
            RuntimeError: the relay did not run, or there were no rows.
        """
        missing = [name for name in self.relays if name not in self._calls]
        if missing or not self.relays:
            raise RuntimeError("no attention captured in the perceiver: run the model's forward after tap.rows")
        return self._through([probabilities(self._calls[name]).mean(1) for name in self.relays])

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
        """Called by the attention function of a tapped layer, whose arguments it takes."""
        if self._told and self._words is None:
            return
        length, depth = query_BHLD.shape[2:]
        place_BL = None
        # Without a mask a module that is causal, or does not say, hides later keys.
        if mask is None and length > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
            place_BL = torch.arange(length, device=query_BHLD.device)[None]
        call = Call(query_BHLD, key_BHKD, mask, place_BL, depth**-0.5 if scaling is None else scaling)
        if self._told and index in self.layers:
            call = call.at(self._words.slots)
            if call.size <= HELD:
                call = replace(call, probs_BHLK=probabilities(call))
        # Gradient checkpointing runs the layer again in backward, and all above must be done again there so that the
        # graph saves the same tensors; but the loss was made of the first pass's.
        self._calls.setdefault(index, call)

    def close(self) -> None:
        """Gives the model back as it was."""
        for hook in (self._hook, *self._hooks):
            hook.remove()
        for module in (*self.layers.values(), *self.relays.values()):
            if getattr(module, "lavender_tap", (None,))[0] is self:
                del module.lavender_tap
        for config, name in self._previous:
            _switch(self._model, config, name)
        self._previous = []
        self.rows(None)

    def _begin(self, *_) -> None:
        self._forget()

    def _forget(self) -> None:
        self._calls, self._hidden = {}, {}

    def _refuse_reentrant(self) -> None:
        for module in self._checkpointed:
            function = getattr(module, "_gradient_checkpointing_func", None)
            if module.gradient_checkpointing and getattr(function, "keywords", {}).get("use_reentrant", False):
                raise UserError(
                    "reentrant gradient checkpointing loses the gradient of the attention: "
                    "enable it with use_reentrant=False"
                )

    def __enter__(self) -> "AttentionTap":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def probabilities(call: Call, first: int = 0, count: int | None = None) -> torch.Tensor:
    """(B, h, S, K): float32 attention probabilities of all heads, or of those that share some of the key heads.

    Args:
        call: with the queries of S positions.
        first, count: which key heads; all without ``count``.
    """
    if call.probs_BHLK is not None and count is None:
        return call.probs_BHLK
    batch, heads, slots, depth = call.query_BHLD.shape
    query_BhSD, key_BGKD, mask = call.query_BHLD, call.key_BHKD, call.mask
    if count is not None:
        shared = heads // key_BGKD.shape[1]
        mine = slice(first * shared, (first + count) * shared)
        query_BhSD, key_BGKD = query_BhSD[:, mine], key_BGKD[:, first : first + count]
        mask = mask[:, mine] if mask is not None and mask.shape[1] > 1 else mask
    groups, keys = key_BGKD.shape[1:3]
    with torch.autocast(query_BhSD.device.type, enabled=False):  # which would multiply in half precision
        # Query heads that share a key head become further rows of it, which saves repeating the keys.
        grouped = (query_BhSD.float() * call.scaling).reshape(batch, groups, -1, depth)
        scores_BhSK = (grouped @ key_BGKD.float().transpose(2, 3)).view(batch, -1, slots, keys)
    lowest = torch.finfo(torch.float32).min
    if mask is not None:
        picked = mask[..., :keys]
        if picked.dtype == torch.bool:
            scores_BhSK.masked_fill_(~picked, lowest)
        else:
            scores_BhSK += picked  # in place: no gradient needs the product itself
    elif call.place_BL is not None:
        later_BSK = torch.arange(keys, device=scores_BhSK.device) > call.place_BL[:, :, None]
        scores_BhSK.masked_fill_(later_BSK[:, None], lowest)
    return scores_BhSK.softmax(-1)


def word_cells(call: Call, words: WordRows, planes: Planes, latents_BNCC: torch.Tensor | None = None) -> torch.Tensor:
    """(W, H, S, S): one layer's attention of each word on the whole image, see `planes.project`.

    The mean over a word's rows; no Aligner, no normalisation. Behind a relay: attention to the latents times
    ``latents_BNCC``, where they look. What many heads and keys need at once is bounded by computing some heads at a
    time; their probabilities are computed again in backward, and what follows is linear and keeps nothing.
    """

    def cells(probs_BhSK: torch.Tensor) -> torch.Tensor:
        with torch.autocast(probs_BhSK.device.type, enabled=False):
            if latents_BNCC is None:
                return project(probs_BhSK, planes)
            return project_latents(probs_BhSK, latents_BNCC, planes)

    if call.probs_BHLK is not None:
        return word_mean(cells(call.probs_BHLK), words)
    groups = call.key_BHKD.shape[1]
    once = max(HELD * groups // call.size, 1)
    parts = [
        cells(
            checkpoint(
                probabilities,
                call,
                first,
                min(once, groups - first),
                use_reentrant=False,
                preserve_rng_state=False,
            )
        )
        for first in range(0, groups, once)
    ]
    return word_mean(torch.cat(parts, 1), words)


def word_mean(cells_BHSCC: torch.Tensor, words: WordRows) -> torch.Tensor:
    """(W, H, C, C): the mean over the rows of each word."""
    rows_RHCC = cells_BHSCC[words.row_batch, :, words.row_slot]
    count_W = torch.bincount(words.row_word, minlength=len(words)).to(rows_RHCC.dtype)
    sum_WHCC = rows_RHCC.new_zeros(len(words), *rows_RHCC.shape[1:]).index_add(0, words.row_word, rows_RHCC)
    return sum_WHCC / count_W[:, None, None, None]


def student_maps(tap: AttentionTap, batch: StudentBatch) -> torch.Tensor:
    """Raw attention of each word on the whole image: (W, layers, H, 32, 32), float32, see `word_cells`."""
    return torch.stack(layer_maps(tap, batch), 1)


def mean_maps(tap: AttentionTap, batch: StudentBatch) -> torch.Tensor:
    """The same, mean over heads and layers: (W, 32, 32)."""
    return torch.stack([maps_WHSS.mean(1) for maps_WHSS in layer_maps(tap, batch)]).mean(0)


def layer_maps(tap: AttentionTap, batch: StudentBatch) -> list[torch.Tensor]:
    """The same layer by layer: (W, H, 32, 32) each; zeros of no words where a batch has none."""
    if not len(batch.words):
        heads, side = next(iter(tap.layers.values())).config.num_attention_heads, batch.planes.rows_y.shape[2]
        return [batch.planes.rows_y.new_zeros(0, heads, side, side)] * len(tap.layers)
    latents_BNSS = None
    if batch.planes.latents is not None:
        with torch.autocast(batch.planes.rows_y.device.type, enabled=False):
            latents_BNSS = latent_maps(tap.relayed(), batch.planes)
    return [word_cells(call, batch.words, batch.planes, latents_BNSS) for call in tap.calls(batch.words).values()]


def tapped_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """The function registered with transformers: its own fused attention, and the tap where there is one.

    Returns the output (B, L, H, D) and None. Without a mask it is causal unless ``is_causal`` or the module says no.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    tap = getattr(module, "lavender_tap", None)
    if tap is not None:
        if kwargs.get("cu_seq_lens_q") is not None:
            raise UserError(
                "sequences packed by cu_seq_lens need flash attention, which cannot be tapped: pack them by "
                "position_ids without an attention_mask, or not at all"
            )
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


def _holder(model: nn.Module, layer: nn.Module) -> nn.Module:
    """The innermost transformers model that an attention module is part of."""
    from transformers import PreTrainedModel

    return [m for m in model.modules() if isinstance(m, PreTrainedModel) and any(c is layer for c in m.modules())][-1]
