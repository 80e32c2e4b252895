"""What an activation does to a Gaussian: names, modules, your own function, and gradients through all of it.

python examples/moments.py
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import normprop


def main() -> None:
    print("Remark 1 of the paper: ReLU of a standard normal")
    relu = normprop.moments("relu")
    print(f"  mean {float(relu.mean):.6f} = 1/√(2π) = {1 / math.sqrt(2 * math.pi):.6f}")
    print(f"  std  {float(relu.var) ** 0.5:.6f} = √(½(1 − 1/π)) = {math.sqrt(0.5 * (1 - 1 / math.pi)):.6f}")

    print("\nThe gain torch.nn.init.calculate_gain lacks: 1/std, and what standardising does to gradients")
    for name in ("relu", "gelu", "silu", "mish", "elu", "hardswish", "softplus", "tanh"):
        m = normprop.moments(name)
        print(f"  {name:10} gain {float(m.gain):.4f}   Jacobian {float((m.slope / m.var).sqrt()):.4f}")

    print("\nMoments follow the mean and standard deviation of the input, as γ and β move them")
    for mean, std in ((0.0, 1.0), (-0.5, 1.0), (0.0, 0.5), (1.0, 2.0)):
        m = normprop.moments(nn.GELU(), mean, std)
        print(f"  GELU of N({mean:4}, {std}²): mean {float(m.mean):7.4f}, variance {float(m.var):.4f}")

    def soft_step(u: Tensor) -> Tensor:
        return torch.where(u > 1, 2 * u - 1, u.clamp(min=-0.5))  # kinks at 1 and −0.5

    print("\nAny elementwise callable: kinks are found, the integral is split there, the error is stated")
    m = normprop.moments(soft_step)
    sample = soft_step(torch.randn(1_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    print(f"  mean {float(m.mean):.6f}, variance {float(m.var):.6f}, error below {float(m.error):.0e}")
    print(f"  a million samples: {float(sample.mean()):.4f}, {float(sample.var()):.4f}")

    print("\nDifferentiable: the β at which a SiLU's output has mean zero, by Newton's method")
    beta = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    for _ in range(6):
        mean = normprop.moments("silu", beta, 1.0).mean
        (slope,) = torch.autograd.grad(mean, beta)
        beta = (beta - mean / slope).detach().requires_grad_()
    check = normprop.moments("silu", beta.item(), 1.0)
    print(f"  β = {beta.item():.6f}: mean {check.mean.item():.1e}")


if __name__ == "__main__":
    main()
