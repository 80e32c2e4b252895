"""Every rule through its real operation: by sampling, in its derivative, at its limits."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normprop
from normprop import Moments, NormPropError
from normprop.graph.node import Node, map_nodes
from normprop.graph.walk import Walk
from normprop.rules import TABLE
from normprop.rules.shape import regroup
from normprop.rules.table import Rule, RuleTable, describe
from tests.rules import (
    activations,
    arithmetic,
    attention,
    drawn,
    libraries,
    linear,
    normalization,
    pooling,
    shape,
    spectral,
    stochastic,
)  # fmt: skip
from tests.rules.case import Case, evaluate, flat, measured

FAMILIES = (
    activations,
    arithmetic,
    attention,
    drawn,
    libraries,
    linear,
    normalization,
    pooling,
    shape,
    spectral,
    stochastic,
)
CASES: dict[str, Case] = {
    f"{family.__name__.rpartition('.')[2]}-{name}": case for family in FAMILIES for name, case in family.CASES.items()
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


@each_case
def test_sampling(case: Case) -> None:
    torch.manual_seed(3)
    predicted = flat(evaluate(case.walk(), case.inputs()))
    with torch.no_grad():
        outputs = flat(case.network()(*case.sample(case.samples)))
    outputs = [y for y in outputs if numeric(y)]
    assert len(predicted) == len(outputs) > 0
    for moments, y in zip(predicted, outputs, strict=True):
        compare(case, moments, y)


def numeric(y: Tensor) -> bool:
    """Whether a tensor has moments: not one of indices."""
    return y.is_floating_point() or y.dtype == torch.bool


def compare(case: Case, predicted: Moments, y: Tensor) -> None:
    mean, mean_error, var, var_error = (t.detach() for t in measured(y, predicted))
    expected, expected_var = (t.detach().expand(mean.shape) for t in (predicted.mean, predicted.var))
    if case.exact:
        torch.testing.assert_close(mean, expected, rtol=1e-6, atol=float(5 * mean_error.max()) + 1e-12)
        assert bool(((mean - expected).abs() <= 5 * mean_error + 1e-9).all())
        assert bool(((var - expected_var).abs() <= 5 * var_error + 1e-9).all()), (var / expected_var, var_error)
    else:
        size = torch.sqrt(expected_var + expected.square())
        var = (var - (mean - expected).square()).clamp(min=0.0)
        assert float(((mean - expected).abs() / size).max()) <= case.tolerance
        assert float(((var / expected_var).sqrt() - 1).abs().max()) <= case.tolerance


@each_case
def test_derivative(case: Case) -> None:
    """Along a random direction of the input's moments and all parameters, against a central difference."""
    walk = case.walk()
    leaves = [t.detach().clone().requires_grad_() for m in case.inputs() for t in (m.mean, m.var)]
    parameters = [p for p in walk.model.parameters() if p.requires_grad]
    torch.manual_seed(5)

    def value() -> Tensor:
        torch.manual_seed(11)
        given = [Moments(*leaves[i : i + 2]) for i in range(0, len(leaves), 2)]
        return sum((torch.rand_like(t) * t).sum() for m in flat(evaluate(walk, given)) for t in (m.mean, m.var))

    variables = leaves + parameters
    if not value().requires_grad:  # a normaliser's output, or a constant, which no input changes
        before = value()
        with torch.no_grad():
            for leaf in leaves:
                leaf += leaf.abs()
        assert torch.equal(value(), before)
        return
    gradients = torch.autograd.grad(value(), variables, allow_unused=True, materialize_grads=True)
    directions = [torch.randn_like(v) * (0.1 if v is p else 1.0) for v in variables for p in [leaves[0]]]
    slope = float(sum((g * d).sum() for g, d in zip(gradients, directions, strict=True)))
    step = 1e-5
    with torch.no_grad():
        ends = []
        for sign in (1, -2):
            for v, d in zip(variables, directions, strict=True):
                v += sign * step * d
            ends.append(float(value()))
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-4, abs=1e-6)


@each_case
def test_form(case: Case) -> None:
    """Rank and broadcasting, purity, and finite values and gradients without variance and with much of it."""
    walk = case.walk()
    shapes = [v.shape for v in flat(map_nodes(walk.record.output, lambda n: n.value)) if numeric(v)]
    for factor in (1.0, 0.0, 1e-12, 30.0):
        given = [Moments(m.mean.clone().requires_grad_(), (factor * m.var).requires_grad_()) for m in case.inputs()]
        before = [(m.mean.detach().clone(), m.var.detach().clone()) for m in given]
        first, second = (flat(evaluate(walk, given)) for _ in range(2))
        for moments, again, size in zip(first, second, shapes, strict=True):
            for tensor in (moments.mean, moments.var):
                assert tensor.dim() == len(size)
                assert all(had in (1, full) for had, full in zip(tensor.shape, size, strict=True))
                assert bool(tensor.isfinite().all())
            assert bool((moments.var >= -1e-9).all())
            assert torch.equal(moments.mean, again.mean)
            assert torch.equal(moments.var, again.var)
        results = [t for m in first for t in (m.mean, m.var) if t.requires_grad]
        if results:
            total = sum(t.sum() for t in results)
            inputs = [t for m in given for t in (m.mean, m.var)]
            for gradient in torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True):
                assert bool(gradient.isfinite().all())
        for m, (mean, var) in zip(given, before, strict=True):
            assert torch.equal(m.mean, mean)
            assert torch.equal(m.var, var)


def varied(case: Case) -> list[Moments]:
    """Input moments of a case that differ from position to position."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda shape: torch.rand(1, *shape, generator=generator, dtype=torch.float64)
    return [
        Moments(m.mean + 0.3 * draw(s), m.var * (0.5 + draw(s))) for m, s in zip(case.inputs(), case.shapes, strict=True)
    ]


@each_case
def test_positions_of_their_own(case: Case) -> None:
    """Where the input's moments differ by position, the output's have its sizes."""
    walk = case.walk()
    shapes = [v.shape for v in flat(map_nodes(walk.record.output, lambda n: n.value)) if numeric(v)]
    for moments, size in zip(flat(evaluate(walk, varied(case))), shapes, strict=True):
        for tensor in (moments.mean, moments.var):
            assert tensor.dim() == len(size)
            assert all(had in (1, full) for had, full in zip(tensor.shape, size, strict=True))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if name.startswith("shape-") and case.exact])
def test_moved_positions(name: str) -> None:
    """What moves elements moves the moments of every position with them."""
    case = CASES[name]
    given = varied(case)
    torch.manual_seed(4)
    samples = [m.mean + m.std * torch.randn(4000, *s, dtype=torch.float64) for m, s in zip(given, case.shapes, strict=True)]
    for moments, y in zip(flat(evaluate(case.walk(), given)), flat(case.network()(*samples)), strict=True):
        compare(case, moments, y.detach())


def keys_met(walk: Walk) -> Iterator[Any]:
    for node, rule in walk.rules.items():
        if node.data:
            yield from (key for key in TABLE if TABLE[key] is rule and names(key, walk, node))


def names(key: Any, walk: Walk, node: Node) -> bool:
    """Whether a node is an operation of that key."""
    if node.op == "module":
        kind = type(walk.module(node))
        return key is kind or key == f"{kind.__module__}.{kind.__qualname__}"
    return key == node.target or key == f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__name__', '')}"


def test_no_rule_without_a_case() -> None:
    """An operation of the table that no case meets has no test."""
    met = {key for case in CASES.values() for key in keys_met(case.walk())}
    # window_reverse stands for all that regroup; Python's operators and two functions are recorded as the methods they call.
    elsewhere = {nn.Embedding, torch.nn.functional.sigmoid, torch.nn.functional.tanh}
    elsewhere |= {k for k, rule in TABLE.items() if rule.function is regroup}
    elsewhere |= {k for k in TABLE if getattr(k, "__module__", "") == "_operator"}
    missing = [k for k, rule in TABLE.items() if k not in met | elsewhere and rule.standing != "unsupported"]
    assert [describe(k) for k in missing] == []


@pytest.mark.parametrize("key", [k for k, rule in TABLE.items() if rule.standing != "exact"], ids=describe)
def test_approximations_and_refusals_say_why(key: Any) -> None:
    assert TABLE[key].reason


def test_recurrent_layers_are_refused_with_the_reason() -> None:
    with pytest.raises(normprop.UnsupportedOpError, match="recurrence"):
        normprop.propagate(nn.Sequential(nn.LSTM(4, 4)))


def test_operations_have_the_names_that_are_imported() -> None:
    found = {describe(key) for key in (torch.nn.functional.max_pool2d, torch.nn.functional.gelu, torch.einsum, torch.conv2d)}
    assert found == {
        "torch.nn.functional.max_pool2d", "torch.nn.functional.gelu", "torch.einsum", "torch.conv2d"
    }  # fmt: skip
    assert describe(operator.matmul) == "operator.matmul"
    assert describe(torch.nn.functional.scaled_dot_product_attention) == "torch.nn.functional.scaled_dot_product_attention"
    assert describe(torch.special.expit) == "torch.special.expit"
    assert (describe(getattr), describe("relu"), describe(nn.ReLU)) == (
        "getattr",
        "Tensor.relu",
        nn.ReLU.__module__ + ".ReLU",
    )
    assert not [name for name in map(describe, TABLE) if "<" in name or "torch._C" in name or name.startswith("_")]


def test_a_second_registration_is_refused() -> None:
    with pytest.raises(NormPropError, match="already has a moment rule"):
        normprop.rule(nn.ReLU)(lambda module, x: x)
    with pytest.raises(NormPropError, match="must say why"):
        normprop.rule(nn.Bilinear, standing="approximate")


def test_a_subclass_inherits_only_a_forward_it_keeps() -> None:
    class Same(nn.ReLU):
        pass

    class Other(nn.ReLU):
        def forward(self, input: Tensor) -> Tensor:
            return input

    assert TABLE.for_module(Same()) is TABLE[nn.ReLU]
    assert TABLE.for_module(Other()) is None
    patched = nn.ReLU()
    patched.forward = lambda input: input  # type: ignore[method-assign]
    assert TABLE.for_module(patched) is None


def test_overrides_leave_the_table_alone() -> None:
    table = RuleTable({nn.ReLU: Rule(lambda module, x: x)})
    changed = table.with_overrides({nn.ReLU: lambda module, x: x.scaled(2.0), nn.Tanh: Rule(lambda module, x: x)})
    assert len(table) == 1
    assert len(changed) == 2
    assert changed[nn.ReLU] is not table[nn.ReLU]
