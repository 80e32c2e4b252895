"""An activation whose output is standardised for a Gaussian input."""

import functools
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from normprop.activations.activation_moments import moments
from normprop.activations.catalogue import canonical, torch_function
from normprop.errors import NormPropError
from normprop.nn.plain import plain_graph
from normprop.precision import accumulation_dtype

ActivationLike = str | torch.nn.Module | type[torch.nn.Module] | Callable[[Tensor], Tensor]

# No std, of a pre-activation or of what an activation makes of it, is taken to be smaller than this: a unit whose gain
# is zero or whose bias shuts it off puts out nearly zero, and its remains are not blown up to unit variance.
STD_FLOOR = 1e-3


class Activation(torch.nn.Module):
    """The activation `fn`, shifted and scaled so that a normal input comes out with mean 0 and variance 1.

    For the standard normal input u, the outer part of eq. 12 of Normalization Propagation (Arpit et al., 2016)::

        o = (fn(u) − c2) / c1        c2 = E fn(u)        c1² = Var fn(u)        u ~ N(0, 1)

    and for u ~ N(mean, std²), where `forward` is given them, the same with the moments at (mean, std). Gradients flow
    through the moments to all they are computed from: `mean`, `std` and the parameters of `fn` (a PReLU's slope).

    Args:
        fn: A name (`"relu"`), a module, a module class or an elementwise function. The constants of an `fn` without
            parameters are computed once, here, so it must stay what it is.

    Shapes:
        Any input; `mean` and `std` have one value, or one for each index of the input's dimension 1.

    Raises:
        NormPropError: `fn` is unknown, is no activation, or puts out a constant.

    >>> Activation("relu")(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-0.6833, -0.6833,  1.0295])
    """

    fn: Callable[[Tensor], Tensor]

    def __init__(self, fn: ActivationLike) -> None:
        super().__init__()
        self.fn = _callable(fn)
        self._constants: tuple[float, float] | None = None
        if next(self.parameters(), None) is None:
            mean, std = self.moments()
            self._constants = float(mean), float(std)
            if not float(std) > STD_FLOOR:
                raise NormPropError(
                    f"The activation {self._name()} puts out a constant for a standard normal input.\n"
                    "Standardising divides by its standard deviation; choose one that responds to its input."
                )

    def moments(self, mean: Tensor | None = None, std: Tensor | None = None) -> tuple[Tensor | float, Tensor | float]:
        """Mean and standard deviation of `fn(u)` for u ~ N(mean, std²), by default those at N(0, 1): c2 and c1."""
        if mean is None and std is None and self._constants is not None:
            return self._constants
        output = moments(self.fn, *self._input(mean, std))
        return output.mean, output.var.clamp_min(STD_FLOOR**2).sqrt()

    def jacobian(self) -> Tensor:
        """√(E fn′² / Var fn) at N(0, 1), the singular values of a layer at gain 1: 1.211174 for ReLU (eqs 4–7)."""
        output = moments(self.fn, *self._input(None, None))
        return (output.slope / output.var).sqrt()

    def forward(self, input: Tensor, mean: Tensor | None = None, std: Tensor | None = None) -> Tensor:
        """`fn(input)`, standardised for an input from N(mean, std²)."""
        output = self.fn(input)
        scale, shift = self.affine(input.ndim, mean, std)
        if isinstance(scale, Tensor) and isinstance(shift, Tensor):
            return torch.addcmul(shift.to(output.dtype), output, scale.to(output.dtype))
        # One elementwise pass of which autograd keeps nothing; torch.add wants a tensor first.
        return torch.add(output.new_full((), float(shift)), output, alpha=float(scale))

    def affine(
        self, ndim: int, mean: Tensor | None = None, std: Tensor | None = None
    ) -> tuple[Tensor | float, Tensor | float]:
        """`scale` and `shift` of `scale · fn(u) + shift`, for a u of `ndim` dimensions, its channels in dimension 1."""
        center, spread = self.moments(mean, std)
        scale, shift = 1 / spread, -center / spread
        if isinstance(scale, Tensor) and isinstance(shift, Tensor):
            shape = (-1, *[1] * (ndim - 2)) if shift.numel() > 1 else ()
            return scale.reshape(shape), shift.reshape(shape)
        return scale, shift

    def folded(self) -> torch.nn.Module:
        """The same function in plain torch: `fn`, then a multiplication and an addition of constants (a PReLU's too).

        Slopes per channel need an input of two dimensions.
        """
        with torch.no_grad():
            return plain_graph(None, self.fn, *self.affine(2))

    def extra_repr(self) -> str:
        """The name of a function; a module prints itself."""
        return "" if isinstance(self.fn, torch.nn.Module) else self._name()

    def _name(self) -> str:
        fn = self.fn.func if isinstance(self.fn, functools.partial) else self.fn
        return getattr(fn, "__name__", type(fn).__name__)

    def _input(self, mean: Tensor | None, std: Tensor | None) -> tuple[Tensor | float, Tensor | float]:
        """Mean and std as `moments` wants them: in float32 at least, std positive, shaped like `fn`'s parameters."""
        if mean is None and std is None:
            parameter = next(self.parameters(), None)
            if parameter is None:
                return 0.0, 1.0
            return torch.zeros_like(parameter, dtype=accumulation_dtype(parameter.dtype), requires_grad=False), 1.0
        return (
            0.0 if mean is None else mean.to(accumulation_dtype(mean.dtype)),
            1.0 if std is None else std.to(accumulation_dtype(std.dtype)).abs().clamp_min(STD_FLOOR),
        )


def _callable(fn: ActivationLike) -> Callable[[Tensor], Tensor]:
    """What computes the activation that `fn` stands for."""
    if isinstance(fn, type) and issubclass(fn, torch.nn.Module):
        return fn()
    if isinstance(fn, str):
        known = canonical(fn)
        name = fn if known is None else known[0]
        # The two that torch has no function of one argument for.
        modules = {"prelu": torch.nn.PReLU, "identity": torch.nn.Identity}
        return modules[name]() if name in modules else torch_function(name)
    if not callable(fn):
        raise NormPropError(
            f"{fn!r} is no activation.\nGive a name such as 'relu', a torch.nn module, or an elementwise function."
        )
    return cast(Callable[[Tensor], Tensor], fn)
