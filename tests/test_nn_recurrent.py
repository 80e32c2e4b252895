"""The recurrent layers against their equations written per unit and per step, and their stationary moments."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from scipy import integrate
from torch.func import functional_call, grad, vmap

from normprop import nn
from normprop.errors import NormPropError
from normprop.nn.filters import filter_norms, filter_view

KINDS = {"rnn": nn.RNN, "relu": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k), "lstm": nn.LSTM, "gru": nn.GRU}
every_kind = pytest.mark.parametrize("kind", KINDS)


def sigmoid(u):
    return 1 / (1 + math.exp(-u))


def relu(u):
    return max(u, 0.0)


def expect(f, std):
    density = lambda z: math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    return sum(integrate.quad(lambda z: f(std * z) * density(z), a, b, epsabs=1e-13)[0] for a, b in ((-12, 0), (0, 12)))


def mean_and_variance(f, std):
    mean = expect(f, std)
    return mean, expect(lambda u: (f(u) - mean) ** 2, std)


def random_network(kind, layers=2, **options):
    torch.manual_seed(0)
    model = KINDS[kind](3, 4, layers, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def reference(model, kind, sequence):
    """One sample through all layers, unit by unit."""
    size, gain = model.hidden_size, model.gain_init
    std = math.sqrt(2) * gain
    for layer in range(model.num_layers):
        p = {
            n: getattr(model, f"{n}_l{layer}").detach().numpy()
            for n in ("weight_ih", "weight_hh", "gain_ih", "gain_hh", "bias")
        }
        h, c, outputs = np.zeros(size), np.zeros(size), []
        for x in sequence:
            drive, recurrent = [], []
            for row in range(len(p["bias"])):
                w, u = p["weight_ih"][row], p["weight_hh"][row]
                drive.append(p["gain_ih"][row] * float(w @ x) / math.sqrt(float(w @ w)) + p["bias"][row])
                recurrent.append(p["gain_hh"][row] * float(u @ h) / math.sqrt(float(u @ u)))
            new = np.zeros(size)
            for j in range(size):
                at = [drive[row] + recurrent[row] for row in range(j, len(drive), size)]
                if kind in ("rnn", "relu"):
                    f = math.tanh if kind == "rnn" else relu
                    mean, var = mean_and_variance(f, std)
                    new[j] = (f(at[0]) - mean) / math.sqrt(var)
                elif kind == "lstm":
                    mean, var = mean_and_variance(sigmoid, std)
                    var_c = mean_and_variance(math.tanh, std)[1] * (var + mean**2) / (1 - var - mean**2)
                    var_h = mean_and_variance(math.tanh, 1.0)[1] * (var + mean**2)
                    c[j] = sigmoid(at[1]) * c[j] + sigmoid(at[0]) * math.tanh(at[2])
                    gain_cell = getattr(model, f"gain_cell_l{layer}")[j].item()
                    new[j] = sigmoid(at[3]) * math.tanh(gain_cell * c[j] / math.sqrt(var_c)) / math.sqrt(var_h)
                else:
                    second = expect(lambda u: sigmoid(u) ** 2, std)
                    rest = expect(lambda u: (1 - sigmoid(u)) ** 2, std)
                    var_n = mean_and_variance(math.tanh, gain * math.sqrt(1 + second))[1]
                    z = sigmoid(at[1])
                    n = math.tanh(drive[2 * size + j] + sigmoid(at[0]) * recurrent[2 * size + j])
                    new[j] = (1 - z) * n / math.sqrt(var_n * rest / (1 - second)) + z * h[j]
            h = new
            outputs.append(h)
        sequence = outputs
    return np.stack(outputs)


@every_kind
def test_equals_its_equations(kind):
    model = random_network(kind)
    x = torch.randn(3, 3, dtype=torch.float64)
    np.testing.assert_allclose(model(x)[0].detach().numpy(), reference(model, kind, x.numpy()), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(("kind", "tolerance"), [("rnn", 0.01), ("relu", 0.03), ("lstm", 0.06), ("gru", 0.07)])
def test_states_have_unit_variance_in_the_long_run(kind, tolerance):
    """Approximate by nature: gates aren't quite independent, and h isn't quite Gaussian."""
    torch.manual_seed(0)
    model = KINDS[kind](64, 256)
    with torch.no_grad():
        output = model(torch.randn(60, 32, 64))[0][30:]
    assert output.var().item() == pytest.approx(1, abs=tolerance)
    assert abs(output.mean().item()) < 0.1


@every_kind
def test_shapes_batches_and_states(kind):
    model = random_network(kind)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    output, state = model(x)
    first = copy.deepcopy(model)
    first.batch_first = True
    torch.testing.assert_close(first(x.transpose(0, 1))[0].transpose(0, 1), output)
    for i in range(2):
        torch.testing.assert_close(model(x[:, i])[0], output[:, i])
    early, middle = model(x[:2])
    late, last = model(x[2:], middle)
    torch.testing.assert_close(torch.cat([early, late]), output)
    for a, b in zip(last, state, strict=True):
        torch.testing.assert_close(a, b)
    part = model(x[:2, 0])[1]
    torch.testing.assert_close(model(x[2:, 0], part)[0], output[2:, 0])
    assert not list(model.buffers())
    assert torch.equal(pickle.loads(pickle.dumps(model)).eval()(x)[0], output)


@every_kind
def test_scale_gradients_and_filters(kind):
    model = random_network(kind)
    x = torch.randn(4, 3, 3, dtype=torch.float64)
    expected = model(x)[0]
    with torch.no_grad():
        for weight, channel_dim, groups in model.filters():
            weight.mul_(10 * torch.rand_like(filter_norms(*filter_view(weight, channel_dim, groups))) + 0.1)
    torch.testing.assert_close(model(x)[0], expected, rtol=1e-9, atol=1e-10)
    parameters = dict(model.named_parameters())
    loss = lambda p, sample: functional_call(model, p, (sample[:, None],))[0].square().sum()
    per_sample = vmap(grad(loss), (None, 1))(parameters, x)
    model(x)[0].square().sum().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(per_sample[name].sum(0), parameter.grad, rtol=1e-9, atol=1e-10)
    model.reset_parameters()
    for weight, channel_dim, groups in model.filters():
        norms = filter_norms(*filter_view(weight, channel_dim, groups))
        torch.testing.assert_close(norms, torch.ones_like(norms))


def test_compiles_whole():
    model = nn.LSTM(3, 4)
    x = torch.randn(3, 2, 3)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], model(x)[0])


def test_repr():
    assert repr(nn.GRU(3, 4, 2, False, True)) == "GRU(3, 4, num_layers=2, bias=False, batch_first=True, gain_init=1.0)"


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: nn.RNN(3, 4, nonlinearity="gelu"), "gelu"),
        (lambda: nn.GRU(0, 4), "1 or more"),
        (lambda: nn.GRU(3, 4, gain_init=0.0), "positive"),
        (lambda: nn.LSTM(3, 4, cell_gain_init=-1.0), "positive"),
        (lambda: nn.LSTM(3, 4)(torch.zeros(5, 2, 4)), "last of size 3"),
        (lambda: nn.LSTM(3, 4)(torch.zeros(5, 2, 3, dtype=torch.int64)), "int64"),
        (lambda: nn.LSTM(3, 4)(torch.nn.utils.rnn.pack_sequence([torch.zeros(2, 3)])), "packed"),
    ],
)
def test_bad_input_is_refused(build, words):
    with pytest.raises(NormPropError, match=words):
        build()
