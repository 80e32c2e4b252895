"""Folded recurrent layers: torch's own, with the same outputs and states."""

import copy
import pickle

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import normprop
from normprop import nn
from normprop.errors import NormPropError
from tests.test_nn_recurrent import KINDS, name_of, random_network, random_state

# torch's own note that its LSTM with a projection takes another path on a CPU.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
LSTMS = [
    {"gain_cell_init": None},
    {"gain_cell_init": None, "forget_bias": 1.0, "batch_first": True},
    {"gain_cell_init": None, "variances": "follow", "bidirectional": True},
    {"gain_cell_init": None, "variances": "follow", "bias": False},
    {"gain_cell_init": None, "bias": False},
    {"gain_cell_init": None, "proj_size": 2},
    {"gain_cell_init": None, "proj_size": 2, "variances": "follow", "bidirectional": True},
    {"gain_cell_init": None, "unit_rows": "projection"},
]
OTHERS = [
    {},
    {"batch_first": True},
    {"bidirectional": True},
    {"variances": "follow", "bidirectional": True},
    {"variances": "follow", "bias": False, "batch_first": True},
]


def nothing_of_ours(module):
    return not any(type(part).__module__.startswith("normprop") for part in module.modules())


@pytest.mark.parametrize("options", LSTMS, ids=name_of)
def test_an_lstm_becomes_torchs(options):
    model = random_network("lstm", **options)
    plain = normprop.fold(model)
    assert type(plain) is torch.nn.LSTM
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    for sequence in (x, x[0]):
        output, (h, _) = model(sequence)
        found, (last, _) = plain(sequence)
        torch.testing.assert_close(found, output)
        torch.testing.assert_close(last, h)
    h, c = random_state(model, 5 if model.batch_first else 2)
    units = torch.zeros(*c.shape[:2], plain.hidden_size - 4, dtype=torch.float64)
    torch.testing.assert_close(plain(x, (h, torch.cat([c, units], -1)))[0], model(x, (h, c))[0])
    lengths = torch.tensor([2, 1, 2, 2, 1]) if model.batch_first else torch.tensor([5, 3])
    packed = pack_padded_sequence(x, lengths, batch_first=model.batch_first, enforce_sorted=False)
    torch.testing.assert_close(plain(packed)[0].data, model(packed)[0].data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_added_unit_is_exact_in_every_precision(dtype):
    model = nn.LSTM(3, 4, gain_cell_init=None, variances="follow", dtype=torch.float64)
    torch.nn.init.normal_(model.bias_ih_l0)
    plain = normprop.fold(model).to(dtype)
    with torch.no_grad():
        c = plain(torch.randn(40, 3).to(dtype))[1][1]
    assert c[0, -1].item() == 1


@pytest.mark.parametrize("options", OTHERS, ids=name_of)
@pytest.mark.parametrize("kind", ["rnn", "relu", "gru"])
def test_a_gru_becomes_torchs_with_a_scale(kind, options):
    model = random_network(kind, **options)
    plain = normprop.fold(model)
    assert nothing_of_ours(plain)
    assert type(plain.recurrent) is (torch.nn.GRU if kind == "gru" else torch.nn.RNN)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    initial = random_state(model, 5 if model.batch_first else 2)
    for hx in (None, initial):
        for call in (plain, pickle.loads(pickle.dumps(plain)), copy.deepcopy(plain)):
            for found, expected in zip(call(x, hx), model(x, hx), strict=True):
                torch.testing.assert_close(found, expected)
    for found, expected in zip(plain(x[0]), model(x[0]), strict=True):
        torch.testing.assert_close(found, expected)
    for found, expected in zip(plain(x[0], initial[:, 0]), model(x[0], initial[:, 0]), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["rnn", "gru", "lstm"])
def test_a_network_with_recurrent_layers_folds(kind):
    class Reader(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.codes = nn.OrthogonalEmbedding(5)
            options = {"gain_cell_init": None} if kind == "lstm" else {}
            self.recurrent = KINDS[kind](5, 4, 2, **options)
            self.head = torch.nn.Linear(4, 5)

        def forward(self, x, state=None):
            y, state = self.recurrent(self.codes(x), state)
            return self.head(y), state

    torch.manual_seed(0)
    model = Reader().double().eval()
    plain = normprop.fold(model)
    assert type(plain) is Reader
    assert not any(type(part).__module__.startswith("normprop") for part in plain.modules())
    x = torch.randint(5, (6, 2))
    torch.testing.assert_close(plain(x)[0], model(x)[0])
    first, state = plain(x[:2])
    torch.testing.assert_close(torch.cat([first, plain(x[2:], state)[0]]), model(x)[0])


@pytest.mark.parametrize("kind", ["rnn", "gru"])
def test_the_folded_graph_compiles(kind):
    model = random_network(kind, dtype=torch.float32)
    plain = normprop.fold(model)
    torch._dynamo.reset()
    x = torch.randn(3, 2, 3)
    compiled = torch.compile(plain, backend="eager")
    torch.testing.assert_close(compiled(x)[0], model(x)[0])


def test_packed_sequences_of_both_directions():
    model = random_network("lstm", gain_cell_init=None, bidirectional=True)
    packed = pack_padded_sequence(torch.randn(5, 3, 3, dtype=torch.float64), torch.tensor([5, 4, 2]))
    found, expected = (pad_packed_sequence(m(packed)[0])[0] for m in (normprop.fold(model), model))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (lambda: nn.LSTM(3, 4), "gain_cell_init=None"),
        (lambda: nn.LSTM(3, 4, gain_cell_init=None, recurrent_dropout=0.1), "recurrent_dropout"),
        (lambda: nn.GRU(3, 4, recurrent_dropout=0.1), "recurrent_dropout"),
        (lambda: nn.GRUCell(3, 4), "cells"),
        (lambda: torch.nn.Sequential(nn.LSTMCell(3, 4)), "cells"),
    ],
)
def test_what_cannot_be_folded_says_why(layer, words):
    with pytest.raises(NormPropError, match=words):
        normprop.fold(layer())
