"""Hooks that let a network's own forward run with the weights that its moment lane computes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.compiler import is_compiling

from normprop.conversion.lane import Lane, lane_of
from normprop.conversion.placement import is_bare, is_covered
from normprop.conversion.program_calls import raw
from normprop.conversion.run import Run
from normprop.errors import NormPropError
from normprop.sites.site import Site

_MISSING = object()


class Begin:
    """Evaluates the lane before the network's forward."""

    unrecorded = True
    begins = True

    def __init__(self, lane: Lane) -> None:
        self.lane = lane

    def __call__(self, root: nn.Module, args: Any, kwargs: Any) -> None:
        """Before the forward."""
        del kwargs
        check_inputs(self.lane, args)
        self.lane.begin(root)


class End:
    """Forgets the lane's values after the network's forward."""

    unrecorded = True

    def __init__(self, lane: Lane) -> None:
        self.lane = lane

    def __call__(self, *_: Any) -> None:
        """After the forward."""
        self.lane.end()


class Cover:
    """Puts a layer's effective weight and bias before its own for the time of its forward.

    Attributes of a module are shared by threads: while one runs the layer the others wait.

    Args:
        lane: of the network.
        path: of the layer.
    """

    unrecorded = True
    covers = True

    def __init__(self, lane: Lane, path: str) -> None:
        self.lane, self.path = lane, path
        self.lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        """A lock can't be copied."""
        return {"lane": self.lane, "path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.lane, self.path, self.lock = state["lane"], state["path"], threading.RLock()

    def __call__(self, layer: nn.Module, args: Any) -> None:
        """Before the layer's forward.

        Raises:
            NormPropError: something else has taken the weight; or what `Lane.called` raises.
        """
        run = self.lane.run()
        ready = run.ready.pop(self.path, None)
        if ready is None:
            self._cover(run, layer, args)
            return
        entry, weight, bias, site = ready
        if not (is_compiling() or is_bare(layer, site)):
            run.placements.clear()
            self._cover(run, layer, args)
            return
        run.calls[self.path] = 1
        if weight.dtype is not (kind := raw(layer, "weight").dtype):
            weight, bias = weight.to(kind), bias.to(kind)
        if not is_compiling():
            self.lock.acquire()
        own = layer.__dict__
        run.open.append((self, entry, None, own.get("weight", _MISSING), own.get("bias", _MISSING)))
        own["weight"], own["bias"] = weight, bias

    def _cover(self, run: Run, layer: nn.Module, args: Any) -> None:
        """The same of a layer that runs several times in a forward, by itself or wrapped."""
        if layer._parameters.get("weight") is None and not is_covered(layer) and not _computed(layer):
            raise NormPropError(
                f"the weight of {self.path} is not a parameter any more: pruning, weight_norm or spectral_norm put a hook "
                "in its place.\nUse torch.nn.utils.parametrizations or parametrize, or apply it before convert."
            )
        found = self.lane.called(layer, self.path, args)
        if not is_compiling():
            self.lock.acquire()
        if found is None:
            run.open.append((self, None, None, None, None))
            return
        try:
            weight, bias, rest = self.lane.cover(layer, found)
        except BaseException:
            self.release()
            raise
        own = layer.__dict__
        run.open.append((self, found, rest, own.get("weight", _MISSING), own.get("bias", _MISSING)))
        if weight is not None and not _computed(layer):
            own["weight"] = weight
        own["bias"] = bias

    def release(self) -> None:
        """Let other threads run the layer."""
        if not is_compiling():
            self.lock.release()


class Uncover:
    """The other end of `Cover`: takes the effective weight away, also after an exception, and hands on the output."""

    unrecorded = True

    def __init__(self, cover: Cover) -> None:
        self.cover = cover

    def __call__(self, layer: nn.Module, _: Any, output: Any) -> None:
        """After the layer's forward, or an exception in it."""
        cover = self.cover
        lane = cover.lane
        run = lane.run()
        if not run.open or run.open[-1][0] is not cover:
            return  # it was refused
        _, entry, rest, weight, bias = run.open.pop()
        if entry is not None:
            own = layer.__dict__
            if weight is not _MISSING:
                own["weight"] = weight
            else:
                own.pop("weight", None)
            if bias is not _MISSING:
                own["bias"] = bias
            else:
                own.pop("bias", None)
            if isinstance(output, Tensor):
                if lane.observer is not None:
                    lane.observer.at_output(entry, layer, output, rest)
                if not entry.bare:
                    lane.leave(run, entry, output, rest)
        cover.release()


class Standardise:
    """Standardises the input of a layer, in the paper's form."""

    unrecorded = True

    def __init__(self, lane: Lane, path: str) -> None:
        self.lane, self.path = lane, path

    def __call__(self, _: nn.Module, args: Any) -> Any:
        """Before the layer's forward."""
        return (self.lane.standardise(self.path, args[0]), *args[1:])


class Whole:
    """Calls a network; what `torch.compile` finds for its ``__call__``, so that it traces hooks and forward as one graph.

    Torch's own runs the hooks of the network that is compiled outside of the graph of its forward. The lane would be a
    graph by itself, and every effective weight would be handed over from one to the other.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network."""
        return self.root(*args, **kwargs)


class Reattach:
    """Gives a copy of a graph module, which loses the hooks of its forward, those of its lane again."""

    unrecorded = True

    def __call__(self, copied: nn.Module) -> None:
        """After `copy.deepcopy`."""
        lanes = (module.lane for module in copied.modules() if isinstance(module, Site))
        found = next((lane for lane in lanes if lane is not None and lane.root is copied), None)
        if found is not None and lane_of(copied) is None:
            _begin_and_end(copied, found)
            _keep_in_pickles(copied)


def _keep_in_pickles(root: nn.Module) -> None:
    """Have a pickled graph module, which loses the hooks of its forward, too, attached again: its class is its own."""
    kind: Any = type(root)
    kind.__reduce__ = _reduce_with_lane


def _reduce_with_lane(root: nn.Module) -> tuple[Any, ...]:
    return unpickled, (lane_of(root), *super(type(root), root).__reduce__())


def unpickled(lane: Lane | None, build: Callable[..., torch.fx.GraphModule], args: tuple[Any, ...]) -> torch.fx.GraphModule:
    """A graph module as torch builds it from a pickle, with the hooks of its lane.

    Args:
        lane: of the network; it may have no attributes yet.
        build: torch's function.
        args: of it.
    """
    root = build(*args)
    if lane is not None:
        _begin_and_end(root, lane)
        root._register_deepcopy_hook(Reattach())
        _keep_in_pickles(root)
    return root


def _begin_and_end(root: nn.Module, lane: Lane) -> None:
    root.register_forward_pre_hook(Begin(lane), with_kwargs=True)
    root.register_forward_hook(End(lane), always_call=True, prepend=True)
    root.__dict__["__call__"] = Whole(root)


def attach(root: nn.Module, lane: Lane) -> None:
    """Give a network its lane: hooks of its own, and of every layer with a site."""
    _begin_and_end(root, lane)
    if isinstance(root, torch.fx.GraphModule):
        root._register_deepcopy_hook(Reattach())
        _keep_in_pickles(root)
    for path in dict.fromkeys(path for mode in (False, True) for path in lane.standards[mode]):
        root.get_submodule(path).register_forward_pre_hook(Standardise(lane, path))
    for path in dict.fromkeys(path for mode in (False, True) for path in lane.layers[mode]):
        layer, cover = root.get_submodule(path), Cover(lane, path)
        layer.register_forward_pre_hook(cover)
        layer.register_forward_hook(Uncover(cover), always_call=True, prepend=True)


class Unrecorded:
    """Refuses a BatchNorm that no record has run: by itself it would look at the batch."""

    unrecorded = True

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, *_: Any) -> None:
        """Before its forward.

        Raises:
            NormPropError: always.
        """
        raise NormPropError(
            f"{self.path} did not run when the network was converted, and is a BatchNorm still.\n"
            "Convert with example= inputs (or in a mode) that take this path."
        )


def detach(root: nn.Module) -> None:
    """Take all hooks of lanes away."""
    for module in root.modules():
        if isinstance(module.__dict__.get("__call__"), Whole):
            del module.__dict__["__call__"]
        if isinstance(module, torch.fx.GraphModule):
            module._deepcopy_hooks = [hook for hook in module._deepcopy_hooks if not isinstance(hook, Reattach)]
            if type(module).__dict__.get("__reduce__") is _reduce_with_lane:
                del type(module).__reduce__
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, "unrecorded", False)]:
                del hooks[key]
                for flags in (module._forward_pre_hooks_with_kwargs, module._forward_hooks_always_called):
                    flags.pop(key, None)


def check_inputs(lane: Lane, args: Any) -> None:
    """Refuse integers where the network was converted for numbers.

    Raises:
        NormPropError: as it says.
    """
    for given, known in zip(args, lane.example.args, strict=False):
        if (
            isinstance(given, Tensor)
            and isinstance(known, Tensor)
            and known.is_floating_point()
            and not given.is_floating_point()
        ):
            raise NormPropError(
                f"the input is {str(given.dtype).removeprefix('torch.')}, the network takes floating-point numbers.\n"
                "Scale it as the training data was scaled: x.float() / 255, then standardised."
            )


def _computed(layer: nn.Module) -> bool:
    """Whether a parametrisation computes the layer's weight."""
    return isinstance(getattr(type(layer), "weight", None), property)
