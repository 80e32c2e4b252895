"""Effective weights in few passes: one autograd function for what a site makes of a layer's weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

# Rows are handled in blocks that stay in a core's cache between one operation and the next: 2¹⁷ numbers, half a megabyte.
_BLOCK = 1 << 17


class EffectiveWeight(torch.autograd.Function):
    """``W_eff = c f`` and ``b = β − (E + d) f`` with ``c = W − w̄`` (or W), ``f = γ/√(kV)``, ``E = Σ c m``, ``V = Σ c² v``.

    Everything is in rows: ``(groups, filters, fan-in)``. The backward is written out (derived):

        q  = ∂L/∂f = Σ G c − g (E + d)        ∂L/∂E = −g f        ∂L/∂V = −½ q f / V        ∂L/∂γ = q/√(kV)        ∂L/∂β = g
        ∂L/∂c = f G + m ∂L/∂E + 2 v c ∂L/∂V,  less its mean over each filter where filters are centred
        ∂L/∂m = Σ_o c ∂L/∂E                   ∂L/∂v = Σ_o c² ∂L/∂V

    for G = ∂L/∂W_eff and g = ∂L/∂b. It is made of differentiable operations, so that it can be differentiated again and
    batched by vmap.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        rows: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor, shift: Tensor, scale: Tensor, center: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See the class; returns the effective rows, the bias, and E and V for the backward."""
        effective, bias, first, second = [], [], [], []
        for part in _blocks(rows):
            c = _centred(rows[:, part], center)
            e = (c @ mean.unsqueeze(-1)).squeeze(-1)
            v = _dot(c * var.unsqueeze(1), c)
            f = gamma[:, part] * _inverse_root(scale[:, part], v)
            effective.append(c * f.unsqueeze(-1))
            bias.append(beta[:, part] - (e + shift[:, part]) * f)
            first.append(e)
            second.append(v)
        return _joined(effective), _joined(bias), _joined(first), _joined(second)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep the inputs and the two statistics."""
        rows, mean, var, gamma, _, shift, scale, center = inputs
        ctx.save_for_backward(rows, mean, var, gamma, shift, scale, *output[2:])
        ctx.mark_non_differentiable(*output[2:])
        ctx.center = center  # type: ignore[attr-defined]  # a context takes any attribute

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """See the class."""
        rows, mean, var, gamma, shift, scale, first, second = ctx.saved_tensors
        G, g = grads[:2]
        d_rows, d_gamma = [], []
        d_mean: Any = 0.0
        d_var: Any = 0.0
        for part in _blocks(rows):
            c, G_part, g_part = _centred(rows[:, part], ctx.center), G[:, part], g[:, part]
            if torch.is_grad_enabled():  # to be differentiated again: E and V as functions of their inputs
                e, v = (c @ mean.unsqueeze(-1)).squeeze(-1), _dot(c * var.unsqueeze(1), c)
            else:
                e, v = first[:, part], second[:, part]
            inverse = _inverse_root(scale[:, part], v)
            f = gamma[:, part] * inverse
            q = _dot(G_part, c) - g_part * (e + shift[:, part])
            d_e = -g_part * f
            d_v = torch.where(v > 0, -0.5 * q * f / torch.where(v > 0, v, 1.0), 0.0)
            scaled = c * (2.0 * d_v).unsqueeze(-1)
            d_c = torch.addcmul(d_e.unsqueeze(-1) * mean.unsqueeze(1), scaled, var.unsqueeze(1))
            d_c = torch.addcmul(d_c, G_part, f.unsqueeze(-1))
            d_rows.append(_centred(d_c, ctx.center))
            d_gamma.append(q * inverse)
            if ctx.needs_input_grad[1]:
                d_mean = d_mean + (d_e.unsqueeze(1) @ c).squeeze(1)
            if ctx.needs_input_grad[2]:
                d_var = d_var + 0.5 * (scaled * c).sum(1)
        none = None
        return (
            _joined(d_rows),
            d_mean if ctx.needs_input_grad[1] else none,
            d_var if ctx.needs_input_grad[2] else none,
            _joined(d_gamma),
            g,
            none,
            none,
            none,
        )


def _blocks(rows: Tensor) -> list[slice]:
    """Filters in runs of about `_BLOCK` numbers; all at once where there are several groups."""
    groups, filters, fan_in = rows.shape
    if groups > 1 or filters * fan_in <= _BLOCK or torch.compiler.is_compiling():
        return [slice(None)]
    step = max(1, _BLOCK // fan_in)
    return [slice(start, start + step) for start in range(0, filters, step)]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _centred(rows: Tensor, center: bool) -> Tensor:
    return rows - rows.mean(-1, keepdim=True) if center else rows


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Row by row; the product of a block stays in the cache, and a batched matmul of single rows is ten times slower."""
    return (a * b).sum(-1)


def _inverse_root(scale: Tensor, var: Tensor) -> Tensor:
    """``1/√(kV)``; a variance of zero (a filter of zeros) counts as one."""
    return (scale * torch.where(var > 0, var, 1.0)).rsqrt()
