"""NormProp network in, plain torch.nn network out."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from normprop.conversion.converted import ConvertedModule
from normprop.conversion.lane import LaneValues, site_calls
from normprop.conversion.layers import affine, convolution, linear, per_channel, scaled_weight, transposed_convolution
from normprop.errors import NormPropError
from normprop.sites.reference import Scale

_CONVOLUTIONS: Mapping[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED: Mapping[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def fold(model: nn.Module, *, check: bool = True) -> nn.Module:
    """The same function in plain PyTorch: the moment lane is evaluated once and its result becomes ordinary parameters.

    A layer with a site becomes torch's own layer with the effective weight and bias; a site without a layer becomes a
    multiplication and an addition. The layers of `normprop.nn` become their `folded` form.

    Args:
        model: a network that `convert` made, or any module that holds layers of `normprop.nn`. It is not changed.
        check: compare both on random input, in eval mode.

    Returns:
        A network without a module, parameter or operation of normprop, in the mode of the model.

    Raises:
        NormPropError: nothing to fold, or the check failed.

    Example:
        >>> import torch, normprop
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> print(normprop.fold(normprop.convert(net)).code.strip())
        def forward(self, input):
            input_1 = input
            _0 = getattr(self, "0")(input_1);  input_1 = None
            _2 = getattr(self, "2")(_0);  _0 = None
            return _2
    """
    if not isinstance(model, ConvertedModule):
        return _fold_layers(model)
    graphs = model.graphs()
    if graphs[True] is not graphs[False]:  # what is deployed is the eval graph
        graphs = {True: graphs[False], False: graphs[False]}
    folded = _Folding(model, graphs[False]).run()
    folded.train(model.training)
    if check:
        _compare(model, folded)
    return folded


def _fold_layers(model: nn.Module) -> nn.Module:
    """Replace every module that can fold itself."""
    layers: dict[str, Any] = {path: m for path, m in model.named_modules() if hasattr(m, "folded")}
    if "" in layers:
        plain: nn.Module = layers[""].folded()
        return plain
    result = copy.deepcopy(model)
    if not layers:
        raise NormPropError(
            f"{type(model).__name__} holds nothing to fold.\nfold takes a converted network or normprop.nn layers."
        )
    for path, layer in layers.items():
        if any(path.startswith(f"{outer}.") for outer in layers):
            continue  # the activation inside a layer: the layer folds it
        parent, _, name = path.rpartition(".")
        setattr(result.get_submodule(parent), name, layer.folded())
    return result


class _Folding:
    """Writes the plain graph of a converted one.

    Args:
        model: the converted network.
        graph: the graph to fold.
    """

    def __init__(self, model: ConvertedModule, graph: fx.Graph) -> None:
        self.model = model
        self.source = graph
        self.lane = LaneValues(model, graph)
        self.calls = site_calls(graph)
        self.root = nn.Module()
        self.root.training = model.training
        self.graph = fx.Graph()
        self.new: dict[fx.Node, fx.Node] = {}
        # Paths that are taken: a layer which is also called plain keeps its own.
        self.taken = {str(n.target) for n in graph.nodes if n.op == "call_module"}

    @torch.no_grad()
    def run(self) -> fx.GraphModule:
        """The plain network."""
        for node in self.source.nodes:
            if node in self.lane.nodes:
                continue
            if node in self.calls and self.calls[node].weight is not None:
                path = self._free_path(self.calls[node].layer_path)
                self._attach(path, _layer(node, self.lane[node.args[1]]))
                self.new[node] = self.graph.call_module(path, (self._argument(node.args[0]),))
            elif node.target is affine:
                self.new[node] = self._affine(node)
            else:
                if node.op == "call_module":
                    self._attach(str(node.target), copy.deepcopy(self.model.get_submodule(str(node.target))))
                self.new[node] = self.graph.node_copy(node, self._argument)
        self.graph.lint()
        return fx.GraphModule(self.root, self.graph, type(self.model).__name__)

    def _argument(self, node: Any) -> Any:
        """The new node of an old one; a lane value that the data lane reads becomes a parameter."""
        if node not in self.lane.nodes:
            return self.new[node]
        value = self.lane[node]
        if node not in self.new:
            if not isinstance(value, Tensor):
                return value
            path = str(node.target) if node.op == "get_attr" else self._free_path(f"folded.{node.name}")
            self._attach(path, _parameter(value))
            self.new[node] = self.graph.get_attr(path)
        return self.new[node]

    def _affine(self, node: fx.Node) -> fx.Node:
        arguments: Any = node.args
        x, scale_node, channel = arguments
        dtype = next(self.model.parameters()).dtype
        new = []
        for value, kind in zip(per_channel(self.lane[scale_node], channel), ("weight", "bias"), strict=True):
            path = self._free_path(f"folded.{node.name}_{kind}")
            self._attach(path, _parameter(value.to(dtype)))
            new.append(self.graph.get_attr(path))
        return self.graph.call_function(torch.addcmul, (new[1], self._argument(x), new[0]))

    def _free_path(self, path: str) -> str:
        """The path itself, or with a number if a layer called twice folds into two."""
        free, k = path, 1
        while free in self.taken:
            free, k = f"{path}_{k}", k + 1
        self.taken.add(free)
        return free

    def _attach(self, path: str, value: nn.Module | nn.Parameter) -> None:
        parent: nn.Module = self.root
        *prefix, name = path.split(".")
        for part in prefix:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        if not hasattr(parent, name):
            setattr(parent, name, value)


def _parameter(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().clone(), requires_grad=value.is_floating_point())


def _layer(node: fx.Node, scale: Scale) -> nn.Module:
    """The plain layer for a layer that a site scales."""
    operation = node.target
    rest: Any = node.args[2:]
    weight = scaled_weight(scale, transposed_groups=rest[3] if operation is transposed_convolution else 0)
    if operation is linear:
        return _filled(nn.Linear(weight.shape[1], weight.shape[0], device="meta"), weight, scale.offset)
    dims, kernel = weight.dim() - 2, tuple(weight.shape[2:])
    if operation is convolution:
        stride, padding, dilation, groups = rest
        shape = (weight.shape[1] * groups, weight.shape[0], kernel)
        return _filled(_CONVOLUTIONS[dims](*shape, stride, padding, dilation, groups, device="meta"), weight, scale.offset)
    stride, padding, output_padding, groups, dilation = rest
    shape = (int(weight.shape[0]), weight.shape[1] * groups, kernel)
    options = (stride, padding, output_padding, groups, True, dilation)
    return _filled(_TRANSPOSED[dims](*shape, *options, device="meta"), weight, scale.offset)


def _filled(layer: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
    layer.weight, layer.bias = _parameter(weight), _parameter(bias)
    return layer


def _compare(model: ConvertedModule, folded: nn.Module) -> None:
    """Both networks on one random input, in eval mode.

    Raises:
        NormPropError: they differ by more than rounding.
    """
    modes = model.training, folded.training
    inputs = _small_inputs(model.eval())
    with torch.no_grad():
        outputs = [_tensors(m.eval()(*inputs)) for m in (model, folded)]
    model.train(modes[0])
    folded.train(modes[1])
    dtype = inputs[0].dtype if inputs[0].is_floating_point() else torch.float32
    tolerance = {torch.float64: 1e-8, torch.float32: 1e-3}.get(dtype, 0.1)
    for a, b in zip(*outputs, strict=True):
        difference = float((a - b).abs().max() / a.abs().max().clamp(min=1e-30))
        if not difference <= tolerance:
            raise NormPropError(
                f"the folded network differs from the original by {difference:.1e} relative.\n"
                "Statistics close to zero amplify rounding: fold in float64, or pass check=False if this is accepted."
            )


def _small_inputs(model: ConvertedModule) -> list[Tensor]:
    """Random inputs of the smallest usual extent that the network takes: nothing is gained by comparing large images."""
    inputs = model.example_inputs(2)
    for extent in (16, 32, 64, 128):
        small = [x[..., :extent, :extent] if x.dim() > 3 else x for x in inputs]
        try:
            with torch.no_grad():
                model(*small)
        except RuntimeError:  # too small for a window, or a head that fixes the extent
            continue
        return small
    return inputs


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else ()
    return [t for v in values for t in _tensors(v)]
