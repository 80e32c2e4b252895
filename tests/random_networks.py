"""Networks drawn at random from all that a forward may do, and what must hold of every one."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normprop
from normprop import NormPropError
from tests.zoo import outputs

SIZE = 4
Step = tuple[str, tuple[int, ...], Any]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "elu": F.elu,
    "leaky": lambda x: F.leaky_relu(x, 0.2),
    "relu6": F.relu6,
    "abs": torch.abs,
    "mish": F.mish,
    "sin": torch.sin,
    "swish": lambda x: x * torch.sigmoid(1.7 * x),
    "squared relu": lambda x: F.relu(x) ** 2,
    "square": lambda x: x * x,
    "bell": lambda x: torch.exp(-x * x),
    "clipped": lambda x: x.clamp(-1, 0.7),
    "bent": lambda x: torch.where(x > 0.3, x, 0.1 * x),
    "sign": torch.sign,
    "softplus": F.softplus,
    "halves": lambda x: torch.maximum(x, torch.tanh(x)),
    "step": lambda x: (x > 0).to(x),
}
MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "roll channels": lambda x: x.roll(1, 1),
    "roll": lambda x: torch.roll(x, 2, 3),
    "flip": lambda x: x.flip(1, 2),
    "shuffle": lambda x: F.channel_shuffle(x, 2),
    "there and back": lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2),
    "view": lambda x: x.flatten(2).view(x.shape),
    "tokens": lambda x: x.flatten(2).transpose(1, 2).transpose(1, 2).reshape(x.shape),
    "clone": lambda x: x.clone(),
    "double": lambda x: torch.cat([x, x], 1)[:, ::2],
    "repeat": lambda x: x.repeat(1, 2, 1, 1)[:, : x.shape[1]],
    "phases": lambda x: F.pixel_unshuffle(F.pixel_shuffle(x.repeat(1, 4, 1, 1), 2), 2)[:, : x.shape[1]],
    "pieces": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "entries": lambda x: torch.stack(x.unbind(1), 1),
    "padded": lambda x: F.pad(x, (1, 1, 1, 1))[..., 1:-1, 1:-1],
    "mirrored": lambda x: F.pad(x, (1, 1, 0, 0), mode="reflect")[..., 1:-1],
    "border": lambda x: F.pad(x, (0, 1, 1, 0))[..., :SIZE, :SIZE],
    "enlarged": lambda x: F.interpolate(x, scale_factor=2)[..., ::2, ::2],
    "slices": lambda x: torch.cat([x[:, :1], x[:, 1:]], 1),
    "turned": lambda x: x.transpose(2, 3),
}
MEASURES: dict[str, Callable[[Tensor], Tensor]] = {
    "average": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "maximum": lambda x: F.max_pool2d(x, 3, 1, 1),
    "global": lambda x: x + F.adaptive_avg_pool2d(x, 1),
    "mean": lambda x: x - x.mean((2, 3), keepdim=True),
    "largest": lambda x: x + x.max(dim=1, keepdim=True)[0],
    "amax": lambda x: x + x.amax((2, 3), keepdim=True),
    "deviation": lambda x: x / (1 + x.std((2, 3), keepdim=True)),
    "softmax": lambda x: x + torch.softmax(x, 1),
    "gate": lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)),
    "norm": lambda x: F.normalize(x, dim=1),
    "halved": lambda x: torch.cat([F.glu(torch.cat([x, x.flip(1)], 1), 1)], 1),
}
IN_PLACE: dict[str, Callable[[Tensor], Any]] = {
    "relu_": F.relu_,
    "mul_": lambda x: x.mul_(0.7),
    "add_": lambda x: x.add_(0.3),
    "clamp_": lambda x: x.clamp_(-2, 2),
    "tanh_": lambda x: x.tanh_(),
    "view": lambda x: x.view(x.shape[0], -1).mul_(1.3),
    "neg": lambda x: torch.neg_(x),
    "part": lambda x: x[:, :1].mul_(2.0),
    "sub": lambda x: x.__isub__(0.2),
    "silu": lambda x: F.silu(x, inplace=True),
}
JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - 0.5 * y,
    "mul": lambda x, y: x * y,
    "gate": lambda x, y: x * torch.sigmoid(y),
    "maximum": torch.maximum,
    "lerp": lambda x, y: torch.lerp(x, y, 0.3),
    "addcmul": lambda x, y: torch.addcmul(x, x, y, value=0.2),
    "iadd": lambda x, y: x.clone().add_(y),
    "stack": lambda x, y: torch.stack([x, y], 1).mean(1),
    "cat": lambda x, y: torch.cat([x, y], 1)[:, 1 : 1 + x.shape[1]],
}


class RandomNetwork(nn.Module):
    """Runs steps on a list of tensors of one shape; every step adds one to it."""

    def __init__(self, channels: int, steps: list[Step], layers: list[nn.Module], inputs: int) -> None:
        super().__init__()
        self.channels, self.steps, self.inputs = channels, steps, inputs
        self.layers = nn.ModuleList(layers)
        self.scale = nn.Parameter(torch.rand(channels, 1, 1) + 0.5)
        self.register_buffer("offset", torch.randn(1, channels, 1, 1))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        tensors = [x if y is None else x + y]
        for kind, places, detail in self.steps:
            one, *others = (tensors[i] for i in places)
            tensors.append(self.step(kind, one, others, detail))
        return tensors[-1].mean((2, 3)) if self.training else tensors[-1]

    def step(self, kind: str, x: Tensor, others: list[Tensor], detail: Any) -> Tensor:
        """What a step makes of its tensors."""
        if kind == "layer":
            for i in detail:
                x = self.layers[i](x)
            return x
        if kind in ("activation", "move", "measure"):
            return {"activation": ACTIVATIONS, "move": MOVES, "measure": MEASURES}[kind][detail](x)
        if kind == "in place":
            x = x.clone() if detail[1] else x
            IN_PLACE[detail[0]](x)
            return x
        if kind == "join":
            return JOINS[detail](x, others[0])
        if kind == "training":
            return F.dropout(x, 0.3, self.training) if detail else x * 2 if self.training else x
        return x * self.scale + self.offset


@dataclass
class Draw:
    """A network, what it takes, and how it was drawn."""

    seed: int
    model: nn.Module
    example: tuple[Tensor, ...]
    steps: list[Step] = field(default_factory=list)


def draw(seed: int, longest: int = 10) -> Draw:
    """The network of a number."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    channels = rng.choice((2, 4, 6))
    layers: list[nn.Module] = []
    steps: list[Step] = []
    count = 1
    kinds = ("layer", "activation", "move", "measure", "in place", "join", "training", "parameter")
    for _ in range(rng.randint(1, longest)):
        kind = rng.choices(kinds, (5, 4, 3, 2, 2, 3, 1, 1))[0]
        one = count - 1 if rng.random() < 0.7 else rng.randrange(count)
        places: tuple[int, ...] = (one,)
        detail: Any = None
        if kind == "layer":
            if layers and rng.random() < 0.2:
                detail = [rng.randrange(len(layers))]  # called once more
            else:
                new = _layers(rng, channels)
                layers += new
                detail = list(range(len(layers) - len(new), len(layers)))
        elif kind in ("activation", "move", "measure"):
            detail = rng.choice(list({"activation": ACTIVATIONS, "move": MOVES, "measure": MEASURES}[kind]))
        elif kind == "in place":
            detail = rng.choice(list(IN_PLACE)), rng.random() < 0.4 or one == 0
        elif kind == "join":
            places, detail = (one, rng.randrange(count)), rng.choice(list(JOINS))
        elif kind == "training":
            detail = rng.random() < 0.7
        steps.append((kind, places, detail))
        count += 1
    layers += [nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)]
    steps.append(("layer", (count - 1,), [len(layers) - 2, len(layers) - 1]))
    inputs = 2 if rng.random() < 0.2 else 1
    model = _randomised(RandomNetwork(channels, steps, layers, inputs), rng).double().eval()
    example = tuple(torch.randn(2, channels, SIZE, SIZE, dtype=torch.float64) for _ in range(inputs))
    return Draw(seed, model, example, steps)


def _layers(rng: random.Random, channels: int) -> list[nn.Module]:
    """A linear layer, mostly with a BatchNorm behind it; or a BatchNorm, or another normaliser, alone."""
    bias = rng.random() < 0.5
    layer = rng.choice(
        [
            lambda: nn.Conv2d(channels, channels, 3, padding=1, bias=bias),
            lambda: nn.Conv2d(channels, channels, 1, groups=2, bias=bias),
            lambda: nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=bias, padding_mode="circular"),
            lambda: nn.ConvTranspose2d(channels, channels, 3, padding=1, bias=bias),
            lambda: nn.GroupNorm(2, channels),
            lambda: nn.PReLU(channels),
            lambda: nn.BatchNorm2d(channels, affine=bias),
        ]
    )()
    normalised = isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) and rng.random() < 0.8
    return [layer, nn.BatchNorm2d(channels)] if normalised else [layer]


@torch.no_grad()
def _randomised(model: nn.Module, rng: random.Random) -> nn.Module:
    """Running statistics, γ and β at random; some channels dead, some filters zero."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
                if rng.random() < 0.25:
                    module.weight[rng.randrange(len(module.weight))] = 0.0
        elif isinstance(module, nn.Conv2d) and rng.random() < 0.1:
            module.weight[0] = 0.0
    return model


def copies(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """Inputs of one call: networks write to theirs."""
    return [t.clone() for t in tensors]


def distance(a: Any, b: Any) -> float:
    """The largest difference of outputs, relative to their size."""
    pairs = zip(outputs(a), outputs(b), strict=True)
    return max(float((x - y).detach().abs().max() / y.detach().abs().max().clamp(min=1e-3)) for x, y in pairs)


def check(drawn: Draw) -> str:
    """What became of a draw: "kept", "refused", or "unfit" if the network itself doesn't run or train.

    Raises:
        AssertionError: with what doesn't hold. Any other exception is a fault, too.
    """
    model, example = drawn.model, drawn.example
    one = tuple(t[:1] for t in example)
    try:
        with torch.no_grad():
            expected = model(*copies(example))
            noise = distance(model(*(t * (1 + 1e-15) for t in example)), expected)
        trained = copy.deepcopy(model).train()
        trained(*(torch.cat([t, t]).requires_grad_().clone() for t in example)).square().sum().backward()
    except RuntimeError:  # changes in place of what gradients need
        return "unfit"
    if not bool(expected.isfinite().all()) or float(expected.abs().max()) > 1e6 or noise > 1e-10:
        return "unfit"
    _check_exact_rows(model, example)
    try:
        converted = normprop.convert(model, example=example)
    except NormPropError:
        return "refused"
    with torch.no_grad():
        assert distance(converted(*copies(example)), expected) <= max(1e-8, 1e3 * noise), "another function"
        alone = converted(*copies(one))
        assert distance(alone, outputs(converted(*copies(example)))[0][:1]) <= max(1e-9, 1e3 * noise), "depends on the batch"
    for network in (converted, normprop.convert(model, example=example, preserve=False)):
        loss = network.train()(*copies(one)).square().sum()
        if loss.requires_grad:
            loss.backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is None or bool(parameter.grad.isfinite().all()), f"gradient of {name}"
    converted.eval()
    try:
        folded = normprop.fold(converted)
    except NormPropError:
        return "kept, not folded"
    with torch.no_grad():
        assert distance(folded(*copies(example)), expected) <= max(1e-8, 1e3 * noise), "folded to another function"
    return "kept"


def _measured(model: nn.Module, example: tuple[Tensor, ...]) -> normprop.Report:
    """A report with what 4,000 random samples measured."""
    data = tuple(torch.randn(4000, *t.shape[1:], dtype=torch.float64) for t in example)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return normprop.inspect(model, [data], example=example)


def _check_exact_rows(model: nn.Module, example: tuple[Tensor, ...]) -> None:
    """What a report calls exact is measured, as far as its assumptions hold: up to the first linear layer."""
    try:
        report = _measured(model, example)
    except NormPropError:
        return
    behind: dict[str, tuple[int, bool]] = {}  # linear layers upstream, and whether all is exact
    for place, row in enumerate(report):
        above = [behind.get(name, (2, False)) for name in row.inputs]
        linear = row.operation in ("Conv2d", "ConvTranspose2d")
        layer: Any = model.get_submodule(row.path) if linear else None
        borders = linear and layer.padding != (0, 0) and layer.padding_mode == "zeros"  # which are not counted
        taken = sum(n for n, _ in above) + linear if above else 0
        honest = row.standing in ("input", "exact") and all(known for _, known in above)
        if row.operation == "BatchNorm2d" or borders or (taken and len(above) > 1):
            honest = False
        behind[row.name] = taken, honest
        if not honest or taken > 1 or row.measured is None or row.standing == "input":
            continue
        if (worst := _off(row)) > 1.0:  # by chance, where tails are heavy: other samples are off otherwise
            again = torch.tensor([_off(list(_measured(model, example))[place], signed=True) for _ in range(8)])
            chance = 4 * float(again.std()) / 8**0.5
            assert abs(float(again.mean())) <= max(1.0, chance), f"{row.operation} is called exact, and off by {worst:.1f}"


def _off(row: Any, *, signed: bool = False) -> float:
    """How far what was measured is from the prediction, in units of what 4,000 samples may be off."""
    mean, var = row.predicted.mean, row.predicted.var
    size = (var + mean.square()).mean().sqrt() + 1e-12
    off = torch.cat([t.flatten() for t in ((row.measured.mean - mean) / size / 0.15,
                                           (row.measured.var - var) / size.square() / 0.35)])  # fmt: skip
    largest = off[off.abs().argmax()]
    return float(largest if signed else largest.abs())
