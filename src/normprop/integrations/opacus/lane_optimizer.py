"""An optimizer that gets private gradients of effective tensors and steps on the parameters behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from normprop.conversion.effective_tensors import EffectiveTensors
from normprop.errors import NormPropError


class LaneOptimizer(torch.optim.Optimizer):
    """Stands between Opacus' optimizer, which clips and noises, and the user's, which steps.

    Its groups are those of the user's optimizer with effective tensors for parameters. Settings are shared, so that
    schedulers may be given either; so are state, `state_dict` and step hooks.

    Args:
        optimizer: the user's.
        network: whose parameters it steps on.
        tensors: of the network.

    Raises:
        NormPropError: it holds tensors that are not the network's, which would step on what is not private.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, network: nn.Module, tensors: EffectiveTensors) -> None:
        # Without super().__init__(): groups, state and hooks are the inner optimizer's.
        self.inner, self.tensors = optimizer, tensors
        if isinstance(optimizer, LaneOptimizer) or hasattr(optimizer, "original_optimizer"):
            raise NormPropError(f"{type(optimizer).__name__} is wrapped already.\nGive the optimizer itself.")
        own = {id(p) for p in network.parameters()}
        if any(id(p) not in own for group in optimizer.param_groups for p in group["params"]):
            raise NormPropError(
                "the optimizer holds tensors that are no parameters of the network.\nMake it from the network's own, "
                "torch.optim.AdamW(model.parameters(), …)."
            )
        read = [p for p in tensors.plain.parameters() if p.requires_grad]
        plain = {id(p) for p in read}
        self.behind = [p for p in network.parameters() if id(p) not in plain]
        self.read = read

    @property
    def param_groups(self) -> list[Any]:  # type: ignore[override]  # an attribute in torch
        """The inner optimizer's groups; all that Opacus is to clip stands in the first."""
        return [_Group(group, [] if i else self.read) for i, group in enumerate(self.inner.param_groups)]

    @property
    def state(self) -> Any:  # type: ignore[override]  # an attribute in torch
        """The inner optimizer's."""
        return self.inner.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]  # an attribute in torch
        """The inner optimizer's."""
        return self.inner.defaults

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Take gradients through the lane, and step.

        Raises:
            NormPropError: see `EffectiveTensors.send_back`.
        """
        if closure is not None:
            with torch.enable_grad():
                closure()
        for parameter in self.behind:
            parameter.grad = None
        self.tensors.send_back()
        return self.inner.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients of effective tensors and of parameters."""
        self.inner.zero_grad(set_to_none)
        for parameter in self.read:
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the inner optimizer's."""
        self.inner.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:  # noqa: ARG002  # torch names it
        """Refuse: effective tensors are made of the parameters that were there.

        Raises:
            NormPropError: always.
        """
        raise NormPropError("groups can't be added to a wrapped optimizer.\nAdd them to the optimizer, then wrap it anew.")

    def register_step_pre_hook(self, hook: Any) -> Any:
        """On the inner optimizer: it runs with gradients of the network's parameters."""
        return self.inner.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> Any:
        """On the inner optimizer."""
        return self.inner.register_step_post_hook(hook)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r})"


class _Group(MutableMapping[str, Any]):
    """A group of another optimizer's settings with other parameters."""

    def __init__(self, group: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        self.group, self.parameters = group, parameters

    def __getitem__(self, name: str) -> Any:
        return self.parameters if name == "params" else self.group[name]

    def __setitem__(self, name: str, value: Any) -> None:
        if name != "params":
            self.group[name] = value

    def __delitem__(self, name: str) -> None:
        del self.group[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.group)

    def __len__(self) -> int:
        return len(self.group)
