"""Shapes without data: run a graph on meta tensors, with an input found from the model's own layers."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from normprop.errors import TracingError

EXAMPLE_BATCH = 2
_USUAL_SIZES = (224, 32, 28, 64, 256, 96, 112, 128, 160, 192, 240, 288, 299, 320, 331, 384, 448, 512, 8, 16)
_OTHER_SIZES = tuple(s for s in range(1, 601) if s not in _USUAL_SIZES)

_LAYERS = (_ConvNd, nn.Linear, nn.Embedding, nn.EmbeddingBag, nn.RNNBase, nn.LayerNorm, _NormBase)

Shape = tuple[int, ...]
Shapes = Shape | Sequence[Shape | None]
Layer = nn.Module | Tensor
Result = TypeVar("Result")


class MetaRun(fx.Interpreter):
    """Runs a graph on the meta device and keeps every node's value: shapes and sizes, no arithmetic."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self.extra_traceback = False
        self._meta: dict[int, Tensor] = {}

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a leaf with meta copies of its parameters; one that asks for values runs on zeros instead."""
        module = self.fetch_attr(target)
        if isinstance(module, _NormBase):
            return torch.empty_like(args[0])
        tensors = {k: self._on_meta(v) for k, v in (*module.named_parameters(), *module.named_buffers())}
        try:
            return functional_call(module, tensors, args, kwargs)
        except RuntimeError as error:
            if "meta tensor" not in str(error):
                raise
        real = fx.node.map_aggregate(
            (args, kwargs), lambda a: torch.zeros_like(a, device="cpu") if isinstance(a, Tensor) else a
        )
        found = copy.deepcopy(module).cpu()(*real[0], **real[1])
        return fx.node.map_aggregate(found, lambda a: a.to("meta") if isinstance(a, Tensor) else a)

    def get_attr(
        self,
        target: Any,
        args: tuple[Any, ...],  # noqa: ARG002  fx's signature
        kwargs: dict[str, Any],  # noqa: ARG002  fx's signature
    ) -> Any:
        """Parameters and buffers as meta tensors."""
        value = self.fetch_attr(target)
        return self._on_meta(value) if isinstance(value, Tensor) else value

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A tensor that moves to a device stays where it is."""
        return args[0] if target in ("cpu", "cuda") else super().call_method(target, args, kwargs)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Factories such as torch.zeros make meta tensors too."""
        with torch.device("meta"):
            return super().call_function(target, args, kwargs)

    def _on_meta(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._meta:
            self._meta[id(tensor)] = torch.empty_like(tensor, device="meta")
        return self._meta[id(tensor)]


def example_values(graph_module: fx.GraphModule, shape: Shapes | None, hint: Shape | None) -> dict[fx.Node, Any]:
    """Every node's value in a run on meta tensors.

    Args:
        graph_module: the traced model.
        shape: shape of one sample of the first input, or a sequence with one an input, if known.
        hint: a shape to try first, for instance the one a model zoo records.

    Returns:
        node → value: tensors on the meta device (batch of `EXAMPLE_BATCH`), ints, tuples…

    Raises:
        TracingError: no input shape was found that the model accepts.
    """
    placeholders = [n for n in graph_module.graph.nodes if n.op == "placeholder" and not n.args]
    kinds = [_first_layer(graph_module, n) for n in placeholders]

    def run(inputs: tuple[Tensor, ...]) -> dict[fx.Node, Any]:
        interpreter = MetaRun(graph_module)
        interpreter.run(*inputs)
        return dict(interpreter.env)

    dtype = _floating_dtype(graph_module)
    return _search(type(graph_module).__name__, run, kinds, dtype, shape, hint)[1]


def model_inputs(model: nn.Module, shape: Shapes | None, hint: Shape | None) -> tuple[Tensor, ...]:
    """Meta tensors, one an input without a default, which the model accepts; it is run as it is, without a graph.

    Raises:
        TracingError: none were found, or the model needs the values of a tensor.
    """
    named = [p for p in inspect.signature(model.forward).parameters.values() if p.default is p.empty]
    named = [p for p in named if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    first = next((m for m in model.modules() if isinstance(m, _LAYERS)), None)
    tensors = {k: torch.empty_like(v, device="meta") for k, v in (*model.named_parameters(), *model.named_buffers())}

    def run(inputs: tuple[Tensor, ...]) -> None:
        positional = [x for p, x in zip(named, inputs, strict=True) if p.kind is not p.KEYWORD_ONLY]
        keyword = {p.name: x for p, x in zip(named, inputs, strict=True) if p.kind is p.KEYWORD_ONLY}
        with torch.device("meta"):
            functional_call(model, tensors, tuple(positional), keyword)

    return _search(type(model).__name__, run, [first] * len(named), _floating_dtype(model), shape, hint)[0]


def _search(
    name: str,
    run: Callable[[tuple[Tensor, ...]], Result],
    kinds: Sequence[Layer | None],
    dtype: torch.dtype,
    shape: Shapes | None,
    hint: Shape | None,
) -> tuple[tuple[Tensor, ...], Result]:
    """The first inputs with which `run` succeeds, and what it returned."""
    if not kinds:
        raise TracingError("a network without an input cannot be walked.")
    first: Exception | None = None
    for inputs in _candidates(kinds, dtype, shape, hint):
        try:
            with torch.no_grad():
                return inputs, run(inputs)
        except Exception as error:
            first = first or error
            if isinstance(error, NotImplementedError) or "meta tensor" in str(error):
                break  # the model asks for a value, whatever the shape; torch has no type of its own for all such errors
    known = f"an input of shape {shape}" if shape is not None else "any input shape that was tried"
    raise TracingError(
        f"{name} does not run on {known}: {(str(first).splitlines() or [''])[0]}\n"
        "Pass input=InputStats.from_loader(loader), which knows the shape of a sample."
    )


def _candidates(
    kinds: Sequence[Layer | None], dtype: torch.dtype, shape: Shapes | None, hint: Shape | None
) -> Iterator[tuple[Tensor, ...]]:
    if shape is not None:
        known: list[Any] = list(shape) if shape and not isinstance(shape[0], int) else [shape]
        known += [None] * (len(kinds) - len(known))
        yield tuple(_tensor(k, _samples(k, 32)[0] if s is None else s, dtype) for k, s in zip(kinds, known, strict=True))
        return
    if hint is not None:
        yield tuple(_tensor(kind, hint, dtype) for kind in kinds)
    tried: set[tuple[Shape, ...]] = set()
    sizes = itertools.chain(_USUAL_SIZES, _OTHER_SIZES)
    for size, variant in ((s, v) for s in sizes for v in range(4)):
        shapes = tuple(options[min(variant, len(options) - 1)] for options in (_samples(kind, size) for kind in kinds))
        if shapes not in tried:
            tried.add(shapes)
            yield tuple(_tensor(kind, sample, dtype) for kind, sample in zip(kinds, shapes, strict=True))


def _first_layer(graph_module: fx.GraphModule, placeholder: fx.Node) -> Layer | None:
    """The first layer with a known input (a module, or the weight of a functional one) downstream of an input."""
    seen = {placeholder}
    queue = [placeholder]
    while queue:
        node = queue.pop(0)
        for user in node.users:
            if user.op == "call_module":
                module = graph_module.get_submodule(str(user.target))
                if isinstance(module, _LAYERS):
                    return module
            weight = user.args[1] if user.op == "call_function" and len(user.args) > 1 else None
            if isinstance(weight, fx.Node) and weight.op == "get_attr" and _takes_weight(user):
                value = _attribute(graph_module, str(weight.target))
                if isinstance(value, Tensor) and value.dim() > 1:
                    return value
            if user not in seen:
                seen.add(user)
                queue.append(user)
    return None


def _takes_weight(node: fx.Node) -> bool:
    """Whether a node calls a functional convolution or linear layer."""
    name = getattr(node.target, "__name__", "")
    return "conv" in name or name == "linear"


def _attribute(root: nn.Module, path: str) -> Any:
    parent, _, name = path.rpartition(".")
    return getattr(root.get_submodule(parent), name)


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


def sample_shape(values: Mapping[fx.Node, Any], graph: fx.Graph) -> list[tuple[Shape, torch.dtype]]:
    """Shape of one sample and dtype of each input of an example run, defaults left out."""
    inputs = [values[n] for n in graph.nodes if n.op == "placeholder" and not n.args]
    return [(tuple(v.shape[1:]), v.dtype) for v in inputs]


def example_inputs(inputs: Sequence[tuple[Shape, torch.dtype]]) -> tuple[Tensor, ...]:
    """Meta tensors, one an input, for sample shapes and dtypes as `sample_shape` gives them."""
    return tuple(torch.empty((EXAMPLE_BATCH, *shape), dtype=dtype, device="meta") for shape, dtype in inputs)
