"""The module that `convert` returns: a GraphModule which keeps the model's own module tree."""

from __future__ import annotations

import copy
import importlib
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from normprop.errors import NormPropError
from normprop.native.operands import prepare

_TREE = ("_modules", "_parameters", "_buffers", "training")


class ConvertedModule(fx.GraphModule):
    """A network whose graph holds a moment lane beside the data lane; ``print(model.code)`` shows all that runs.

    Unlike a plain GraphModule it keeps the original containers (``model.layer1[0].conv1``) and modules that the graph
    does not call, and is copied and pickled node by node instead of being traced anew. A model whose training and eval
    graphs differ (auxiliary heads) carries both; ``train()`` and ``eval()`` choose.

    Attributes:
        meta: ``meta["normprop"]`` holds the input shapes and, if there are two, the graphs by mode.
    """

    @classmethod
    def assemble(cls, root: nn.Module, graphs: dict[bool, fx.Graph], name: str, meta: dict[str, Any]) -> ConvertedModule:
        """A module over root's tree.

        Args:
            root: whose modules, parameters and buffers become the result's own.
            graphs: the graph of training mode (True) and of eval mode (False); the same object twice if they agree.
            name: class name to show.
            meta: further entries of ``meta["normprop"]``.
        """
        prepare()
        module = cls(root, graphs[root.training], name)
        for key in _TREE:
            module.__dict__[key] = root.__dict__[key]
        for key, value in root.__dict__.items():
            if not key.startswith("_") and key not in module.__dict__ and not callable(value):
                module.__dict__[key] = value
        module.meta["normprop"] = dict(meta)
        if graphs[True] is not graphs[False]:
            module.meta["normprop"]["graphs"] = graphs
        return module

    def train(self, mode: bool = True) -> ConvertedModule:
        """Set the mode, and the graph that belongs to it."""
        super().train(mode)
        graphs = self.meta.get("normprop", {}).get("graphs")
        if graphs is not None and self._graph is not graphs[mode]:
            self._graph = graphs[mode]
            self.recompile()
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network.

        Raises:
            NormPropError: integers where the network was converted for numbers.
        """
        for given, (_, dtype) in zip(args, self.meta["normprop"]["inputs"], strict=False):
            if isinstance(given, Tensor) and dtype.is_floating_point and not given.is_floating_point():
                raise NormPropError(
                    f"the input is {str(given.dtype).removeprefix('torch.')}, the network takes floating-point numbers.\n"
                    "Scale it as the training data was scaled: x.float() / 255, then standardised."
                )
        return super().__call__(*args, **kwargs)

    def graphs(self) -> dict[bool, fx.Graph]:
        """The graph of training mode (True) and of eval mode (False)."""
        return self.meta["normprop"].get("graphs") or {True: self._graph, False: self._graph}

    def __getitem__(self, index: int) -> nn.Module:
        """A child by its position, as in the `nn.Sequential` that the network may have been."""
        return list(self._modules.values())[index]  # type: ignore[return-value]  # a slot of a Sequential is never empty

    def example_inputs(self, batch: int) -> list[Tensor]:
        """Random inputs of the shapes that the conversion ran with, in the network's own dtype and on its device."""
        like = next(p for p in self.parameters() if p.is_floating_point())
        return [
            torch.randn(batch, *shape, dtype=like.dtype, device=like.device)
            if dtype.is_floating_point
            else torch.zeros(batch, *shape, dtype=dtype, device=like.device)
            for shape, dtype in self.meta["normprop"]["inputs"]
        ]

    def _tree(self) -> nn.Module:
        tree = nn.Module()
        public = {k: v for k, v in self.__dict__.items() if not k.startswith("_") and k != "meta"}
        tree.__dict__.update(public | {key: self.__dict__[key] for key in _TREE})
        return tree

    def __deepcopy__(self, memo: dict[int, Any]) -> ConvertedModule:
        meta = {k: v for k, v in self.meta["normprop"].items() if k != "graphs"}
        copied = ConvertedModule.assemble(
            copy.deepcopy(self._tree(), memo), _copy_graphs(self.graphs()), type(self).__name__, copy.deepcopy(meta)
        )
        memo[id(self)] = copied
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        graphs = self.graphs()
        specs = [encode(graph) for graph in dict.fromkeys(graphs.values())]
        meta = {k: v for k, v in self.meta["normprop"].items() if k != "graphs"}
        return _rebuild, (self._tree(), specs, type(self).__name__, meta)


def _copy_graphs(graphs: dict[bool, fx.Graph]) -> dict[bool, fx.Graph]:
    first = copy.deepcopy(graphs[True])
    return {True: first, False: first if graphs[True] is graphs[False] else copy.deepcopy(graphs[False])}


def _rebuild(tree: nn.Module, specs: list[list[Any]], name: str, meta: dict[str, Any]) -> ConvertedModule:
    graphs = [decode(spec) for spec in specs]
    return ConvertedModule.assemble(tree, {True: graphs[0], False: graphs[-1]}, name, meta)


@dataclass(frozen=True)
class _Function:
    """Stands for a function in a graph's pickled form: pickle's own name of some of torch's functions does not import."""

    module: str
    name: str

    @classmethod
    def of(cls, target: Any) -> Any:
        """The stand-in of a function that its module holds under its name; anything else as it is."""
        module, name = getattr(target, "__module__", None), getattr(target, "__name__", None)
        found = getattr(sys.modules.get(module or ""), name or "", None)
        return cls(module, name) if module and name and found is target else target

    def load(self) -> Any:
        """The function."""
        return getattr(importlib.import_module(self.module), self.name)


class _Reference:
    """Stands for a node in a graph's pickled form."""

    def __init__(self, name: str) -> None:
        self.name = name


def encode(graph: fx.Graph) -> list[Any]:
    """A graph as a list of plain tuples, in order."""
    reference: Any = lambda node: _Reference(node.name)
    return [
        (
            n.op,
            n.name,
            _Function.of(n.target),
            fx.node.map_arg(n.args, reference),
            dict(fx.node.map_arg(n.kwargs, reference)),
        )
        for n in graph.nodes
    ]


def decode(spec: list[Any]) -> fx.Graph:
    """The graph of a list made by `encode`."""
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for op, name, stored, args, kwargs in spec:
        target = stored.load() if isinstance(stored, _Function) else stored
        resolve = lambda a: nodes[a.name] if isinstance(a, _Reference) else a
        nodes[name] = graph.create_node(
            op, target, fx.node.map_aggregate(args, resolve), fx.node.map_aggregate(kwargs, resolve), name
        )
    return graph


def as_converted(model: nn.Module, verb: str) -> ConvertedModule:
    """The model itself if `convert` made it.

    Raises:
        NormPropError: it did not.
    """
    if not isinstance(model, ConvertedModule):
        raise NormPropError(f"{verb} takes a network that convert made, not a {type(model).__name__}.\nConvert it first.")
    return model
