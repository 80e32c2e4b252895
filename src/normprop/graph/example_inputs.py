"""Inputs to record a network with: the user's example, or guesses on the meta device until one runs."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from normprop.errors import NormPropError, TracingError
from normprop.graph.node import Node

EXAMPLE_BATCH = 2
_USUAL_SIZES = (224, 32, 28, 64, 256, 96, 112, 128, 160, 192, 240, 288, 299, 320, 331, 384, 448, 512, 8, 16)
_OTHER_SIZES = tuple(s for s in range(1, 601) if s not in _USUAL_SIZES)

_LAYERS = (_ConvNd, nn.Linear, nn.Embedding, nn.EmbeddingBag, nn.RNNBase, nn.LayerNorm, _NormBase)

Shape = tuple[int, ...]
Shapes = Shape | Sequence[Shape | None]
Layer = nn.Module | Tensor


@dataclass(frozen=True)
class Inputs:
    """What a forward is called with.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, example: Any) -> Inputs:
        """A tensor or list as the one argument, a tuple as all of them, a dict as keywords."""
        if isinstance(example, Inputs):
            return example
        if isinstance(example, tuple):
            return cls(example)
        return cls((), dict(example)) if isinstance(example, Mapping) else cls((example,))

    def tensors(self) -> list[Tensor]:
        """All tensors, in order."""
        return [t for t in pytree.tree_leaves((self.args, dict(self.kwargs))) if isinstance(t, Tensor)]

    def map(self, fn: Any) -> Inputs:
        """The same with every tensor replaced."""
        args, kwargs = pytree.tree_map_only(Tensor, fn, (self.args, dict(self.kwargs)))
        return Inputs(args, kwargs)

    def on_meta(self) -> Inputs:
        """Without values; a batch of one becomes one of two, so that a batch can be told from what has size 1."""
        tensors = self.tensors()
        if tensors and all(t.dim() > 0 and t.shape[0] == 1 for t in tensors):
            return self.map(lambda t: torch.empty((EXAMPLE_BATCH, *t.shape[1:]), dtype=t.dtype, device="meta"))
        return self.map(lambda t: torch.empty_like(t, device="meta"))

    def random(self, like: Tensor, batch: int | None = None) -> Inputs:
        """Real tensors of the same shapes: standard normal for floats, zeros for the rest."""
        generator = torch.Generator().manual_seed(0)

        def real(t: Tensor) -> Tensor:
            shape = t.shape if batch is None else (batch, *t.shape[1:])
            if not t.is_floating_point():
                return torch.zeros(shape, dtype=t.dtype, device=like.device)
            return torch.randn(shape, generator=generator).to(like.device, t.dtype)

        return self.map(real)


def batch_inputs(batch: Any, example: Inputs, model: nn.Module) -> Inputs:
    """What a batch of a loader gives to each input of a network.

    A tensor is the first input; of a tuple the first entries are the inputs, what follows are labels; a mapping holds
    arguments by name, beside what the forward has no argument for.

    Args:
        batch: as a loader yields it.
        example: what the network takes.
        model: the network.

    Raises:
        NormPropError: a mapping lacks an argument that the forward can't do without.
    """
    if isinstance(batch, Inputs):
        return batch
    if isinstance(batch, Mapping) and not any(isinstance(a, Mapping) for a in example.args):
        return _named_inputs(batch, example, model)
    if isinstance(batch, tuple | list) and not isinstance(example.args[0] if example.args else None, tuple | list):
        return Inputs(tuple(batch[: max(1, len(example.args))]))
    return Inputs((batch,))


def _named_inputs(batch: Mapping[str, Any], example: Inputs, model: nn.Module) -> Inputs:
    parameters = inspect.signature(model.forward).parameters.values()
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names = list(example.kwargs) or (list(batch) if takes_any else [name for name in known if name in batch])
    needed = [p.name for p in required(model) if p.name in known]
    missing = [name for name in dict.fromkeys((*example.kwargs, *needed)) if name not in batch]
    if missing or not names:
        raise NormPropError(
            f"a batch has no {', '.join(missing) or 'argument of the forward'}: it holds {', '.join(map(str, batch))}.\n"
            f"Name its entries as the forward of {type(model).__name__} names its arguments ({', '.join(known)}), or yield "
            "tuples."
        )
    return Inputs((), {name: batch[name] for name in names})


def required(model: nn.Module) -> list[inspect.Parameter]:
    """The arguments of the forward that have no default."""
    found = [p for p in inspect.signature(model.forward).parameters.values() if p.default is p.empty]
    return [p for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)] or [
        p for p in inspect.signature(model.forward).parameters.values() if p.kind is p.VAR_POSITIONAL
    ]


def candidates(
    model: nn.Module, kinds: Sequence[Layer | None], shape: Shapes | None, hint: Shape | None, *, few: bool = False
) -> Iterator[Inputs]:
    """Guesses on the meta device, likeliest first.

    Args:
        model: the network.
        kinds: the first layer that each required argument meets.
        shape: of a sample of the first input, or a sequence with one per input, if known.
        hint: a shape to try first, for instance the one a model zoo records.
        few: the usual sizes only.
    """
    named, dtype = required(model), _floating_dtype(model)
    for tensors in _tensors(kinds, dtype, shape, hint, few):
        positional = [x for p, x in zip(named, tensors, strict=True) if p.kind is not p.KEYWORD_ONLY]
        keyword = {p.name: x for p, x in zip(named, tensors, strict=True) if p.kind is p.KEYWORD_ONLY}
        yield Inputs(tuple(positional), keyword)


def first_kinds(model: nn.Module) -> list[Layer | None]:
    """A first guess: the model's first layer, for every required argument."""
    first = next((m for m in model.modules() if isinstance(m, _LAYERS)), None)
    return [first] * len(required(model))


def kinds_seen(model: nn.Module, inputs: Sequence[Node], pending: tuple[Any, tuple[Node, ...]] | None) -> list[Layer | None]:
    """The first layer that each input met in a record, even if that record ended there.

    Args:
        model: the recorded network.
        inputs: input nodes of the record.
        pending: target and input nodes of the operation that failed.
    """
    return [_first_layer(model, node, pending) for node in inputs]


def _first_layer(model: nn.Module, start: Node, pending: tuple[Any, tuple[Node, ...]] | None) -> Layer | None:
    seen, queue = {start}, [start]
    while queue:
        node = queue.pop(0)
        readers: list[tuple[str, Any, tuple[Any, ...], Node | None]] = [(u.op, u.target, u.args, u) for u in node.users]
        if pending is not None and node in pending[1]:
            readers.append(("module" if isinstance(pending[0], str) else "call", pending[0], pending[1], None))
        for op, target, args, user in readers:
            if op == "module" and isinstance(target, str):
                module = model.get_submodule(target)
                if isinstance(module, _LAYERS):
                    return module
            name = getattr(target, "__name__", "")
            if ("conv" in name or name == "linear") and len(args) > 1 and isinstance(args[1], Node):
                value = args[1].value
                if isinstance(value, Tensor) and value.dim() > 1 and not args[1].data:
                    return value
            if user is not None and user not in seen:
                seen.add(user)
                queue.append(user)
    return None


def no_inputs(model: nn.Module, shape: Shapes | None, reason: Exception | None) -> TracingError:
    """The error that says that no guess ran, and what to do."""
    known = f"an input of shape {shape}" if shape is not None else "any input that was guessed"
    first = (str(reason).splitlines() or [""])[0]
    return TracingError(
        f"{type(model).__name__} does not run on {known}: {type(reason).__name__}: {first}\n"
        "Pass example=, what its forward takes: a tensor, a tuple of arguments, or a dict of keyword arguments. "
        "Or convert a part: normprop.convert(model.backbone, in_place=True)."
    )


def _tensors(
    kinds: Sequence[Layer | None], dtype: torch.dtype, shape: Shapes | None, hint: Shape | None, few: bool
) -> Iterator[tuple[Tensor, ...]]:
    if shape is not None:
        known: list[Any] = list(shape) if shape and not isinstance(shape[0], int) else [shape]
        known = known[: len(kinds)] + [None] * (len(kinds) - len(known))
        yield tuple(_tensor(k, _samples(k, 32)[0] if s is None else s, dtype) for k, s in zip(kinds, known, strict=True))
        return
    if hint is not None:
        yield tuple(_tensor(kind, hint, dtype) for kind in kinds)
    tried: set[tuple[Shape, ...]] = set()
    sizes = itertools.chain(_USUAL_SIZES, () if few else _OTHER_SIZES)
    for size, variant in ((s, v) for s in sizes for v in range(4)):
        shapes = tuple(options[min(variant, len(options) - 1)] for options in (_samples(kind, size) for kind in kinds))
        if shapes not in tried:
            tried.add(shapes)
            yield tuple(_tensor(kind, sample, dtype) for kind, sample in zip(kinds, shapes, strict=True))


def _samples(kind: Layer | None, size: int) -> list[Shape]:
    """Shapes of one sample for a first layer, likeliest first, with every free extent equal to `size`."""
    if isinstance(kind, _ConvNd):
        dims = len(kind.kernel_size)
        return _around(kind.in_channels, (min(size, 16), size, size) if dims == 3 else (size,) * dims)
    if isinstance(kind, Tensor):
        channels = kind.shape[1]
        return _around(channels, (size,) * (kind.dim() - 2)) if kind.dim() > 2 else _features(channels, size)
    if isinstance(kind, nn.Linear):
        return _features(kind.in_features, size)
    if isinstance(kind, nn.RNNBase):
        return [(size, kind.input_size)]
    if isinstance(kind, nn.Embedding | nn.EmbeddingBag):
        return [(size,), ()]
    if isinstance(kind, nn.LayerNorm):
        return [kind.normalized_shape, (size, *kind.normalized_shape), (size, size, *kind.normalized_shape)]
    if isinstance(kind, _NormBase):
        extents = {"1d": (0, 1), "2d": (2,), "3d": (3,)}.get(type(kind).__name__.lower()[-2:], (2, 0, 1))
        return [(kind.num_features, *(size,) * n) for n in extents]
    return [(3, size, size), (1, size, size), (size,), (size, size)]


def _around(channels: int, extents: Shape) -> list[Shape]:
    """Channels first; last, where the model permutes its input; left out, where it adds them."""
    return [(channels, *extents), (*extents, channels), extents, (channels * math.prod(extents),)]


def _features(features: int, size: int) -> list[Shape]:
    """A vector, tokens, an image in tokens' order, and a square image that is flattened."""
    side = math.isqrt(features // 3) if features % 3 == 0 else math.isqrt(features)
    channels = features // side**2 if side else 1
    image = (channels, side, side) if channels * side**2 == features else (features, size, size)
    return [(features,), (size, features), (size, size, features), image]


def _tensor(kind: Layer | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    if isinstance(kind, nn.Embedding | nn.EmbeddingBag):
        dtype = torch.long
    return torch.empty((EXAMPLE_BATCH, *shape), dtype=dtype, device="meta")


def _floating_dtype(model: nn.Module) -> torch.dtype:
    tensors = (*model.parameters(), *model.buffers())
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.get_default_dtype())
