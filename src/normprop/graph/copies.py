"""Copies of a network: one of its own, and one without memory to be recorded."""

from __future__ import annotations

import collections
import contextlib
import copy
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_CONTAINERS = (list, dict, set, bytearray, collections.deque)


def independent_copy(model: nn.Module) -> nn.Module:
    """A deep copy; tensors that a forward left in a module's attributes are copied without their history.

    Attention layers that cache a bias in eval mode hold such tensors, and `copy.deepcopy` refuses them.
    """
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in _left_behind(model)}
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        _rebind_forward(module, memo)
    return copied


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers are on the meta device, to be run and thrown away.

    Hooks of the user's are copied with what they close over, so that none of it changes when the copy runs; hooks that
    carry a moment lane (``unrecorded``) are left out.
    """
    memo: dict[int, Any] = {id(t): t.detach() for t in _left_behind(model)}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(_meta(parameter), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo.setdefault(id(buffer), _meta(buffer))
    return _throwaway(model, memo)


def running_copy(model: nn.Module) -> nn.Module:
    """As `meta_copy` with real tensors, and with its moment lane: parameters are the model's own, buffers are copies."""
    memo: dict[int, Any] = {id(t): t.detach() for t in _left_behind(model)}
    memo |= {id(p): p for p in model.parameters()}
    return _throwaway(model, memo, lanes=True)


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules alone: parameters and buffers are the model's own."""
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in _left_behind(model)}
    memo |= {id(t): t for t in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        _rebind_forward(module, memo)
    return copied


def put_module(root: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """The network with another module at a path, and wherever else the old one is held; the module itself for ``""``."""
    if path == "":
        return module
    parent, _, name = path.rpartition(".")
    holder = root.get_submodule(parent)
    old = holder._modules.get(name)
    # Looked for first: the module may hold the old one itself.
    others = [(m, key) for m in root.modules() for key, child in m._modules.items() if child is old and old is not None]
    for other, key in [(holder, name), *others]:
        other._modules[key] = module
    return root


def _throwaway(model: nn.Module, memo: dict[int, Any], *, lanes: bool = False) -> nn.Module:
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        _rebind_forward(module, memo)
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if getattr(hook, "unrecorded", False):
                    if not lanes:
                        del hooks[key]
                elif isinstance(hook, types.FunctionType):
                    hooks[key] = _isolated(hook, memo)
    return copied


def _rebind_forward(module: nn.Module, memo: dict[int, Any]) -> None:
    """Let a forward that was assigned to a module, and closes over modules, close over their copies."""
    own = module.__dict__.get("forward")
    if isinstance(own, types.FunctionType) and own.__closure__:
        known = {id(c): memo.get(id(c.cell_contents)) for c in own.__closure__ if c.cell_contents is not None}
        cells = tuple(c if known.get(id(c)) is None else types.CellType(known[id(c)]) for c in own.__closure__)
        made = types.FunctionType(own.__code__, own.__globals__, own.__name__, own.__defaults__, cells)
        made.__kwdefaults__ = own.__kwdefaults__
        module.__dict__["forward"] = made


def _isolated(function: types.FunctionType, memo: dict[int, Any]) -> types.FunctionType:
    """A function with copies of what it closes over and of the containers that it names, where these can be copied."""
    space = dict(function.__globals__)
    for name in set(_names(function.__code__)) & space.keys():
        if isinstance(space[name], _CONTAINERS):
            with contextlib.suppress(Exception):  # what can't be copied is shared
                space[name] = copy.deepcopy(space[name], memo)
    cells = []
    for cell in function.__closure__ or ():
        try:
            cells.append(types.CellType(copy.deepcopy(cell.cell_contents, memo)))
        except Exception:  # empty, or of a kind that can't be copied
            cells.append(cell)
    made = types.FunctionType(function.__code__, space, function.__name__, function.__defaults__, tuple(cells))
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _meta(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta", requires_grad=False)


def _left_behind(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        for value in module.__dict__.values():
            entries = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
            yield from (t for t in entries if isinstance(t, Tensor) and not t.is_leaf)
