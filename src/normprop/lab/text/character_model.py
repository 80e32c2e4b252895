"""Character language models: an LSTM with one of several normalisers between a fixed embedding and a linear layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import normprop
from normprop.lab.names import unknown
from normprop.lab.text.layer_norm_lstm import LayerNormLSTM
from normprop.lab.text.plain_lstm import Pair, PlainLSTM


@dataclass(frozen=True)
class RecurrentNorm:
    """One way to normalise an LSTM.

    Attributes:
        name: Its name for `--norm`.
        layer: Makes a layer from its sizes, the forget bias, and what gains start at.
        gain: What the gains of gates start at unless the recipe says so; None if there are none.
        rate: Default learning rate of Adam.
    """

    name: str
    layer: Callable[[int, int, float, float], nn.Module]
    gain: float | None
    rate: float


def _normprop(inside: int, hidden: int, forget_bias: float, gain: float) -> nn.Module:
    return normprop.nn.LSTM(inside, hidden, gain_ih_init=gain, gain_hh_init=gain, forget_bias=forget_bias)


def _following(inside: int, hidden: int, forget_bias: float, gain: float) -> nn.Module:
    return normprop.nn.LSTM(
        inside, hidden, gain_ih_init=gain, gain_hh_init=gain, forget_bias=forget_bias, variances="follow"
    )


def _layer(inside: int, hidden: int, forget_bias: float, gain: float) -> nn.Module:
    return LayerNormLSTM(inside, hidden, forget_bias=forget_bias, gain=gain)


def _weight(inside: int, hidden: int, forget_bias: float, _gain: float) -> nn.Module:
    layer = PlainLSTM(inside, hidden, forget_bias=forget_bias)
    for name in ("weight_ih", "weight_hh"):
        weight_norm(layer, name)
    return layer


def _none(inside: int, hidden: int, forget_bias: float, _gain: float) -> nn.Module:
    return PlainLSTM(inside, hidden, forget_bias=forget_bias)


RECURRENT_NORMS = {
    norm.name: norm
    for norm in (
        RecurrentNorm("normprop", _normprop, 1.0, 1e-2),
        RecurrentNorm("normprop-follow", _following, 1.0, 1e-2),
        RecurrentNorm("layer", _layer, 1.0, 1e-2),
        RecurrentNorm("weight", _weight, None, 1e-2),
        RecurrentNorm("none", _none, None, 1e-2),
    )
}


def recurrent_norm(name: str) -> RecurrentNorm:
    """The normaliser of that name.

    Raises:
        NormPropError: for an unknown name, with the nearest ones.

    Example:
        >>> recurrent_norm("layer").gain
        1.0
    """
    if name not in RECURRENT_NORMS:
        raise unknown("normaliser of an LSTM", name, RECURRENT_NORMS)
    return RECURRENT_NORMS[name]


class CharacterLSTM(nn.Module):
    """Scores of the next character.

    Args:
        symbols: How many characters there are.
        norm: The normaliser of the LSTM.
        hidden: Features of the state.
        layers: How many LSTMs are stacked.
        forget_bias: What the bias of forget gates starts at.
        gain: What the gains of gates start at, if there are any.

    Shapes:
        Characters `(L, N)`; scores `(L, N, symbols)`.

    Example:
        >>> model = CharacterLSTM(5, recurrent_norm("none"), hidden=8)
        >>> model(torch.zeros(7, 2, dtype=torch.int64))[0].shape
        torch.Size([7, 2, 5])
    """

    def __init__(
        self,
        symbols: int,
        norm: RecurrentNorm,
        *,
        hidden: int,
        layers: int = 1,
        forget_bias: float = 0.0,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.embedding = normprop.nn.OrthogonalEmbedding(symbols)
        sizes = [symbols, *[hidden] * (layers - 1)]
        self.layers = nn.ModuleList(norm.layer(size, hidden, forget_bias, gain) for size in sizes)
        self.head = nn.Linear(hidden, symbols)

    def forward(self, x: Tensor, states: list[Pair] | None = None) -> tuple[Tensor, list[Pair]]:
        """Scores, and the state of each layer after the last character."""
        y, new = self.embedding(x), []
        for place, layer in enumerate(self.layers):
            y, state = layer(y, None if states is None else states[place])
            new.append(state)
        return self.head(y), new


@torch.no_grad()
def continued(model: CharacterLSTM, start: Tensor, count: int, *, seed: int = 0, temperature: float = 1.0) -> Tensor:
    """`count` characters that the model draws one after the other, after those of `start` `(n,)`.

    Example:
        >>> model = CharacterLSTM(5, recurrent_norm("none"), hidden=8)
        >>> continued(model, torch.tensor([0, 1]), 4).shape
        torch.Size([4])
    """
    model.eval()
    device = model.head.weight.device
    generator = torch.Generator().manual_seed(seed)
    x, states, drawn = start.to(device).unsqueeze(1), None, []
    for _ in range(count):
        scores, states = model(x, states)
        chances = torch.softmax(scores[-1].cpu() / temperature, -1)
        drawn.append(torch.multinomial(chances, 1, generator=generator))
        x = drawn[-1].to(device)
    return torch.cat(drawn).flatten() if drawn else start[:0]
