"""Statistics that are off as those of a group of samples are, of one group for all sites of a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import normprop
from normprop.sites.site import Site

# A seed and how many; standardised training samples.
Draw = Callable[[int, int], Tensor]
# For each site what a group's mean is off in standard deviations, and its variance as a multiple.
Deviations = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class GroupNoise:
    """In training every site standardises by the statistics of some group of samples, the same group for all sites.

    After Kosson, Fan and Jaggi (2023, arXiv 2305.17205), who add the noise of smaller batches to statistics. Groups are
    measured as a batch would be, one layer after the other (`calibrate`), and relative to all groups together; at every step
    one of them is drawn. Evaluation has none of it.

    Attributes:
        size: samples of a group.
        groups: that are measured at a time.
        every: steps between two measurements.
        draw: where samples come from.
    """

    size: int
    groups: int = 8
    every: int = 100
    draw: Draw | None = field(default=None, compare=False)

    def __call__(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Disturb before every forward of training, and take it back behind the step: backward needs what forward saw."""
        _Disturbed(network, self).watch(optimizer)


class _Disturbed:
    def __init__(self, network: nn.Module, noise: GroupNoise) -> None:
        self.network, self.noise = network, noise
        self.sites = [module for module in network.modules() if isinstance(module, Site)]
        self.clean: list[tuple[Tensor, Tensor]] = []
        self.known: list[Deviations] = []
        self.steps, self.busy = 0, False

    def watch(self, optimizer: Optimizer) -> None:
        self.network.register_forward_pre_hook(self._before, prepend=True)
        optimizer.register_step_post_hook(lambda *_: self._stepped())

    def _before(self, module: nn.Module, _inputs: object) -> None:
        if self.busy:
            return
        self._restore()
        if module.training:
            if not self.known:
                self.known = self._measured()
            self._disturb(self.known[int(torch.randint(len(self.known), ()))])

    def _stepped(self) -> None:
        self._restore()
        self.steps += 1
        if self.steps % self.noise.every == 0:
            self.known = []

    @torch.no_grad()
    def _disturb(self, off: Deviations) -> None:
        self.clean = self._constants()
        for site, (shift, factor) in zip(self.sites, off, strict=True):
            site.shift.add_(shift * site.scale.sqrt())
            site.scale.mul_(factor)

    @torch.no_grad()
    def _restore(self) -> None:
        for site, (shift, scale) in zip(self.sites, self.clean, strict=False):
            site.shift.copy_(shift)
            site.scale.copy_(scale)
        self.clean = []

    def _constants(self) -> list[tuple[Tensor, Tensor]]:
        return [(site.shift.detach().clone(), site.scale.detach().clone()) for site in self.sites]

    def _measured(self) -> list[Deviations]:
        """Deviations of each group, with the network left as it is."""
        assert self.noise.draw is not None
        state = {name: value.clone() for name, value in self.network.state_dict().items()}
        x = self.noise.draw(self.steps, self.noise.size * self.noise.groups)
        self.busy = True
        try:
            whole, *groups = (self._calibrated(part) for part in (x, *x.split(self.noise.size)))
        finally:
            self.busy = False
            self.network.load_state_dict(state)
        return [
            [((d - mean) / var.sqrt(), k / var) for (d, k), (mean, var) in zip(group, whole, strict=True)]
            for group in groups
        ]

    def _calibrated(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        normprop.calibrate(self.network, x, directions=0)
        return self._constants()
