"""What a moment lane refuses while a network runs."""

from __future__ import annotations

from torch import nn

from normprop.conversion.entry import Entry
from normprop.errors import NormPropError


def refuse_shards(root: nn.Module) -> None:
    """Refuse parts whose parameters FSDP gathers for their own forward only: the lane needs those of all at once."""
    shards = [path for path, m in root.named_modules() if path and type(m).__mro__[1].__name__ == "FSDPModule"]
    if shards:
        raise NormPropError(
            f"{', '.join(shards[:3])}: sharded apart from the network, whose lane runs before they are gathered.\n"
            "Use fully_shard on the whole network, and on layers without a site."
        )


def refuse_sample_gradients(layer: nn.Module, entry: Entry) -> None:
    """Refuse hooks that take the gradient of a layer's weight for themselves: they would take that of the effective one."""
    owners = (type(getattr(hook, "__self__", None)).__module__ for hook in layer._forward_hooks.values())
    if any(owner.startswith("opacus.") for owner in owners):
        raise NormPropError(
            f"Opacus takes the gradients of {entry.layer} by hooks, and would take those of its effective weight.\n"
            "Give it PrivateNetwork(model) or WholeNetwork(model) of normprop.integrations.opacus instead of the model."
        )


def unrecorded_call(path: str, call: int) -> NormPropError:
    """The error for a call that the record lacks."""
    which = f"call {call + 1} of {path}" if call else path
    return NormPropError(
        f"{which} was not recorded when the network was converted: its moments are not known.\n"
        "Convert with example= inputs (or in a mode) that take this path."
    )


def ambiguous(path: str, count: int) -> NormPropError:
    """The error for a part called by itself that a forward calls several times."""
    return NormPropError(
        f"{path} is called {count} times in a forward of the network, under different moments: by itself it isn't known "
        "which is meant.\nCall the whole network, or convert the part: normprop.convert(model.part, in_place=True)."
    )
