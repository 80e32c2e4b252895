"""Proposition 1: the bound holds, and its parts are what their definitions say."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normprop.errors import NormPropError
from normprop.inspection import bound
from normprop.inspection.bound import canonical_error_bound
from normprop.nn import ConvTranspose2d


def by_definition(rows, sigma):
    """Both sides of Proposition 1, pair by pair."""
    count = len(rows)
    norms = [float(row.norm()) for row in rows]
    coherence, error, pairs = 0.0, 0.0, 0.0
    for i in range(count):
        for j in range(count):
            if i != j:
                dot = float(rows[i] @ rows[j])
                error += (sigma**2 * dot) ** 2
                pairs += norms[i] ** 2 * norms[j] ** 2
                if norms[i] * norms[j] > 0:
                    coherence = max(coherence, abs(dot) / (norms[i] * norms[j]))
    return sigma**2 * coherence * math.sqrt(pairs), coherence, math.sqrt(error)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 7),
    st.integers(1, 7),
    st.floats(0.1, 10),
    st.sampled_from(["normal", "sparse", "repeated", "uneven"]),
    st.integers(0, 2**31),
)
def test_matches_its_definition_and_bounds_the_error(count, columns, sigma, kind, seed):
    rows = torch.randn(count, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if kind == "sparse":
        rows[::2] = 0
    elif kind == "repeated":
        rows[:] = rows[0] * torch.arange(1, count + 1, dtype=torch.float64)[:, None]
    elif kind == "uneven":
        rows *= 10.0 ** torch.linspace(-6, 6, count, dtype=torch.float64)[:, None]
    result = canonical_error_bound(rows, sigma=sigma)
    bound, coherence, error = by_definition(rows, sigma)
    assert result.bound == pytest.approx(bound, rel=1e-10, abs=1e-14)
    assert result.coherence == pytest.approx(coherence, rel=1e-10, abs=1e-14)
    assert result.error == pytest.approx(error, rel=1e-10, abs=1e-14)
    assert result.error <= result.bound * (1 + 1e-12)
    torch.testing.assert_close(result.alpha, sigma**2 * rows.square().sum(1))


def test_alpha_is_the_closest_diagonal():
    rows = torch.randn(6, 4, dtype=torch.float64)
    covariance = rows @ rows.T
    result = canonical_error_bound(rows)
    assert torch.linalg.norm(covariance - result.alpha.diag()).item() == pytest.approx(result.error)
    for _ in range(20):
        other = result.alpha + 0.1 * torch.randn(6, dtype=torch.float64)
        assert torch.linalg.norm(covariance - other.diag()).item() >= result.error


def test_is_tight_for_two_rows_and_zero_for_orthogonal_ones():
    two = canonical_error_bound(torch.randn(2, 9))
    assert two.error == pytest.approx(two.bound, rel=1e-12)
    orthogonal = canonical_error_bound(torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0])
    assert orthogonal.bound < 1e-13


def test_blocks_change_nothing(monkeypatch):
    weight = torch.randn(50, 20)
    whole = canonical_error_bound(weight)
    monkeypatch.setattr(bound, "_BLOCK_ELEMENTS", 7 * 50)
    blocked = canonical_error_bound(weight)
    assert blocked.error == pytest.approx(whole.error, rel=1e-13)
    assert blocked.coherence == pytest.approx(whole.coherence, rel=1e-13)


def test_ten_thousand_rows_fit():
    result = canonical_error_bound(torch.randn(10_000, 8))
    assert 0 < result.error <= result.bound


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [torch.nn.Conv2d, torch.nn.ConvTranspose2d, ConvTranspose2d])
def test_layers_are_their_filters(kind, groups):
    layer = kind(4, 6, 3, groups=groups)
    rows = torch.zeros(6, 4, 3, 3, dtype=torch.float64)  # every filter over all inputs, zero outside its group
    for group in range(groups):
        inputs = slice(group * 4 // groups, (group + 1) * 4 // groups)
        for local in range(6 // groups):
            filter = group * 6 // groups + local
            block = layer.weight[inputs, local] if "Transpose" in kind.__name__ else layer.weight[filter]
            rows[filter, inputs] = block.detach().double()
    bound, coherence, error = by_definition(rows.flatten(1), 1.0)
    result = canonical_error_bound(layer)
    assert (result.bound, result.coherence, result.error) == pytest.approx((bound, coherence, error), rel=1e-10)
    torch.testing.assert_close(result.alpha, rows.flatten(1).square().sum(1))


@pytest.mark.parametrize("weight", [torch.zeros(3, 4), torch.randn(1, 5), torch.randn(3, 1), torch.zeros(0, 4)])
def test_degenerate_weights(weight):
    result = canonical_error_bound(weight)
    assert math.isfinite(result.bound)
    assert result.error <= result.bound * (1 + 1e-12)


@pytest.mark.parametrize(
    "bad", [torch.zeros(3), torch.zeros(2, 2, dtype=torch.int64), torch.nn.ReLU(), torch.nn.LayerNorm(3)]
)
def test_refuses_what_has_no_filters(bad):
    with pytest.raises(NormPropError, match="two dimensions"):
        canonical_error_bound(bad)
