"""The layers against the equations, written with loops over filters and positions and sharing no code with them."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate

from normprop import nn

SIGMAS = {
    "relu": lambda u: np.maximum(u, 0.0),
    "gelu": lambda u: 0.5 * u * (1 + np.vectorize(math.erf)(u / math.sqrt(2))),
    "tanh": np.tanh,
    "silu": lambda u: u / (1 + np.exp(-u)),
    "prelu": lambda u: np.where(u > 0, u, 0.25 * u),
}
# What torch calls a padding mode, numpy calls by another name.
PADS = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def gaussian_moments(sigma, mean, std):
    """Mean and std of σ(u) for u ~ N(mean, std²) by adaptive quadrature, split at zero where σ may have a kink."""

    def expect(f):
        density = lambda u: math.exp(-0.5 * ((u - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))
        low, high = mean - 12 * std, mean + 12 * std
        cuts = sorted({low, high, *(c for c in (0.0, mean) if low < c < high)})
        spans = itertools.pairwise(cuts)
        return sum(integrate.quad(lambda u: f(u) * density(u), a, b, epsabs=0, epsrel=1e-12)[0] for a, b in spans)

    first = expect(lambda u: float(sigma(np.float64(u))))
    return first, math.sqrt(expect(lambda u: (float(sigma(np.float64(u))) - first) ** 2))


def constants(name):
    """c2 and c1: as printed in remarks 1 and 2, else by quadrature."""
    if name == "relu":
        return 1 / math.sqrt(2 * math.pi), math.sqrt(0.5 * (1 - 1 / math.pi))
    if name == "prelu":
        a = 0.25
        return (1 - a) / math.sqrt(2 * math.pi), math.sqrt(0.5 * ((1 + a**2) - (1 - a) ** 2 / math.pi))
    return gaussian_moments(SIGMAS[name], 0.0, 1.0)


def normalise(filters, responses, gain, bias, name, method, stretch=1.0):
    """Eqs 9, 11 and 12 for `responses[i]` = W_i * x, filter by filter."""
    outputs = []
    for i, filter in enumerate(filters):
        length = math.sqrt(sum(w * w for w in filter.ravel())) / stretch
        u = gain[i] * responses[i] / length + bias[i]
        c2, c1 = constants(name) if method == "paper" else gaussian_moments(SIGMAS[name], bias[i], abs(gain[i]))
        outputs.append((SIGMAS[name](u) - c2) / c1)
    return np.stack(outputs)


def correlate(x, filter, stride, dilation):
    """One filter over one padded input `(channels, *size)`: an explicit sum at every position."""
    kernel = filter.shape[1:]
    sizes = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[1:], kernel, stride, dilation, strict=True)]
    out = np.zeros(sizes)
    for position in itertools.product(*map(range, sizes)):
        for tap in itertools.product(*map(range, kernel)):
            at = tuple(p * s + t * d for p, s, t, d in zip(position, stride, tap, dilation, strict=True))
            for channel in range(x.shape[0]):
                out[position] += filter[(channel, *tap)] * x[(channel, *at)]
    return out


def randomise(layer, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) + 0.3)
        layer.gain.copy_(torch.randn(layer.gain.shape, generator=generator) * 0.5 + 1)
        if layer.bias is not None:
            layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator) * 0.5)
    return layer


def arrays(layer):
    weight, gain = layer.weight.detach().numpy(), layer.gain.detach().numpy()
    return weight, gain, np.zeros_like(gain) if layer.bias is None else layer.bias.detach().numpy()


@settings(deadline=None, max_examples=25)
@given(
    st.integers(2, 6),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from(sorted(SIGMAS)),
    st.sampled_from(["paper", "exact"]),
    st.integers(0, 1000),
)
def test_linear_is_equation_9(inputs, outputs, bias, name, method, seed):
    layer = randomise(nn.Linear(inputs, outputs, bias, dtype=torch.float64, activation=name, method=method), seed)
    x = torch.randn(3, inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    weight, gain, beta = arrays(layer)
    filters = [w - w.mean() if method == "exact" else w for w in weight]
    for row, output in zip(x.numpy(), layer(x), strict=True):
        responses = [sum(w * v for w, v in zip(filter, row, strict=True)) for filter in filters]
        expected = normalise(filters, responses, gain, beta, name, method)
        np.testing.assert_allclose(output.detach().numpy(), expected, rtol=1e-8, atol=1e-8)


CONVOLUTIONS = [
    (nn.Conv1d, (7,), {"kernel_size": 3, "padding": 1}),
    (
        nn.Conv1d,
        (9,),
        {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2, "groups": 2, "padding_mode": "circular"},
    ),
    (nn.Conv2d, (5, 6), {"kernel_size": 3}),
    (nn.Conv2d, (5, 6), {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2), "padding_mode": "replicate"}),
    (nn.Conv2d, (6, 5), {"kernel_size": (5, 3), "padding": "same", "dilation": (1, 2)}),
    (nn.Conv2d, (5, 5), {"kernel_size": 3, "padding": "same", "padding_mode": "reflect", "bias": False}),
    (nn.Conv2d, (5, 4), {"kernel_size": 2, "groups": 2, "padding": "valid"}),
    (nn.Conv2d, (4, 4), {"kernel_size": 3, "padding": 1, "groups": 4}),
    (nn.Conv2d, (3, 3), {"kernel_size": 1}),
    (nn.Conv3d, (3, 4, 3), {"kernel_size": (2, 3, 1), "padding": (0, 1, 0), "stride": (1, 2, 1)}),
]


@pytest.mark.parametrize("method", ["paper", "exact"])
@pytest.mark.parametrize("case", range(len(CONVOLUTIONS)))
def test_convolutions_are_equation_11(case, method):
    kind, size, arguments = CONVOLUTIONS[case]
    name = sorted(SIGMAS)[case % len(SIGMAS)]
    layer = randomise(kind(4, 4, **arguments, dtype=torch.float64, activation=name, method=method), case)
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    weight, gain, beta = arrays(layer)
    groups = arguments.get("groups", 1)
    # Depthwise filters keep their mean.
    filters = [w - w.mean() if method == "exact" and groups < 4 else w for w in weight]
    dims = len(size)
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        pads = [(t // 2, t - t // 2) for t in totals]
    elif layer.padding == "valid":
        pads = [(0, 0)] * dims
    else:
        pads = [(p, p) for p in layer.padding]
    for sample, output in zip(x.numpy(), layer(x), strict=True):
        padded = np.pad(sample, [(0, 0), *pads], mode=PADS[layer.padding_mode])
        responses = []
        for i, filter in enumerate(filters):
            first = i // (4 // groups) * (4 // groups)
            responses.append(correlate(padded[first : first + 4 // groups], filter, layer.stride, layer.dilation))
        expected = normalise(filters, responses, gain, beta, name, method)
        np.testing.assert_allclose(output.detach().numpy(), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("method", ["paper", "exact"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"kernel_size": 3},
        {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
        {"kernel_size": (2, 3), "stride": (2, 3), "groups": 2},
        {"kernel_size": 2, "stride": 1, "dilation": 2, "groups": 4, "bias": False},
    ],
)
def test_transposed_convolution_scatters_every_input(arguments, method):
    layer = randomise(nn.ConvTranspose2d(4, 8, **arguments, dtype=torch.float64, activation="relu", method=method))
    x = torch.randn(1, 4, 3, 4, dtype=torch.float64)
    weight, gain, beta = arrays(layer)
    groups = layer.groups
    per_in, per_out = 4 // groups, 8 // groups
    output = layer(x)[0].detach().numpy()
    filters, responses = [], []
    for i in range(8):
        group, local = divmod(i, per_out)
        inputs = range(group * per_in, (group + 1) * per_in)
        filter = np.stack([weight[c, local] for c in inputs])
        if method == "exact" and per_in > 1:
            filter = filter - filter.mean()
        response = np.zeros(output.shape[1:])
        for k, c in enumerate(inputs):
            for position in itertools.product(range(3), range(4)):
                for tap in itertools.product(*map(range, layer.kernel_size)):
                    at = tuple(
                        p * s + t * d - q
                        for p, s, t, d, q in zip(position, layer.stride, tap, layer.dilation, layer.padding, strict=True)
                    )
                    if all(0 <= a < n for a, n in zip(at, response.shape, strict=True)):
                        response[at] += x[0, c][position].item() * filter[(k, *tap)]
        filters.append(filter)
        responses.append(response)
    stretch = 1.0 if method == "paper" else math.sqrt(math.prod(layer.stride))
    expected = normalise(filters, responses, gain, beta, "relu", method, stretch)
    np.testing.assert_allclose(output, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", sorted(SIGMAS))
def test_gain_starts_at_the_inverse_of_the_jacobian(name):
    _, c1 = constants(name)
    slope = lambda u: (SIGMAS[name](u + 1e-6) - SIGMAS[name](u - 1e-6)) / 2e-6
    energy = gaussian_second_moment(slope)
    layer = nn.Linear(5, 3, activation=name, method="paper", dtype=torch.float64)
    torch.testing.assert_close(
        layer.gain.detach(), torch.full((3,), c1 / math.sqrt(energy), dtype=torch.float64), rtol=1e-4, atol=0
    )
    if name == "relu":
        assert 1 / layer.gain[0].item() == pytest.approx(1.211174, abs=1e-6)


def gaussian_second_moment(f):
    mean, std = gaussian_moments(f, 0.0, 1.0)
    return mean**2 + std**2


def test_prelu_slope_takes_part_in_the_constants():
    """Remark 2, and its derivative: o = (PReLU(u) − c2(a)) / c1(a)."""
    layer = nn.Linear(4, 3, activation="prelu", method="paper", dtype=torch.float64)
    x = torch.randn(5, 4, dtype=torch.float64)
    a = layer.activation.fn.weight
    u = x @ (layer.weight / layer.weight.norm(dim=1, keepdim=True)).T * layer.gain
    c2 = (1 - a) / math.sqrt(2 * math.pi)
    c1 = torch.sqrt(0.5 * ((1 + a**2) - (1 - a) ** 2 / math.pi))
    expected = (torch.where(u > 0, u, a * u) - c2) / c1
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
    (ours,) = torch.autograd.grad(layer(x).pow(3).sum(), a)
    (theirs,) = torch.autograd.grad(expected.pow(3).sum(), a)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
