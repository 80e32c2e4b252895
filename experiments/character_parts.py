"""Character LSTMs between Normalization Propagation and layer normalisation: which part makes which difference?

    python experiments/character_parts.py normprop layer             # goes on where it stopped
    python experiments/character_parts.py --report                   # the table from what was run

Recipes are those of characters.py; validation is on its 100,000 characters. Besides `normprop` and `layer` there are:

    x, h, c                 normprop with LN for the input's part of the gates, the state's part, the cell (also x+h, …)
    one-bias                normprop that learns one of its two biases, which together move twice as fast under Adam
    normprop*K, layer*K     K times the output before the linear layer, which thus learns K times as fast under Adam
"""

from __future__ import annotations

import itertools
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from runs_file import Run, once, parser, read
from torch import Tensor, nn

import normprop
from normprop.lab.text import character_model, corpus
from normprop.lab.text.layer_norm_lstm import LayerNormLSTM
from normprop.lab.text.plain_lstm import Pair, started
from normprop.lab.text.text_recipe import TextRecipe
from normprop.lab.text.text_training import train_text

RESULTS = Path(__file__).parent / "results" / "recurrent" / "character_parts.jsonl"
KEYS = ("variant", "rate", "hidden", "updates", "seed")
Text = corpus.Corpus


class Mixed(nn.Module):
    """normprop's LSTM with layer normalisation in some of its places: "x", "h", "c"."""

    def __init__(self, inside: int, hidden: int, forget_bias: float, gain: float, places: set[str]) -> None:
        super().__init__()
        self.lstm = normprop.nn.LSTM(inside, hidden, gain_ih_init=gain, gain_hh_init=gain, forget_bias=forget_bias)
        self.bias_cell = nn.Parameter(torch.zeros(hidden)) if "c" in places else None
        self.places = places

    def forward(self, x: Tensor, hx: Pair | None = None) -> tuple[Tensor, Pair]:
        lstm, size = self.lstm, self.lstm.hidden_size
        block, bias = lstm._block("_l0"), lstm.bias_ih_l0 + lstm.bias_hh_l0
        drive = F.linear(x, block.weight_ih, bias)
        if "x" in self.places:
            drive = F.layer_norm(F.linear(x, lstm.weight_ih_l0), (4 * size,), lstm.gain_ih_l0, bias)
        y, c = started(x, hx, size)
        outputs = []
        for part in drive:
            inner = F.linear(y, lstm.weight_hh_l0 if "h" in self.places else block.weight_hh)
            if "h" in self.places:
                inner = F.layer_norm(inner, (4 * size,), lstm.gain_hh_l0)
            i, f, g, o = (part + inner).chunk(4, -1)
            c = torch.addcmul(f.sigmoid() * c, i.sigmoid(), g.tanh())
            inside = F.layer_norm(c, (size,), lstm.gain_cell_l0, self.bias_cell) if "c" in self.places else block.cell * c
            y = o.sigmoid() * inside.tanh()
            outputs.append(y)
        return torch.stack(outputs) * block.scale, (y.unsqueeze(0), c.unsqueeze(0))


class Scaled(nn.Module):
    """A layer whose output, not its state, is multiplied."""

    def __init__(self, layer: nn.Module, factor: float) -> None:
        super().__init__()
        self.layer, self.factor = layer, factor

    def forward(self, x: Tensor, hx: Pair | None = None) -> tuple[Tensor, Pair]:
        output, state = self.layer(x, hx)
        return output * self.factor, state


def layer(variant: str, inside: int, hidden: int, forget_bias: float, gain: float) -> nn.Module:
    """The LSTM of a variant."""
    name, _, factor = variant.partition("*")
    if name not in ("normprop", "layer", "one-bias"):
        return Mixed(inside, hidden, forget_bias, gain, set(name.split("+")))
    if name == "layer":
        made: nn.Module = LayerNormLSTM(inside, hidden, forget_bias=forget_bias, gain=gain)
    else:
        made = normprop.nn.LSTM(inside, hidden, gain_ih_init=gain, gain_hh_init=gain, forget_bias=forget_bias)
    if name == "one-bias":
        made.bias_hh_l0.requires_grad_(False)
    return Scaled(made, float(factor)) if factor else made


def trained(text: Text, variant: str, rate: float, hidden: int, updates: int, seed: int) -> Run:
    """Bits of one run: over the second half of training, of validation halfway and at the end, and of the test."""
    make = lambda *sizes: layer(variant, *sizes)
    character_model.RECURRENT_NORMS[variant] = character_model.RecurrentNorm(variant, make, 1.0, rate)
    recipe = TextRecipe(norm=variant, lr=rate, hidden=hidden, updates=updates, seed=seed)
    began = time.process_time()
    run = train_text(recipe, corpus=text, device="cpu", sample=0, reports=2)
    found = dict(zip(KEYS, (variant, rate, hidden, updates, seed), strict=True))
    found |= {"train": run.rows[-1].train_bits, "validation": [row.validation_bits for row in run.rows]}
    return found | {"test": run.test_bits, "seconds": time.process_time() - began}


def table(runs: list[Run]) -> str:
    """A row for each setting, means over its seeds."""
    lines = [
        "| variant | rate | hidden | updates | seeds | training | validation | test |",
        "|---|---|---|---|---|---:|---:|---:|",
    ]
    key = lambda run: (run["hidden"], run["updates"], run["variant"], run["rate"])
    for (hidden, updates, variant, rate), group in itertools.groupby(sorted(runs, key=key), key):
        found = list(group)
        parts = [[run["train"] for run in found], [run["validation"][-1] for run in found], [run["test"] for run in found]]
        means = " | ".join(f"{statistics.mean(part):.3f}" for part in parts)
        lines.append(f"| {variant} | {rate:g} | {hidden} | {updates} | {len(found)} | {means} |")
    return "\n".join(lines)


def main() -> None:
    options = parser(__doc__, RESULTS, seeds=1)
    options.add_argument("variants", nargs="*")
    options.add_argument("--data", default="shakespeare")
    options.add_argument("--rates", nargs="+", type=float, default=[2e-2])
    options.add_argument("--hidden", type=int, default=256)
    options.add_argument("--updates", type=int, default=1000)
    given = options.parse_args()
    torch.set_num_threads(1)
    runs = read(given.out)
    text = None if given.report else corpus.read(given.data)
    for seed, rate, variant in itertools.product(range(given.seeds), given.rates, given.variants):
        what = (variant, rate, given.hidden, given.updates, seed)
        once(given.out, runs, KEYS, what, lambda what=what: trained(text, *what))
    print(table(runs))


if __name__ == "__main__":
    main()
