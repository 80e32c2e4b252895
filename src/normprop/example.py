"""Shapes without data: run a graph on meta tensors, with an input found from the model's own layers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from normprop.errors import TracingError

EXAMPLE_BATCH = 2
_USUAL_SIZES = (224, 32, 28, 64, 256, 96, 112, 128, 160, 192, 240, 288, 299, 320, 331, 384, 448, 512, 8, 16)
_OTHER_SIZES = tuple(s for s in range(1, 601) if s not in _USUAL_SIZES)

Shape = tuple[int, ...]


class MetaRun(fx.Interpreter):
    """Runs a graph on the meta device and keeps every node's value: shapes and sizes, no arithmetic."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self.extra_traceback = False
        self._meta: dict[int, Tensor] = {}

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a leaf with meta copies of its parameters; a norm-act module counts as its plain base."""
        module = self.fetch_attr(target)
        tensors = {k: self._on_meta(v) for k, v in (*module.named_parameters(), *module.named_buffers())}
        return functional_call(module, tensors, args, kwargs)

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Parameters and buffers as meta tensors."""
        value = self.fetch_attr(target)
        return self._on_meta(value) if isinstance(value, Tensor) else value

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Factories such as torch.zeros make meta tensors too."""
        with torch.device("meta"):
            return super().call_function(target, args, kwargs)

    def _on_meta(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._meta:
            self._meta[id(tensor)] = torch.empty_like(tensor, device="meta")
        return self._meta[id(tensor)]


def example_values(graph_module: fx.GraphModule, shape: Shape | None, hint: Shape | None) -> dict[fx.Node, Any]:
    """Every node's value in a run on meta tensors.

    Args:
        graph_module: the traced model.
        shape: shape of one sample of the first input, if known.
        hint: a shape to try first, for instance the one a model zoo records.

    Returns:
        node → value: tensors on the meta device (batch of `EXAMPLE_BATCH`), ints, tuples…

    Raises:
        TracingError: no input shape was found that the model accepts.
    """
    last: Exception | None = None
    for inputs in _candidates(graph_module, shape, hint):
        run = MetaRun(graph_module)
        try:
            with torch.no_grad():
                run.run(*inputs)
        except Exception as error:
            last = last or error
            continue
        return dict(run.env)
    known = f"an input of shape {shape}" if shape is not None else "any input shape that was tried"
    raise TracingError(
        f"{type(graph_module).__name__} does not run on {known}: {str(last).splitlines()[0] if last else 'no input'}\n"
        "Pass input=InputStats.from_loader(loader), which knows the shape of a sample."
    )


def _candidates(graph_module: fx.GraphModule, shape: Shape | None, hint: Shape | None) -> Iterator[tuple[Any, ...]]:
    placeholders = [n for n in graph_module.graph.nodes if n.op == "placeholder" and not n.args]
    if not placeholders:
        raise TracingError("a network without an input cannot be walked.")
    kinds = [_first_layer(graph_module, n) for n in placeholders]
    if shape is not None:
        yield tuple(_tensor(kind, shape if i == 0 else _sample(kind, 32)) for i, kind in enumerate(kinds))
        return
    if hint is not None:
        yield tuple(_tensor(kind, hint) for kind in kinds)
    free = any(kind is None or isinstance(kind, _ConvNd) or len(_sample(kind, 1)) > 1 for kind in kinds)
    for size in itertools.chain(_USUAL_SIZES, _OTHER_SIZES) if free else (1,):
        yield tuple(_tensor(kind, _sample(kind, size)) for kind in kinds)
    for rank, size in itertools.product((1, 2, 3, 4), (8, 32)):  # an unsqueeze or a reshape stands before the layer
        yield tuple(_tensor(kind, _sample(kind, size)[-1:] * (rank == 1) or (size,) * rank) for kind in kinds)


def _first_layer(graph_module: fx.GraphModule, placeholder: fx.Node) -> nn.Module | Tensor | None:
    """The first layer with a known input (a module, or the weight of a functional one) downstream of an input."""
    seen = {placeholder}
    queue = [placeholder]
    while queue:
        node = queue.pop(0)
        for user in node.users:
            if user.op == "call_module":
                module = graph_module.get_submodule(str(user.target))
                if isinstance(module, _ConvNd | nn.Linear | nn.Embedding | nn.EmbeddingBag | _NormBase | nn.LayerNorm):
                    return module
            weight = user.args[1] if user.op == "call_function" and len(user.args) > 1 else None
            if isinstance(weight, fx.Node) and weight.op == "get_attr" and "conv" in getattr(user.target, "__name__", ""):
                value = _attribute(graph_module, str(weight.target))
                if isinstance(value, Tensor) and value.dim() > 2:
                    return value
            if user not in seen:
                seen.add(user)
                queue.append(user)
    return None


def _attribute(root: nn.Module, path: str) -> Any:
    parent, _, name = path.rpartition(".")
    return getattr(root.get_submodule(parent), name)


def _sample(kind: nn.Module | Tensor | None, size: int) -> Shape:
    """Shape of one sample for a first layer, with every free extent equal to `size`."""
    if isinstance(kind, _ConvNd):
        frames = (16,) if len(kind.kernel_size) == 3 and size >= 16 else (size,)
        rest = (size,) * (len(kind.kernel_size) - 1)
        return (kind.in_channels, *(frames + rest))
    if isinstance(kind, Tensor):
        return (kind.shape[1], *(size,) * (kind.dim() - 2))
    if isinstance(kind, nn.Linear):
        return (kind.in_features,)
    if isinstance(kind, nn.Embedding | nn.EmbeddingBag):
        return (8,)
    if isinstance(kind, nn.LayerNorm):
        return (8, *kind.normalized_shape)
    if isinstance(kind, _NormBase):
        extents = {"1d": (), "2d": (size, size), "3d": (size, size, size)}
        return (kind.num_features, *extents.get(type(kind).__name__.lower()[-2:], ()))
    return (3, size, size)


def _tensor(kind: nn.Module | Tensor | None, shape: Sequence[int]) -> Tensor:
    dtype = torch.long if isinstance(kind, nn.Embedding | nn.EmbeddingBag) else _dtype(kind)
    return torch.empty((EXAMPLE_BATCH, *shape), dtype=dtype, device="meta")


def _dtype(kind: nn.Module | Tensor | None) -> torch.dtype:
    if isinstance(kind, Tensor):
        return kind.dtype
    if isinstance(kind, nn.Module):
        return next((p.dtype for p in kind.parameters()), torch.get_default_dtype())
    return torch.get_default_dtype()


def sample_shape(values: Mapping[fx.Node, Any], graph: fx.Graph) -> list[tuple[Shape, torch.dtype]]:
    """Shape of one sample and dtype of each input of an example run, defaults left out."""
    inputs = [values[n] for n in graph.nodes if n.op == "placeholder" and not n.args]
    return [(tuple(v.shape[1:]), v.dtype) for v in inputs]
