"""Running real model code without its memory: what depends on weights is a fake that has only a shape.

Fake tensors alone stop where code looks at values (grids of tiles, masks of image tokens, tiles that are empty). Those
depend on the inputs and not on weights, so what is computed from inputs alone is kept real.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

_INDEX = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)


@contextmanager
def simulated() -> Iterator[Live]:
    """Inside, what is computed from weights is a fake; yields the count of the bytes that all would take."""
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(RealInputs())
        yield stack.enter_context(Live())


class WeightsOnMeta(TorchDispatchMode):
    """Tensors of floats are made on the meta device, others for real, so that a model of any size can be built."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        made = not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves((args, kwargs)))
        if made and "device" in {argument.name for argument in func._schema.arguments}:
            dtype = kwargs.get("dtype")
            counts = func.overloadpacket is torch.ops.aten.arange and all(isinstance(arg, int) for arg in args)
            if dtype.is_floating_point if dtype else not counts:
                kwargs["device"] = torch.device("meta")
        return func(*args, **kwargs)


def materialise(module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Puts fakes on the CPU in the place of weights on the meta device; to be called inside `simulated`.

    Args:
        dtype: of the parameters; None leaves them theirs.
    """
    made: dict[int, torch.Tensor] = {}  # one weight may be known in several places

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            own = dtype if dtype and isinstance(tensor, nn.Parameter) and tensor.is_floating_point() else tensor.dtype
            made[id(tensor)] = torch.empty(tensor.shape, dtype=own, device="cpu")
        return made[id(tensor)]

    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None and weight.is_meta:
                known = fake(weight)
                if not isinstance(known, nn.Parameter):
                    known = made[id(weight)] = nn.Parameter(known, requires_grad=weight.requires_grad)
                part._parameters[name] = known
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_meta:
                part._buffers[name] = fake(buffer)


class RealInputs(TorchDispatchMode):
    """Under a `FakeTensorMode`: what depends on real tensors alone is computed for real."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        fake = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if not fake and (tensors or not _makes_floats(kwargs)):
            with _disable_current_modes():
                out = func(*args, **kwargs)
            # What is computed from inputs alone is real; floats made of nothing are fakes from here on.
            if tensors or not any(_floats(leaf) for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)):
                return out
        if func in _INDEX:
            args = (args[0], _numbers(args[1]), *args[2:])
        return func(*args, **kwargs)


def _floats(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _makes_floats(kwargs: dict) -> bool:
    """Whether a factory is asked for floats; they may be as large as weights, so that they are not made at all."""
    dtype = kwargs.get("dtype")
    return dtype is not None and (dtype.is_floating_point or dtype.is_complex)


def _numbers(indices: list) -> list:
    """Real masks among indices as the numbers of their true places, whose count a fake could not know."""
    found = []
    for index in indices:
        if isinstance(index, torch.Tensor) and not isinstance(index, FakeTensor) and index.dtype == torch.bool:
            with _disable_current_modes():
                found.extend(index.nonzero(as_tuple=True))
        else:
            found.append(index)
    return found


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, of real tensors and of fakes alike.

    Attributes:
        now, peak: bytes alive, and the most since `restart`.
        held: bytes of no tensor, see `hold`.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.held = 0
        self._alive: dict[int, tuple[weakref.ref, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.add, out)
        return out

    def add(self, tensor: torch.Tensor) -> None:
        """Counts a tensor's storage, once."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes()
        self._alive[key] = (weakref.ref(storage, lambda _: self._drop(key)), size)
        self.now += size
        self.peak = max(self.peak, self.now + self.held)

    def hold(self, size: int) -> None:
        """Counts so many bytes besides, in place of those of the last call."""
        self.held = size
        self.peak = max(self.peak, self.now + size)

    def _drop(self, key: int) -> None:
        _, size = self._alive.pop(key)
        self.now -= size

    def restart(self) -> None:
        """Begins a new peak at what is alive."""
        self.peak = self.now
