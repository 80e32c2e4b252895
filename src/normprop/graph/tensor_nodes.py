"""Which node of a record every tensor is, and what becomes of tensors that share memory with one that is written to."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normprop.graph.node import HERE, Node
from normprop.graph.shared_memory import are_same_numbers, on_meta, storage_of, tensors_in


class TensorNodes:
    """Knows tensors by identity.

    Args:
        model: the network that runs.
        add: adds an operation to its record: op, target, arguments, keyword arguments, value.
        note: adds a node that is none.

    Attributes:
        meta: whether the network is on the meta device, where tensors have no values.
        known: every tensor's node.
        aliases: tensors by the memory that they share.
        overwritten: real tensors whose twins on the meta device were written to: their own values are old.
        parts: what indexing gave: of which tensor, and where.
    """

    def __init__(self, model: nn.Module, add: Callable[..., Node], note: Callable[[Node], None]) -> None:
        self.add, self.note = add, note
        self.meta = next((t.is_meta for t in (*model.parameters(), *model.buffers())), False)
        self.known: dict[int, tuple[Tensor, Node]] = {}
        self.aliases: dict[int, list[Tensor]] = {}
        self.paths = {id(t): path for path, t in (*model.named_buffers(), *model.named_parameters())}
        self.kept = {id(t): t for t in (*model.parameters(), *model.buffers())}
        held = (value for module in model.modules() for value in vars(module).values())
        self.attributes = {id(value): value for value in held if isinstance(value, Tensor)}
        self.own: dict[int, list[Tensor]] = {}
        for tensor in self.kept.values():
            self.own.setdefault(storage_of(tensor), []).append(tensor)
        self.twins: dict[int, tuple[Tensor, Tensor]] = {}
        self.overwritten: set[int] = set()
        self.parts: dict[int, tuple[Tensor, Any]] = {}

    def alike(self, value: Any) -> Any:
        """Arguments for a run on the meta device: what is real among tensors that aren't becomes a meta tensor."""
        if not self.meta:
            return value
        tensors = tensors_in(value)
        valueless = any(t.is_meta or id(t) in self.overwritten for t in tensors)
        if not valueless or all(t.is_meta for t in tensors):
            return value
        return pytree.tree_map_only(Tensor, lambda t: t if t.is_meta else self._twin(t), value)

    def _twin(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self.twins:
            self.twins[id(tensor)] = tensor, on_meta(tensor)
            self.bind(self.twins[id(tensor)][1], self.node_of(tensor))
        return self.twins[id(tensor)][1]

    def bind_all(self, value: Any, node: Node) -> None:
        """Know the tensors of a structure as entries of a node."""
        if isinstance(value, Tensor):
            self.bind(value, node)
        elif isinstance(value, tuple | list):
            for i, entry in enumerate(value):
                if tensors_in(entry):
                    self.bind_all(entry, self.add("call", operator.getitem, (node, i), {}, entry))
        elif isinstance(value, Mapping):
            for key, entry in value.items():
                if tensors_in(entry):
                    self.bind_all(entry, self.add("call", operator.getitem, (node, key), {}, entry))

    def bind(self, tensor: Tensor, node: Node) -> None:
        """Know a tensor as a node from here on."""
        if id(tensor) not in self.known:
            self.aliases.setdefault(storage_of(tensor), []).append(tensor)
        self.known[id(tensor)] = tensor, node

    def spread(self, changed: Tensor) -> None:
        """Other tensors that share memory with one that was changed are changed with it: first those it is a part of."""
        done, top = {id(changed)}, changed
        while id(top) in self.parts:
            whole, index = self.parts[id(top)]
            before, source = self.known[id(whole)][1], self.known[id(top)][1]
            target: Any = operator.setitem
            args: Any = before, self.nodes_for(index), source
            if are_same_numbers(whole, top):
                target, args = "reshape", (source, tuple(whole.shape))
            self.known[id(whole)] = whole, self.add("call", target, args, {}, whole)
            done.add(id(whole))
            top = whole
        for other in self.aliases.get(storage_of(changed), []):
            if id(other) not in done:
                self.known[id(other)] = other, self._reread(other, changed, top, done)
                done.add(id(other))
        if id(changed) in self.overwritten:
            self.overwritten |= done

    def _reread(self, other: Tensor, changed: Tensor, top: Tensor, done: set[int]) -> Node:
        """What a tensor holds after one that it shares memory with was changed, and the whole of that."""
        for tensor in (top, changed):
            if are_same_numbers(other, tensor):
                return self.add("call", "reshape", (self.known[id(tensor)][1], tuple(other.shape)), {}, other)
        if id(other) in self.parts and id(self.parts[id(other)][0]) in done:
            whole, index = self.parts[id(other)]
            return self.add("call", operator.getitem, (self.known[id(whole)][1], self.nodes_for(index)), {}, other)
        nodes = self.known[id(other)][1], self.known[id(changed)][1]
        return self.add("call", "in-place change of a view", nodes, {}, other)

    def nodes_for(self, value: Any) -> Any:
        """A structure with nodes in place of its tensors."""
        if isinstance(value, Tensor):
            return self.node_of(value)
        if isinstance(value, torch.Size):
            return tuple(value)
        if isinstance(value, tuple):
            mapped = [self.nodes_for(v) for v in value]
            return type(value)(*mapped) if hasattr(value, "_fields") else tuple(mapped)
        if isinstance(value, list):
            return [self.nodes_for(v) for v in value]
        if isinstance(value, Mapping):
            return {k: self.nodes_for(v) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(*(self.nodes_for(v) for v in (value.start, value.stop, value.step)))
        if isinstance(value, torch.device) and (value.type == "meta" or not self.meta):
            return HERE
        return value

    def node_of(self, tensor: Tensor) -> Node:
        """The node of a tensor; a parameter, a constant, or what was not seen, if there is none yet."""
        found = self.known.get(id(tensor))
        if found is not None:
            return found[1]
        path = self.paths.get(id(tensor)) or self._path_of_alias(tensor)
        if path is not None:
            node = Node("tensor", path, value=tensor)
        elif (self.meta and not tensor.is_meta) or id(tensor) in self.attributes:
            node = Node("constant", tensor.detach(), value=on_meta(tensor))
        else:
            return self._unseen(tensor)
        self.note(node)
        self.bind(tensor, node)
        return node

    def _path_of_alias(self, tensor: Tensor) -> str | None:
        """The parameter or buffer whose memory a tensor is, all of it: what `torch.autograd.Variable` makes of one."""
        for own in self.own.get(storage_of(tensor), ()):
            if own.shape == tensor.shape and are_same_numbers(own, tensor):
                return self.paths[id(own)]
        return None

    def _unseen(self, tensor: Tensor) -> Node:
        node = self.add(
            "unseen", "an operation that torch doesn't show (a custom autograd function, a scripted one)", (), {}, tensor
        )
        self.bind(tensor, node)
        return node
