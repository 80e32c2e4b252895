"""Operations that move, join and take apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.rules.case import Case

_I = [(4, 4, 4)]
_ONE = {"samples": 4000}


def _into(index: Any, *, start: Callable[[Tensor], Tensor] = torch.clone, value: Any = None) -> Callable[[Tensor], Tensor]:
    """Writes the tanh of what an index picks, or a value, to that place of a tensor."""

    def write(x: Tensor) -> Tensor:
        y = start(x)
        y[index] = torch.tanh(x[index]) if value is None else value
        return y

    return write


def _through_a_view(x: Tensor) -> Tensor:
    y = x.clone()
    part, before = y[:, 1:3], y[:, 0]
    part.mul_(2.0)
    y[:, 0] += 0.5
    return torch.cat([y, before[:, None]], 1)


def _transformer(x: Tensor, angle: Tensor) -> Tensor:
    """A grid from a tensor that is filled piece by piece."""
    theta = torch.zeros(len(x), 2, 3, dtype=x.dtype)
    theta[:, :, :2] = 0.5 * torch.eye(2, dtype=x.dtype)
    theta[:, :, -1] = angle
    return F.affine_grid(theta, [len(x), 3, 4, 5], align_corners=False)


_WRITES: dict[str, Callable[[Tensor], Tensor]] = {
    "write channels": _into((slice(None), slice(1, 3))), "write an entry": _into((slice(None), 2)),
    "write positions": _into((..., slice(None, None, 2))), "write some positions": _into((slice(None), 1, ..., 0)),
    "write numbered": _into((slice(None), torch.tensor([3, 1]))), "write a number": _into((..., 0), value=0.7),
    "write a constant": _into((slice(None), slice(2)), value=torch.tensor([[[0.5]], [[-1.0]]], dtype=torch.float64)),
    "write to zeros": _into((slice(None), slice(3)), start=torch.zeros_like),
    "write to a constant": _into((slice(None), slice(3)), start=lambda x: torch.full(x.shape, 0.4, dtype=x.dtype)),
    "write through a view": _through_a_view,
}  # fmt: skip
_PADS: dict[str, Any] = {
    f"{kind}Pad{n}d": (getattr(nn, f"{kind}Pad{n}d")(1), n) for kind in ("Reflection", "Replication", "Circular")
    for n in (1, 2, 3)
} | {f"ZeroPad{n}d": (getattr(nn, f"ZeroPad{n}d")(1), n) for n in (1, 2, 3)} | {
    f"ConstantPad{n}d": (getattr(nn, f"ConstantPad{n}d")(1, 0.7), n) for n in (1, 2, 3)
}  # fmt: skip
_SAME = ("contiguous", "clone", "float", "detach", "double", "cpu", "half", "bfloat16", "requires_grad_")
_MOVES = {
    "permute": lambda x: x.permute(0, 2, 3, 1), "torch.permute": lambda x: torch.permute(x, (0, 2, 1, 3)),
    "transpose": lambda x: x.transpose(1, -1), "torch.transpose": lambda x: torch.transpose(x, 1, 2),
    "swapaxes": lambda x: x.swapaxes(1, 2), "torch.swapaxes": lambda x: torch.swapaxes(x, 1, 2),
    "swapdims": lambda x: x.swapdims(1, 2), "torch.swapdims": lambda x: torch.swapdims(x, 1, 2),
    "movedim": lambda x: x.movedim(1, -1), "torch.movedim": lambda x: torch.movedim(x, 1, -1),
    "moveaxis": lambda x: x.moveaxis(1, -1), "torch.moveaxis": lambda x: torch.moveaxis(x, 1, -1),
    "unsqueeze": lambda x: x.unsqueeze(-1), "torch.unsqueeze": lambda x: torch.unsqueeze(x, 2),
    "transpose_": lambda x: x.clone().transpose_(1, -1), "swapaxes_": lambda x: x.clone().swapaxes_(1, 2),
    "swapdims_": lambda x: x.clone().swapdims_(1, 2), "unsqueeze_": lambda x: x.clone().unsqueeze_(-1),
    "squeeze_": lambda x: x.unsqueeze(1).clone().squeeze_(1),
    "mT": lambda x: x.mT, "roll": lambda x: x.roll(1, 2), "torch.roll": lambda x: torch.roll(x, 1, 2),
    "flip": lambda x: x.flip(3), "torch.flip": lambda x: torch.flip(x, (2,)),
    "flatten": lambda x: x.flatten(1), "torch.flatten": lambda x: torch.flatten(x, 1), "tokens": lambda x: x.flatten(2),
    "view": lambda x: x.view(x.shape[0], 2, 2, 4, 4), "reshape": lambda x: x.reshape(-1, 4, 16),
    "torch.reshape": lambda x: torch.reshape(x, (x.size(0), 64)), "unflatten": lambda x: x.unflatten(1, (2, 2)),
    "torch.unflatten": lambda x: torch.unflatten(x, 1, (2, 2)), "Flatten": nn.Flatten(),
    "Unflatten": nn.Unflatten(1, (2, 2)),
    "view_as": lambda x: x.flatten(2).view_as(x), "reshape_as": lambda x: x.flatten(2).reshape_as(x),
    "squeeze": lambda x: x.unsqueeze(1).squeeze(1), "torch.squeeze": lambda x: torch.squeeze(x[:, :, :1], 2),
    "slices": lambda x: x[:, 1:3, ::2, 0], "ellipsis": lambda x: x[..., 1:], "new axis": lambda x: x[:, None],
    "an entry": lambda x: x[:, 2],
    "entries": lambda x: x[:, torch.tensor([3, 0, 0])], "entries of a mask": lambda x: x[..., torch.arange(4) > 0, :],
    "index_select": lambda x: x.index_select(1, torch.tensor([3, 0, 0])),
    "torch.index_select": lambda x: torch.index_select(x, dim=2, index=torch.tensor([1, 2])),
    "nan_to_num": lambda x: x.nan_to_num(), "torch.nan_to_num": lambda x: torch.nan_to_num(x, 0.5),
    "nan_to_num_": lambda x: x.clone().nan_to_num_(), "torch.nan_to_num_": lambda x: torch.nan_to_num_(x.clone()),
    "copy_": lambda x: torch.zeros_like(x).copy_(x[:, :1]),
    "narrow": lambda x: x.narrow(1, 1, 2), "torch.narrow": lambda x: torch.narrow(x, -1, 1, 2),
    "select": lambda x: x.select(1, 2), "torch.select": lambda x: torch.select(x, 2, 1),
    "unfold method": lambda x: x.unfold(2, 2, 1).unfold(1, 2, 2), "F.unfold": lambda x: F.unfold(x, (2, 2), stride=2),
    "Unfold": nn.Unfold(2), "Fold": nn.Sequential(nn.Unfold(2, stride=2), nn.Fold((4, 4), 2, stride=2)),
    "F.fold": lambda x: F.fold(F.unfold(x, 2, stride=2), (4, 4), 2, stride=2),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2), "PixelShuffle": nn.PixelShuffle(2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2), "PixelUnshuffle": nn.PixelUnshuffle(2),
    "channel_shuffle": lambda x: F.channel_shuffle(x, 2), "ChannelShuffle": nn.ChannelShuffle(2),
    "expand": lambda x: x[:, :, :1].expand(-1, -1, 3, -1), "expand_as": lambda x: x[:, :, :1].expand_as(x),
    "broadcast_to": lambda x: x[:, :, :1].broadcast_to(x.shape),
    "torch.broadcast_to": lambda x: torch.broadcast_to(x[:, :, :1], x.shape),
    "repeat": lambda x: x.repeat(1, 2, 1, 3), "tile": lambda x: torch.tile(x, (1, 2, 1, 1)),
    "to": lambda x: x.to(torch.float64), "type": lambda x: x.type(torch.float64), "type_as": lambda x: x.type_as(x),
    "torch.clone": lambda x: torch.clone(x), "torch.detach": lambda x: torch.detach(x), "Identity": nn.Identity(),
    "UpsamplingNearest2d": nn.UpsamplingNearest2d(scale_factor=2), "Upsample": nn.Upsample(scale_factor=2),
    "interpolate": lambda x: F.interpolate(input=x, scale_factor=2, mode="nearest"),
    "chunk": lambda x: x.chunk(2, 1), "torch.chunk": lambda x: torch.chunk(x, 2, dim=1),
    "split": lambda x: x.split(3, dim=1), "torch.split": lambda x: torch.split(x, [1, 3], 1),
    "unbind": lambda x: x.unbind(1), "torch.unbind": lambda x: torch.unbind(x, -1),
    "pad": lambda x: F.pad(input=x, pad=(1, 2, 0, 1), value=0.3), "crop": lambda x: F.pad(x, (-1, -1, 0, 0)),
    "pad channels": lambda x: F.pad(x, (0, 0, 0, 0, 2, 1)),
    "pad reflected": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
}  # fmt: skip

CASES = {
    **{name: Case(f, _I, **_ONE) for name, f in (_MOVES | _WRITES).items()},
    "affine_grid": Case(_transformer, [(3, 4, 5), (2,)], **_ONE),
    **{name: Case(pad, [(3, *(4,) * n)], **_ONE) for name, (pad, n) in _PADS.items()},
    **{name: Case(lambda x, name=name: getattr(x, name)(), _I, **_ONE) for name in _SAME},
    "t": Case(lambda x: x.t().t(), [(3,)]),
    "t_": Case(lambda x: x.clone().t_().t_(), [(3,)]),
    "torch.t": Case(lambda x: torch.t(torch.t(x)), [(3,)]),
    "grid_sample": Case(
        lambda x: F.grid_sample(
            x,
            F.affine_grid(0.9 * torch.eye(2, 3, dtype=x.dtype).expand(len(x), 2, 3), list(x.shape), align_corners=False),
            align_corners=False,
        ),
        _I,
        exact=False,
        tolerance=0.12,
        correlation=0.9,
        **_ONE,
    ),
    "UpsamplingBilinear2d": Case(
        nn.UpsamplingBilinear2d(scale_factor=2), _I, exact=False, tolerance=0.1, correlation=0.9, **_ONE
    ),
    "cat": Case(lambda x, y: torch.cat((x, y), 1), [(3, 2), (2, 2)]),
    "cat by keywords": Case(lambda x, y: torch.cat(tensors=[x, y], dim=-2), [(3, 2), (2, 2)]),
    "cat of pieces": Case(lambda x: torch.cat(x.split(2, dim=1), 2), _I, **_ONE),
    "cat of positions": Case(lambda x: torch.cat((x, x), -1), [(3, 2)]),
    "cat with a constant": Case(lambda x: torch.cat([x, torch.zeros_like(x)], 1), [(3, 2)]),
    "cat with ones": Case(lambda x: torch.cat([x, torch.ones_like(x)], 1), [(3, 2)]),
    "full_like": Case(lambda x: x * torch.full_like(x, 0.3), [(3, 2)]),
    "new_zeros": Case(lambda x: x + x.new_zeros(2), [(3, 2)]),
    "new_ones": Case(lambda x: x + x.new_ones(3, 2), [(3, 2)]),
    "new_full": Case(lambda x: x + x.new_full((2,), 0.5), [(3, 2)]),
    "concat": Case(lambda x, y: torch.concat([x, y], 1), [(3, 2), (2, 2)]),
    "concatenate": Case(lambda x, y: torch.concatenate([x, y], 1), [(3, 2), (2, 2)]),
    "masked_fill": Case(
        lambda x: x.masked_fill(torch.arange(16).reshape(4, 4) % 4 == 0, 0.8), _I, exact=False, tolerance=0.02, **_ONE
    ),
    "masked_fill_": Case(
        lambda x: x.clone().masked_fill_(torch.eye(4).bool(), -0.5), _I, exact=False, tolerance=0.02, **_ONE
    ),
    "torch.masked_fill": Case(
        lambda x: torch.masked_fill(x, torch.zeros(4).bool(), float("-inf")), _I, exact=False, tolerance=0.02, **_ONE
    ),
    "as_tensor": Case(lambda x: torch.as_tensor(x), _I, **_ONE),
    "asarray": Case(lambda x: torch.asarray(x), _I, **_ONE),
    "stack": Case(lambda x, y: torch.stack([x, y], 2), [(3, 2), (3, 2)]),
}
