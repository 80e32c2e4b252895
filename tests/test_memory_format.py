"""Channels last where gradients are right: oneDNN writes past its memory for some convolutions whose images lie so."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from normprop.errors import NormPropError
from normprop.lab.cost.workload import Workload
from normprop.lab.networks.memory_format import overrunning, to_channels_last
from normprop.lab.networks.models import build
from normprop.lab.networks.normalizers import NORMALIZERS, normalizer, realize

BUILT_IN = ["nin", "plain12", "resnet8", "resnet18", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110"]
WIDTHS = [0.05, 0.125, 0.25, 0.5, 0.75, 1.0]
SHAPE = (3, 16, 16)


def network(name, norm="batch", width=1.0):
    torch.manual_seed(0)
    chosen = normalizer(norm)
    return realize(build(name, shape=SHAPE, classes=3, norm=chosen, width=width), chosen, SHAPE)


def channels_last(x):
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


@torch.no_grad()
def formats(net, x):
    """Each convolution, and whether the images it gets lie channels last."""
    found, convolutions = [], [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    hooks = [m.register_forward_pre_hook(lambda m, args: found.append((m, channels_last(args[0])))) for m in convolutions]
    net(x)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", BUILT_IN)
def test_no_built_in_network_gives_a_narrow_strided_convolution_images_channels_last(name, width):
    found = formats(to_channels_last(network(name, width=width)), torch.randn(2, *SHAPE))
    for layer, last in found:
        assert not (last and layer.kernel_size == (1, 1) and layer.stride != (1, 1) and layer.in_channels < 16), layer
    if width == 1.0:
        assert all(last for _, last in found[1:]), "wide networks lie so, whatever the images do"


@pytest.mark.parametrize("norm", NORMALIZERS)
def test_whatever_normalises_it(norm):
    found = formats(to_channels_last(network("resnet8", norm, 0.25)), torch.randn(2, *SHAPE))
    assert found
    assert not any(last for _, last in found)


def test_elsewhere_than_on_a_cpu_nothing_overruns():
    assert not overrunning(nn.Conv2d(4, 8, 1, stride=2, device="meta"))


def run(code, instructions):
    """Run code in a process of its own, as on a processor that has these instructions: it may crash."""
    env = os.environ | {"ONEDNN_MAX_CPU_ISA": instructions, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300, check=False)
    assert result.returncode == 0, f"status {result.returncode}: {result.stderr[-2000:]}"


STEP = """
import copy, torch
from torch.nn import functional as F
from normprop.lab.training.processes import Processes
from normprop.lab.samples.images import Images
from normprop.lab.training.preparation import build_model, placed
from normprop.lab.training.recipe import Recipe

torch.manual_seed(0)
x, y = torch.randn(8, {size}, {size}, 3).permute(0, 3, 1, 2), torch.arange(8) % 2
group = Processes(torch.device("cpu"))
recipe = Recipe(model="resnet8", width=0.25, norm="{norm}", calibrate=0, beta=0.0).resolved()
model = build_model(recipe, Images("made", x, y, x, y, classes=2), group).train()
exact = copy.deepcopy(model).double().to(memory_format=torch.contiguous_format)
for net, samples in ((exact, x.double().contiguous()), (model, placed(x, group))):
    for _ in range(3):
        net.zero_grad()
        F.cross_entropy(net(samples), y).backward()
for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
    if p.requires_grad:
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=0, atol=1e-4 * float(q.grad.abs().max()), msg=name)
"""


@pytest.mark.parametrize(("instructions", "size"), [("AVX2", 32), ("AVX512_CORE", 64)])
@pytest.mark.parametrize("norm", ["batch", "normprop"])
def test_gradients_are_those_of_double_precision(instructions, size, norm):
    run(STEP.format(size=size, norm=norm), instructions)


LAYERS = """
import itertools, torch
from torch import nn
from normprop.lab.networks.memory_format import overrunning

def gradient(layer, x):
    layer.zero_grad()
    out = layer(x)
    out.backward(torch.ones_like(out).cumsum(-1))
    return layer.weight.grad.clone()

kinds = [
    lambda i, size, stride: nn.Conv2d(i, 8, size, stride, size // 2),
    lambda i, size, stride: nn.ConvTranspose2d(8, i, size, stride, output_padding=stride - 1),
    lambda i, size, stride: nn.Conv2d(i, i, size, stride, groups=i),
]
tried = 0
for make, i, size, stride in itertools.product(kinds, range(1, 19), (1, 3), (1, 2)):
    torch.manual_seed(0)
    layer = make(i, size, stride)
    if not overrunning(layer):
        x = torch.randn(2, layer.in_channels, 64, 64)
        expected = gradient(layer, x)
        found = gradient(layer, x.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()), msg=str(layer))
        tried += 1
assert tried > 150
"""


@pytest.mark.parametrize("instructions", ["AVX2", "AVX512_CORE"])
def test_what_is_not_overrunning_has_the_gradient_of_contiguous_images(instructions):
    run(LAYERS, instructions)


COMPILED = """
import torch
from torch import nn
from normprop.lab.cost.workload import Workload

torch.manual_seed(0)
net, x = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 8, 1, stride=2)), torch.randn(8, 3, 64, 64)
gradients = []
for run in (net, Workload("mine", compiled=True).run(net)):
    net.zero_grad()
    run(x).square().sum().backward()
    gradients.append(net[2].weight.grad.clone())
torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)
"""


@pytest.mark.parametrize("instructions", ["AVX2", "AVX512_CORE"])
def test_a_compiled_workload_has_the_gradient_of_the_network(instructions):
    run(COMPILED, instructions)


def test_bench_refuses_to_lay_a_narrow_network_channels_last():
    with pytest.raises(NormPropError, match=r"here stages\.1\.0\.skip\.0, stages\.2\.0\.skip\.0") as error:
        Workload("resnet8", width=0.25, channels_last=True).original()
    assert "Leave out --channels-last" in str(error.value)
    assert Workload("resnet8", channels_last=True).original()
