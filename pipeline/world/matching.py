"""Which coloured shapes are in a picture, learnt from texts alone by looking for a place where both words hold.

Tiny models that see a few thousand scenes learn to describe or to denoise long before they learn where a word belongs.
Both models of the world therefore first learn from bags of places: a pair such as (red, circle) is in a picture if ONE
place is red and a circle. Each place can hold one colour and one shape, so with several objects in a picture the
evidence of an object stays at the object. No mask and no position is ever shown; what is told of a picture is what a
caption that names every object says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers import UNet2DConditionModel

from pipeline.world.scenes import COLOURS, HELD_OUT, SHAPES, Scene
from pipeline.world.texts import Text

NAMES = (tuple(COLOURS), SHAPES)
# Pairs that are held out are neither affirmed nor denied.
PAIRS = [
    (c, s) for c, colour in enumerate(COLOURS) for s, shape in enumerate(SHAPES) if (colour, shape) not in HELD_OUT
]
COLOUR_OF, SHAPE_OF = (torch.tensor(part) for part in zip(*PAIRS, strict=True))


def told(scenes: Sequence[Scene]) -> torch.Tensor:
    """(B, pairs): 1 where a scene holds the pair."""
    out = torch.zeros(len(scenes), len(PAIRS))
    for row, scene in enumerate(scenes):
        for thing in scene.things:
            out[row, PAIRS.index((NAMES[0].index(thing.colour), NAMES[1].index(thing.shape)))] = 1
    return out


def bag_error(colour: torch.Tensor, shape: torch.Tensor, told_BK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Binary cross-entropy of the K pairs, each present with P = 1 - prod over places of (1 - P(colour) P(shape)).

    Args:
        colour, shape: (B, ..., places, names) log-probabilities, in float32: in half precision 0.9999 is 1, and
            certainty has no logarithm.

    Returns:
        (B, ...) the sum over pairs, and (B, ..., K) the log of the probability that the pair is absent.
    """
    both = colour[..., COLOUR_OF] + shape[..., SHAPE_OF]
    pair = both.exp().clamp(1e-7, 1 - 1e-4)
    absent = torch.log1p(-pair).sum(-2)
    present = torch.log(-torch.expm1(absent) + 1e-6)
    told_BK = told_BK.view(len(told_BK), *[1] * (absent.ndim - 2), -1)
    return -(told_BK * present + (1 - told_BK) * absent).sum(-1), absent


class Matching:
    """The bag error of a diffusion model's cross-attention: its queries are the places, its keys the names.

    The keys are those of colour and shape words as they stand in the texts of the batch, one occurrence drawn for
    each, so that a word comes to mean the same in every sentence. That a diffusion model's attention is trained to
    match pictures and texts follows Discffusion (He et al. 2023) and DiffusionITM (Krojer et al. 2023).

    Args:
        unet: its cross-attention layers are listened to from now on.
        tokenizer, text_encoder: of the same pipeline.
    """

    def __init__(self, unet: UNet2DConditionModel, tokenizer, text_encoder):
        self.tokenizer, self.encode = tokenizer, lambda ids: text_encoder(ids)[0]
        self.layers = {name: layer for name, layer in unet.named_modules() if name.endswith("attn2")}
        self.queries: dict[str, torch.Tensor] = {}
        for name, layer in self.layers.items():
            layer.to_q.register_forward_hook(self._keep(name))

    def _keep(self, name: str):
        def hook(module, args, output):
            self.queries[name] = self._heads(name, output)

        return hook

    def _heads(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """(B, H, places, D) in float32."""
        return states.unflatten(-1, (self.layers[name].heads, -1)).transpose(-3, -2).float()

    def __call__(
        self, texts: Sequence[Text], coded, states_BLD: torch.Tensor, scenes, weight_B, generator
    ) -> torch.Tensor:
        """The error of the latest forward of the UNet: a mean over layers and heads and, weighted, over scenes.

        The forward was of 2 B pictures, first each scene upright and then each turned by half a circle. A place holds
        what both views see there (the geometric mean of their probabilities): from one view alone the evidence settled
        at the same edge of every object, half a cell off its middle.

        Args:
            texts, coded, states_BLD: the texts of the B scenes, tokenized and encoded.
            scenes: what the pictures show.
            weight_B: (B,) how much of each scene's pictures the noise has left.
            generator: draws the occurrence of each word.
        """
        chosen_ND = torch.cat([self._occurrences(texts, coded, states_BLD, generator), states_BLD[0, :1]])
        told_BK = told(scenes)
        losses = []
        for name, layer in self.layers.items():
            query_BHPD, key_HND = self.queries[name], self._heads(name, layer.to_k(chosen_ND))
            with torch.autocast("cpu", enabled=False):
                logits_BHPN = query_BHPD @ key_HND.mT / query_BHPD.shape[-1] ** 0.5
            # The start of the text is the same in all of them and says nothing: what shows no object belongs there.
            # Colour and shape share a place's attention, so that neither word takes it from the other: half each.
            upright, turned = (math.log(2) + logits_BHPN.log_softmax(-1)).chunk(2)
            colour, shape, _ = ((upright + turned.flip(-2)) / 2).split([*map(len, NAMES), 1], -1)
            error_B = bag_error(colour, shape, told_BK)[0].mean(1)
            losses.append((error_B * weight_B).sum() / weight_B.sum())
        return torch.stack(losses).mean()

    def _occurrences(self, texts, coded, states_BLD, generator) -> torch.Tensor:
        """(names, D): for each colour and shape the state of one of its tokens in these texts or by itself."""
        bare = [f"something {name}" for name in NAMES[0]] + [f"a {name}" for name in NAMES[1]]
        alone = self.tokenizer(bare, padding=True, return_tensors="pt")
        states = self.encode(alone.input_ids)
        found = {
            name: [states[row, alone.char_to_token(row, len(bare[row]) - 1)]]
            for row, name in enumerate(NAMES[0] + NAMES[1])
        }
        for row, text in enumerate(texts):
            for start, end, _, kind in text.spans:
                token = coded.char_to_token(row, end - 1)
                if kind in ("colour", "shape") and token is not None:
                    word = text.text[start:end]
                    name = next(n for n in (word, word.removesuffix("s"), word.removesuffix("es")) if n in found)
                    found[name].append(states_BLD[row, token])
        drawn = (states[int(torch.randint(len(states), (1,), generator=generator))] for states in found.values())
        return torch.stack(list(drawn))
