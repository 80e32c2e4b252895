"""The recurrent layers written from their equations, one sample, one unit, one step at a time, with SciPy's integrals."""

import functools
import itertools
import math

import numpy as np
from scipy import integrate


def sigmoid(u):
    return 1 / (1 + math.exp(-u))


def relu(u):
    return max(u, 0.0)


@functools.cache
def expect(f, mean, std, power=1):
    density = lambda z: math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    kink = -mean / std
    edges = sorted({-12.0, min(max(kink, -12.0), 12.0), 12.0})
    integrand = lambda z: f(mean + std * z) ** power * density(z)
    return sum(integrate.quad(integrand, a, b, epsabs=1e-13)[0] for a, b in itertools.pairwise(edges))


def moments(f, mean, var):
    """Mean, second moment and variance of f(u), u ~ N(mean, var)."""
    std = math.sqrt(var)
    first, second = expect(f, mean, std), expect(f, mean, std, 2)
    return first, second, second - first**2


def elman_constants(f, bias, var):
    mean, _, variance = moments(f, bias, var)
    return mean, math.sqrt(variance)


def lstm_constants(bias, var, gain):
    """Mean and std of σ(o) tanh(γ c/√Var c), and √Var c; lists in the order i, f, g, o."""
    (i1, i2, _), (f1, f2, _), (g1, g2, _), (o1, o2, _) = (
        moments(f, b, v) for f, b, v in zip((sigmoid, sigmoid, math.tanh, sigmoid), bias, var, strict=True)
    )
    # The fixed point of E c = E f E c + E i E g, and of E c² likewise, by iterating them.
    first, second = 0.0, 0.0
    for _ in range(10_000):
        first, second = f1 * first + i1 * g1, f2 * second + 2 * f1 * first * i1 * g1 + i2 * g2
    cell = math.sqrt(second - first**2)
    t1, t2, _ = moments(math.tanh, first, cell**2) if gain is None else moments(math.tanh, gain * first / cell, gain**2)
    return o1 * t1, math.sqrt(o2 * t2 - (o1 * t1) ** 2), cell


def gru_constants(bias_ih, bias_hh, var_ih, var_hh):
    """Mean and std of y; lists in the order r, z, n."""
    r1, r2, r_var = moments(sigmoid, bias_ih[0] + bias_hh[0], var_ih[0] + var_hh[0])
    z1, z2, _ = moments(sigmoid, bias_ih[1] + bias_hh[1], var_ih[1] + var_hh[1])
    at = bias_ih[2] + r1 * bias_hh[2]
    n1, _, n_var = moments(math.tanh, at, var_ih[2] + r2 * var_hh[2] + r_var * bias_hh[2] ** 2)
    var = 0.0
    for _ in range(10_000):
        var = (1 - 2 * z1 + z2) * n_var + z2 * var
    return n1, math.sqrt(var)


def reference(model, kind, sequence, h0=None, c0=None):
    """One sample `(L, input_size)` through all layers forwards: outputs of the last, and the last (h, c) of each."""
    size, finals = model.hidden_size, []
    for layer in range(model.num_layers):
        p = {
            name.removesuffix(f"_l{layer}"): q.detach().numpy()
            for name, q in model.named_parameters()
            if f"_l{layer}" in name
        }
        rows = len(p["gain_ih"])
        zero = np.zeros(rows)
        b_ih, b_hh = p.get("bias_ih", zero), p.get("bias_hh", zero)
        if model.variances == "follow":
            bias, var_ih, var_hh = (b_ih, b_hh), p["gain_ih"] ** 2, p["gain_hh"] ** 2
            gain_cell = p.get("gain_cell", [None] * size)
        else:
            first = np.zeros(rows)
            first[size : 2 * size] = {"lstm": getattr(model, "_open_bias", 0.0), "gru": model._open_bias}.get(kind, 0.0)
            bias = (first[:rows], zero)
            var_ih, var_hh = np.full(rows, model.gain_ih_init**2), np.full(rows, model.gain_hh_init**2)
            gain_cell = [model.gain_cell_init] * size if kind == "lstm" else None
        h = np.zeros(model._state_size()) if h0 is None else h0[layer]
        c, outputs = np.zeros(size) if c0 is None else c0[layer].copy(), []
        for x in sequence:
            drive, recurrent = [], []
            for row in range(rows):
                w, u = p["weight_ih"][row], p["weight_hh"][row]
                drive.append(p["gain_ih"][row] * float(w @ x) / math.sqrt(float(w @ w)) + b_ih[row])
                recurrent.append(p["gain_hh"][row] * float(u @ h) / math.sqrt(float(u @ u)) + b_hh[row])
            new = np.zeros(size)
            for j in range(size):
                mine = list(range(j, rows, size))
                at = [drive[row] + recurrent[row] for row in mine]
                means = [bias[0][row] + bias[1][row] for row in mine]
                vars_ = [var_ih[row] + var_hh[row] for row in mine]
                if kind in ("rnn", "relu"):
                    f = math.tanh if kind == "rnn" else relu
                    mean, std = elman_constants(f, means[0], vars_[0])
                    new[j] = (f(at[0]) - mean) / std
                elif kind == "lstm":
                    mean, std, cell = lstm_constants(means, vars_, gain_cell[j])
                    c[j] = sigmoid(at[1]) * c[j] + sigmoid(at[0]) * math.tanh(at[2])
                    inside = c[j] if model.gain_cell_init is None else p["gain_cell"][j] * c[j] / cell
                    new[j] = (sigmoid(at[3]) * math.tanh(inside) - mean) / std
                else:
                    lists = [[b[row] for row in mine] for b in (*bias, var_ih, var_hh)]
                    mean, std = gru_constants(*lists)
                    z = sigmoid(at[1])
                    n = math.tanh(drive[mine[2]] + sigmoid(at[0]) * recurrent[mine[2]])
                    new[j] = (1 - z) * (n - mean) / std + z * h[j]
            if "weight_hr" in p:
                new = np.array([float(w @ new) / math.sqrt(float(w @ w)) for w in p["weight_hr"]])
            h = new
            outputs.append(h)
        sequence = outputs
        finals.append((h, c))
    return np.stack(outputs), finals
