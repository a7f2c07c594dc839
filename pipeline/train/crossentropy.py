"""Cross-entropy from hidden states, some positions at a time: logits of all of them never exist together.

A language model's logits take positions x vocabulary x 4 bytes, and their gradient as much again: more than the rest of
a step with checkpointing. Here the gradient of each chunk is taken while its logits are there, in the forward, as in
Liger Kernel's fused linear cross-entropy (arXiv 2410.10989): nothing is computed twice, and any head will do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

Tail = Callable[[torch.Tensor], torch.Tensor]


def summed(hidden_NC: torch.Tensor, labels_N: torch.Tensor, head: nn.Module, tail: Tail, rows: int) -> torch.Tensor:
    """The sum over N positions of the cross-entropy of ``tail(head(hidden))`` with the labels; a float32 scalar.

    Args:
        hidden_NC: what the head is given.
        labels_N: the token each position predicts.
        head: maps (n, C) to (n, V) logits.
        tail: what the model does with its logits afterwards, elementwise.
        rows: positions whose logits are held at once.
    """
    learnt = [parameter for parameter in head.parameters() if parameter.requires_grad]
    if torch.is_grad_enabled():
        return _Summed.apply(hidden_NC, labels_N, head, tail, rows, *learnt)
    return _chunks(hidden_NC, labels_N, head, tail, rows, None)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NC, labels_N, head, tail, rows, *learnt):
        grads = [torch.zeros_like(hidden_NC)]
        # Of many chunks in half precision each sum would lose bits.
        grads += [torch.zeros_like(parameter, dtype=torch.float32) for parameter in learnt]
        total = _chunks(hidden_NC, labels_N, head, tail, rows, (learnt, grads))
        ctx.save_for_backward(grads[0], *(g.to(p.dtype) for g, p in zip(grads[1:], learnt, strict=True)))
        return total

    @staticmethod
    def backward(ctx, grad):
        hidden, *learnt = (saved * grad.to(saved.dtype) for saved in ctx.saved_tensors)
        return hidden, None, None, None, None, *learnt


def _chunks(hidden_NC, labels_N, head, tail, rows, wanted) -> torch.Tensor:
    """The sum; with ``wanted`` (learnt parameters, gradients) it writes the hidden states' gradient into the first of
    the gradients and adds those of the parameters to the others."""
    total = torch.zeros((), device=hidden_NC.device)
    for start in range(0, len(hidden_NC), rows):
        part = slice(start, start + rows)
        with torch.set_grad_enabled(wanted is not None):
            some_nC = hidden_NC[part].detach().requires_grad_(wanted is not None)
            # Not the module itself: FSDP counts its calls, and has gathered its weights for the model's own one.
            value = F.cross_entropy(tail(head.forward(some_nC)).float(), labels_N[part], reduction="sum")
        if wanted is not None:
            learnt, grads = wanted
            found, *others = torch.autograd.grad(value, [some_nC, *learnt])
            grads[0][part] = found
            for grad, other in zip(grads[1:], others, strict=True):
                grad += other
        total += value.detach()
    return total


@dataclass
class HeadInput:
    """What a forward with `without_head` gave its head, and its first position's logits before the tail."""

    hidden_BPC: torch.Tensor | None = None
    first_11V: torch.Tensor | None = None


@contextmanager
def without_head(head: nn.Module, first: bool) -> Iterator[HeadInput]:
    """While active, the head of a model keeps what it is given, and the model goes on with next to nothing.

    Args:
        first: let the head compute the first position, which shows what the model does with logits afterwards.
    """
    seen, compute = HeadInput(), head.forward

    def keep(hidden_BPC: torch.Tensor) -> torch.Tensor:
        seen.hidden_BPC = hidden_BPC
        if not first:
            return hidden_BPC.new_zeros(*hidden_BPC.shape[:-1], 1)
        with torch.no_grad():
            seen.first_11V = compute(hidden_BPC[:1, :1])
            return seen.first_11V.clone()

    head.forward = keep
    try:
        yield seen
    finally:
        del head.forward


@dataclass
class Tails:
    """What models do with logits after their head, by the names of the settings that ask for it."""

    settings: object
    known: dict[str, Callable[[float], Tail]] = field(
        default_factory=lambda: {
            "final_logit_softcapping": lambda cap: lambda logits: torch.tanh(logits / cap) * cap,
            "logit_scale": lambda scale: lambda logits: logits * scale,
            "logits_scaling": lambda scale: lambda logits: logits / scale,
        }
    )

    def find(self, before: torch.Tensor, after: torch.Tensor) -> Tail | None:
        """The tail that makes ``after`` of ``before``, up to rounding; None if it is none of those known.

        Found from the model's own numbers: some models have such a setting and do not heed it.
        """
        tails: list[Tail] = [lambda logits: logits]
        for name, make in self.known.items():
            value = getattr(self.settings, name, None)
            if isinstance(value, int | float) and value:
                tails.append(make(float(value)))
        for tail in tails:
            made = tail(before)
            if made.shape == after.shape and torch.allclose(made.float(), after.float(), rtol=1e-3, atol=1e-6):
                return tail
        return None
