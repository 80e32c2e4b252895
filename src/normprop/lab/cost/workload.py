"""The work of every contender: training and inference on samples of one shape, in one setting of the machine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normprop.conversion.accumulation import accumulate
from normprop.conversion.folding import fold
from normprop.conversion.lane import lane_of
from normprop.errors import NormPropError
from normprop.lab.cost.contenders import CONTENDERS, SUBJECT, Shape
from normprop.lab.cost.lane_alone import LaneAlone
from normprop.lab.cost.replacement import check_has_batchnorm
from normprop.lab.cost.rounds import Step
from normprop.lab.networks.memory_format import overrunning
from normprop.lab.networks.models import build
from normprop.lab.networks.normalizers import normalizer

# Changes no weight by more than its rounding, and costs what any rate costs.
_RATE = 1e-9


@dataclass(frozen=True)
class Workload:
    """The setting that all contenders share.

    Attributes:
        model: Name of the network, as in `normprop train`.
        shape: Shape of a sample.
        classes: Number of outputs.
        width: Width factor of the built-in networks.
        device: A torch device.
        threads: Threads for CPU arithmetic.
        compiled: Whether networks are compiled, as one graph each.
        channels_last: Memory format of images and filters.
        accumulate: Batches per step of the optimizer.
    """

    model: str
    shape: Shape = (3, 32, 32)
    classes: int = 10
    width: float = 1.0
    device: str = "cpu"
    threads: int = 1
    compiled: bool = False
    channels_last: bool = False
    accumulate: int = 1

    def original(self) -> nn.Module:
        """The BatchNorm network, freshly initialised, on the CPU.

        Raises:
            NormPropError: for an unknown name, a network without BatchNorm, samples that don't suit it, or a memory
                format in which its gradients would be wrong.
        """
        torch.manual_seed(0)
        norm = normalizer("batch")
        network = build(self.model, shape=self.shape, classes=self.classes, norm=norm, width=self.width)
        check_has_batchnorm(network, self.model)
        self._check_runs(network)
        self._check_memory_format(network)
        return network

    def contender(self, name: str) -> nn.Module:
        """The network of a contender, ready to be measured."""
        return self._placed(CONTENDERS[name].build(self.original(), self.shape))

    def deployed(self, name: str) -> nn.Module:
        """The network with which a contender infers, in evaluation mode; converted ones are folded."""
        network = CONTENDERS[name].build(self.original(), self.shape)
        if lane_of(network) is not None:
            network = fold(network)
        return self._placed(network).eval()

    def lane(self) -> LaneAlone:
        """The moment lane of another converted network."""
        network: Any = self.contender(SUBJECT)
        return LaneAlone(network)

    def inputs(self, batch_size: int) -> Tensor:
        """A batch of standard normal samples."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(batch_size, *self.shape, generator=generator).to(self.device)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last and x.dim() == 4 else x

    def run(self, network: nn.Module) -> nn.Module:
        """The network, compiled if the workload asks for it."""
        if not self.compiled:
            return network
        # For a CPU the compiler would lay images channels last, whatever format they have.
        options: dict[str, Any] | None = {"layout_optimization": False} if overrunning(network) else None
        return torch.compile(network, fullgraph=True, dynamic=False, options=options)  # type: ignore[return-value]  # torch types it as any callable

    def training_step(self, network: nn.Module, batch_size: int) -> Step:
        """A whole step: zeroed gradients, forward, cross-entropy, backward, SGD with momentum and weight decay."""
        run, x = self.run(network.train()), self.inputs(batch_size)
        y = torch.arange(batch_size, device=self.device) % self.classes
        trainable = [p for p in network.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trainable, lr=_RATE, momentum=0.9, weight_decay=5e-4)

        def step() -> None:
            optimizer.zero_grad()
            with self._shared(network):
                for _ in range(self.accumulate):
                    torch.stack([F.cross_entropy(scores, y) for scores in _tensors(run(x))]).sum().backward()
            optimizer.step()

        return step

    def _shared(self, network: nn.Module) -> contextlib.AbstractContextManager[Any]:
        """The context in which micro-batches share a converted network's moment lane."""
        several = self.accumulate > 1 and lane_of(network) is not None and not self.compiled
        return accumulate(network) if several else contextlib.nullcontext()

    def inference_step(self, network: nn.Module, batch_size: int) -> Step:
        """A forward of a network in evaluation mode, without gradients."""
        run, x = self.run(network), self.inputs(batch_size)

        @torch.no_grad()
        def step() -> Any:
            return run(x)

        return step

    @torch.no_grad()
    def _check_runs(self, network: nn.Module) -> None:
        try:
            network.eval()(torch.zeros(1, *self.shape))
        except (RuntimeError, ValueError, AssertionError) as error:  # as layers and timm refuse a size
            shape = "×".join(map(str, self.shape))
            reason = (str(error).splitlines() or ["no reason given"])[0]
            raise NormPropError(
                f"{self.model} doesn't run on samples of {shape}: {reason}\nGive it another --shape."
            ) from error
        network.train()

    def _check_memory_format(self, network: nn.Module) -> None:
        layers = overrunning(network) if self.channels_last and torch.device(self.device).type == "cpu" else []
        if layers:
            raise NormPropError(
                f"On a CPU, gradients of {self.model} would be wrong channels last: torch's arithmetic (oneDNN) writes past "
                f"its memory for 1×1 convolutions with a stride and fewer than 16 channels, here {', '.join(layers)}.\n"
                "Leave out --channels-last."
            )

    def _placed(self, network: nn.Module) -> nn.Module:
        network = network.to(self.device)
        return network.to(memory_format=torch.channels_last) if self.channels_last else network


def _tensors(output: Any) -> Iterable[Tensor]:
    """The scores of a network, including those of auxiliary heads."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [value for value in values if isinstance(value, Tensor)]
