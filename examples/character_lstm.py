"""An LSTM with Normalization Propagation that learns to write like Python's manual, then folded into torch.nn.LSTM.

The text comes with Python (pydoc_data), so nothing is downloaded; any other in UTF-8 will do.

python examples/character_lstm.py
python examples/character_lstm.py --text shakespeare.txt --updates 2000
"""

from __future__ import annotations

import argparse
import math
import warnings
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normprop

STREAMS, WINDOW = 16, 64


class Writer(nn.Module):
    """Symbols as orthogonal vectors, an LSTM, and scores of the next symbol."""

    def __init__(self, symbols: int, hidden: int) -> None:
        super().__init__()
        self.codes = normprop.nn.OrthogonalEmbedding(symbols)
        # Gains of 1 learn fastest in short runs. Without cell gains torch's LSTM can compute it: see the end.
        self.lstm = normprop.nn.LSTM(symbols, hidden, gain_ih_init=1.0, gain_hh_init=1.0, gain_cell_init=None)
        self.head = nn.Linear(hidden, symbols)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, state = self.lstm(self.codes(x), state)
        return self.head(y), state


def learn(model: Writer, text: Tensor, updates: int) -> None:
    """Truncated backpropagation through streams of the text that are read side by side."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=updates)
    streams = text[: len(text) // STREAMS * STREAMS].view(STREAMS, -1).t()
    state, windows = None, (len(streams) - 1) // WINDOW
    for update in range(updates):
        place = update % windows * WINDOW
        state = state if place else None
        scores, (h, c) = model(streams[place : place + WINDOW], state)
        state = h.detach(), c.detach()
        loss = F.cross_entropy(scores.flatten(0, 1), streams[place + 1 : place + WINDOW + 1].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if update % max(1, updates // 8) == 0:
            print(f"update {update:>4}  {loss.item() / math.log(2):.3f} bits per character")


@torch.no_grad()
def write(model: nn.Module, start: Tensor, count: int) -> list[int]:
    """Symbols drawn one after the other."""
    x, state, drawn = start.unsqueeze(1), None, []
    for _ in range(count):
        scores, state = model(x, state)
        x = torch.multinomial(torch.softmax(scores[-1], -1), 1)
        drawn.append(int(x))
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a file to learn from; by default Python's manual")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--updates", type=int, default=600)
    options = parser.parse_args()

    text = "\n".join(topics.values()) if options.text is None else options.text.read_text(encoding="utf-8")
    symbols = sorted(set(text))
    numbers = torch.tensor([symbols.index(character) for character in text])
    rest = len(numbers) // 20
    torch.manual_seed(0)
    model = Writer(len(symbols), options.hidden)
    learn(model, numbers[:-rest], options.updates)

    model.eval()
    with torch.no_grad():
        x = numbers[-min(rest, 20_000) :]
        expected, (h, c) = model(x[:-1, None])
        bits = F.cross_entropy(expected.squeeze(1), x[1:]).item() / math.log(2)
    print(f"held-out end of the text: {bits:.3f} bits per character")
    moments = model.lstm.state_moments()
    print(f"std of h {float(h.std()):.2f}, predicted 1; of c {float(c.std()):.2f}, predicted {float(moments.cell_std):.2f}")

    plain = normprop.fold(model)
    print(f"folded: {plain.lstm}")
    warnings.filterwarnings("ignore", "LSTM with projections")  # torch's own note that a CPU runs them by another path
    with torch.no_grad():
        difference = (plain(x[:-1, None])[0] - expected).abs().max().item()
    print(f"largest difference of the scores: {difference:.1e}")
    print("".join(symbols[place] for place in write(plain, x[:30], 300)))


if __name__ == "__main__":
    main()
