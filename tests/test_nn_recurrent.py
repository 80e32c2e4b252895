"""The recurrent layers against their equations written per unit and per step, and against torch's own."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from normprop import nn
from normprop.errors import NormPropError
from normprop.nn.filters import filter_norms, filter_view
from normprop.nn.unrolling import unroll
from normprop.optim import UnitNormProjection, project_unit_norm_
from tests.recurrent_reference import reference

KINDS = {"rnn": nn.RNN, "relu": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k), "lstm": nn.LSTM, "gru": nn.GRU}
CELLS = {"rnn": nn.RNNCell, "relu": lambda *a, **k: nn.RNNCell(*a, nonlinearity="relu", **k)}
CELLS |= {"lstm": nn.LSTMCell, "gru": nn.GRUCell}
every_kind = pytest.mark.parametrize("kind", KINDS)
# What the slow reference is to agree with: kind, arguments.
VARIANTS = [
    *((kind, {}) for kind in KINDS),
    *((kind, {"variances": "follow"}) for kind in KINDS),
    *((kind, {"bias": False, "gain_ih_init": 0.7, "gain_hh_init": 1.5}) for kind in KINDS),
    *((kind, {"variances": "follow", "bias": False}) for kind in ("relu", "lstm")),
    ("lstm", {"forget_bias": 3.0, "gain_cell_init": 0.5}),
    ("lstm", {"forget_bias": 1.0, "variances": "follow"}),
    ("lstm", {"gain_cell_init": None}),
    ("lstm", {"gain_cell_init": None, "variances": "follow"}),
    ("lstm", {"proj_size": 2}),
    ("lstm", {"proj_size": 2, "variances": "follow"}),
    ("gru", {"update_bias": 2.0}),
]
name_of = lambda value: value if isinstance(value, str) else "-".join(f"{k}={v}" for k, v in value.items()) or "default"


def random_network(kind, layers=2, dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = KINDS[kind](3, 4, layers, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def states_of(state):
    return state if isinstance(state, tuple) else (state,)


def random_state(model, count=2, dtype=torch.float64):
    stacked = model.num_layers * (1 + model.bidirectional)
    sizes = (model._state_size(), model.hidden_size)[: model._states]
    state = tuple(torch.randn(stacked, count, size, dtype=dtype) for size in sizes)
    return state if len(state) > 1 else state[0]


@pytest.mark.parametrize(("kind", "options"), VARIANTS, ids=name_of)
def test_equals_its_equations(kind, options):
    model = random_network(kind, **options)
    x = torch.randn(3, 3, dtype=torch.float64)
    h0 = torch.randn(2, model._state_size(), dtype=torch.float64)
    c0 = torch.randn(2, 4, dtype=torch.float64)
    output, state = model(x, (h0, c0) if kind == "lstm" else h0)
    expected, finals = reference(model, kind, x.numpy(), h0.numpy(), c0.numpy())
    np.testing.assert_allclose(output.detach().numpy(), expected, rtol=1e-7, atol=1e-8)
    for layer, parts in enumerate(finals):
        for found, right in zip(states_of(state), parts, strict=False):
            np.testing.assert_allclose(found[layer].detach().numpy(), right, rtol=1e-7, atol=1e-8)
    without = reference(model, kind, x.numpy())[0]
    np.testing.assert_allclose(model(x)[0].detach().numpy(), without, rtol=1e-7, atol=1e-8)


@every_kind
def test_the_second_direction_is_the_first_one_backwards(kind):
    model = random_network(kind, layers=1, bidirectional=True)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    output, state = model(x)
    for direction, suffix in enumerate(("", "_reverse")):
        single = KINDS[kind](3, 4, dtype=torch.float64)
        single.load_state_dict({n + "_l0": getattr(model, f"{n}_l0{suffix}") for n in parts_of(single)})
        one, last = single(x.flip(0) if direction else x)
        one = one.flip(0) if direction else one
        torch.testing.assert_close(output[..., 4 * direction : 4 * direction + 4], one)
        for both, alone in zip(states_of(state), states_of(last), strict=True):
            torch.testing.assert_close(both[direction], alone[0])


def parts_of(model):
    return [name.removesuffix("_l0") for name, _ in model.named_parameters()]


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"proj_size": 3}, {"bias": False}], ids=name_of)
@pytest.mark.parametrize("kind", ["rnn", "lstm", "gru"])
def test_parameters_are_torchs_and_gains(kind, options):
    if "proj_size" in options and kind != "lstm":
        return
    ours = KINDS[kind](5, 6, 2, **options)
    theirs = {"rnn": torch.nn.RNN, "lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[kind](5, 6, 2, **options)
    shapes = {name: p.shape for name, p in ours.named_parameters()}
    assert {n: s for n, s in shapes.items() if not n.startswith("gain")} == {
        n: p.shape for n, p in theirs.named_parameters()
    }
    missing = ours.load_state_dict(theirs.state_dict(), strict=False).missing_keys
    assert all(name.startswith("gain") for name in missing)
    assert not list(ours.buffers())
    listed = [[p.shape for p in layer] for layer in ours.all_weights]
    assert listed == [[p.shape for p in layer] for layer in theirs.all_weights]
    ours.flatten_parameters()


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"variances": "follow"}], ids=name_of)
@every_kind
def test_shapes_batches_and_states(kind, options):
    model = random_network(kind, **options)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    initial = random_state(model)
    output, state = model(x, initial)
    first = copy.deepcopy(model)
    first.batch_first = True
    torch.testing.assert_close(first(x.transpose(0, 1), initial)[0].transpose(0, 1), output)
    for i in range(2):
        part = tuple(s[:, i] for s in states_of(initial))
        alone, last = model(x[:, i], part if kind == "lstm" else part[0])
        torch.testing.assert_close(alone, output[:, i])
        for a, b in zip(states_of(last), states_of(state), strict=True):
            torch.testing.assert_close(a, b[:, i])
    assert torch.equal(pickle.loads(pickle.dumps(model)).eval()(x, initial)[0], output)
    if not options.get("bidirectional"):
        middle = model(x[:2], initial)[1]
        late, last = model(x[2:], middle)
        torch.testing.assert_close(torch.cat([model(x[:2], initial)[0], late]), output)
        for a, b in zip(states_of(last), states_of(state), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"variances": "follow"}], ids=name_of)
@every_kind
def test_packed_equals_padded(kind, options):
    model = random_network(kind, **options)
    lengths = [2, 5, 3, 5]
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    initial = random_state(model, 4)
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    output, state = model(packed, initial)
    padded, found = pad_packed_sequence(output)
    assert found.tolist() == lengths
    for i, length in enumerate(lengths):
        part = tuple(s[:, i] for s in states_of(initial))
        alone, last = model(x[:length, i], part if kind == "lstm" else part[0])
        torch.testing.assert_close(padded[:length, i], alone)
        for a, b in zip(states_of(last), states_of(state), strict=True):
            torch.testing.assert_close(b[:, i], a)
    sorted_output = model(pack_sequence([x[:5, 1], x[:2, 0]]))[0]
    torch.testing.assert_close(pad_packed_sequence(sorted_output)[0][:2, 1], model(x[:2, 0])[0])


@pytest.mark.parametrize("options", [{}, {"variances": "follow"}], ids=name_of)
@every_kind
def test_cells_take_the_steps_of_layers(kind, options):
    model = random_network(kind, layers=1, **options)
    cell = CELLS[kind](3, 4, dtype=torch.float64, **options)
    cell.load_state_dict({name.removesuffix("_l0"): p for name, p in model.named_parameters()})
    x, hx = torch.randn(4, 2, 3, dtype=torch.float64), None
    once = cell.once()
    for step, right in zip(x, model(x)[0], strict=True):
        again = once(step, hx)
        hx = cell(step, hx)
        torch.testing.assert_close(states_of(hx)[0], right)
        torch.testing.assert_close(states_of(again), states_of(hx))
    torch.testing.assert_close(states_of(cell(x[0, 0]))[0], model(x)[0][0, 0])


def test_cells_have_torchs_signatures():
    for ours, theirs in ((nn.RNNCell, torch.nn.RNNCell), (nn.LSTMCell, torch.nn.LSTMCell), (nn.GRUCell, torch.nn.GRUCell)):
        shapes = {name: p.shape for name, p in ours(3, 4).named_parameters() if not name.startswith("gain")}
        assert shapes == {name: p.shape for name, p in theirs(3, 4).named_parameters()}


@every_kind
def test_initial_weights_are_orthogonal(kind):
    model = KINDS[kind](4, 6, gain_ih_init=0.5, dtype=torch.float64)
    for gate in model.weight_hh_l0.chunk(model._gates):
        torch.testing.assert_close(gate @ gate.T, torch.eye(6, dtype=torch.float64))
    for weight, channel_dim, groups in model.filters():
        norms = filter_norms(*filter_view(weight, channel_dim, groups))
        torch.testing.assert_close(norms, torch.ones_like(norms))
    assert bool((model.gain_ih_l0 == 0.5).all())


def test_the_open_gates_bias_is_where_it_belongs():
    lstm, gru = nn.LSTM(3, 2, forget_bias=1.5), nn.GRU(3, 2, update_bias=2.5)
    assert lstm.bias_ih_l0.tolist() == [0, 0, 1.5, 1.5, 0, 0, 0, 0]
    assert gru.bias_ih_l0.tolist() == [0, 0, 2.5, 2.5, 0, 0]


@pytest.mark.parametrize("options", [{}, {"variances": "follow"}, {"bidirectional": True}], ids=name_of)
@every_kind
def test_scale_of_weights_and_gradients(kind, options):
    model = random_network(kind, **options)
    x = torch.randn(4, 3, 3, dtype=torch.float64)
    expected = model(x)[0]
    with torch.no_grad():
        for weight, channel_dim, groups in model.filters():
            weight.mul_(10 * torch.rand_like(filter_norms(*filter_view(weight, channel_dim, groups))) + 0.1)
    torch.testing.assert_close(model(x)[0], expected, rtol=1e-9, atol=1e-10)
    parameters = dict(model.named_parameters())
    loss = lambda p, sample: functional_call(model, p, (sample[:, None],))[0].square().sum()
    per_sample = vmap(grad(loss), (None, 1))(parameters, x)
    model(x)[0].square().sum().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(per_sample[name].sum(0), parameter.grad, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"gain_cell_init": None}, {"proj_size": 2}, {"variances": "follow"}], ids=name_of)
@every_kind
def test_derivatives(kind, options):
    if kind != "lstm" and options.keys() & {"gain_cell_init", "proj_size"}:
        return
    model = random_network(kind, layers=1, **options)
    x = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    state = tuple(s.requires_grad_() for s in states_of(random_state(model)))
    names = [name for name, _ in model.named_parameters()]

    def run(x, *tensors):
        hx = tensors[: len(state)]
        given = dict(zip(names, tensors[len(state) :], strict=True))
        output, last = functional_call(model, given, (x, hx if kind == "lstm" else hx[0]))
        return output, *states_of(last)

    inputs = (x, *state, *model.parameters())
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:FutureWarning")  # torch's own, on the way to its formulas
def test_forward_mode_derivatives():
    model = random_network("lstm")
    x, direction = torch.randn(2, 3, 2, 3, dtype=torch.float64)
    _, found = jvp(lambda x: model(x)[0], (x,), (direction,))
    step = 1e-6
    expected = (model(x + step * direction)[0] - model(x - step * direction)[0]) / (2 * step)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("gain", [1.0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sequence_of_an_lstm_is_its_steps(gain, dtype):
    """The written-out derivative beside autograd's own, of everything that has one."""
    model = random_network("lstm", layers=1, dtype=dtype, gain_cell_init=gain)
    found = []
    for sequence in (model._sequence, super(nn.LSTM, model)._sequence):
        torch.manual_seed(1)
        block = type(model._block("_l0"))(
            *(t.detach().requires_grad_() if isinstance(t, torch.Tensor) else t for t in model._block("_l0"))
        )
        drive = torch.randn(6, 3, 16, dtype=dtype, requires_grad=True)
        state = tuple(torch.randn(3, 4, dtype=dtype, requires_grad=True) for _ in range(2))
        y, last = sequence(drive, state, block)
        weights = [torch.randn_like(t) for t in (y, *last)]
        sum((w * t).sum() for w, t in zip(weights, (y, *last), strict=True)).backward()
        given = [drive, *state, block.weight_hh, *([] if gain is None else [block.cell])]
        found.append([y, *last, *(t.grad for t in given)])
    torch.testing.assert_close(
        *found, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=1e-5 if dtype == torch.float32 else 1e-10
    )


def test_zoneout_copies_states_with_its_probability():
    model = nn.LSTM(3, 4, recurrent_dropout=0.3, dtype=torch.float64)
    x = torch.randn(1, 4000, 3, dtype=torch.float64)
    state = tuple(torch.randn(1, 4000, 4, dtype=torch.float64) for _ in range(2))
    _, plain = without_zoneout(model)(x, state)
    _, last = model.train()(x, state)
    for old, new, found in zip(state, plain, last, strict=True):
        kept = (found - old).abs() < 1e-12
        assert kept.double().mean().item() == pytest.approx(0.3, abs=0.02)
        torch.testing.assert_close(found[~kept], new[~kept])
    _, middle = model.eval()(x, state)
    for old, new, found in zip(state, plain, middle, strict=True):
        torch.testing.assert_close(found, 0.3 * old + 0.7 * new)


def without_zoneout(model):
    plain = copy.deepcopy(model)
    plain.recurrent_dropout = 0.0
    return plain


@every_kind
def test_zoneout_in_cells_and_packed_sequences(kind):
    cell = CELLS[kind](3, 4, recurrent_dropout=0.5, dtype=torch.float64).eval()
    layer = KINDS[kind](3, 4, recurrent_dropout=0.5, dtype=torch.float64).eval()
    layer.load_state_dict({f"{name}_l0": p for name, p in cell.named_parameters()})
    x, hx = torch.randn(3, 2, 3, dtype=torch.float64), None
    for step in x:
        hx = cell(step, hx)
    torch.testing.assert_close(states_of(hx)[0], layer(x)[0][-1])
    torch.testing.assert_close(layer(pack_padded_sequence(x, torch.tensor([3, 3])))[0].data[-2:], layer(x)[0][-1])


def test_dropout_between_layers():
    model = random_network("gru", layers=3, dropout=0.5)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    assert not torch.equal(model(x)[0], model(x)[0])
    model.eval()
    torch.testing.assert_close(model(x)[0], random_network("gru", layers=3)(x)[0])
    with pytest.warns(UserWarning, match="one layer"):
        nn.GRU(3, 4, dropout=0.5)


@every_kind
def test_rows_kept_by_projection(kind):
    model = random_network(kind, unit_rows="projection")
    graph = random_network(kind)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    assert not torch.allclose(model(x)[0], graph(x)[0])
    project_unit_norm_(model)
    torch.testing.assert_close(model(x)[0], graph(x)[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    UnitNormProjection(optimizer, model)
    for _ in range(2):
        optimizer.zero_grad()
        model(x)[0].square().sum().backward()
        optimizer.step()
    for weight, channel_dim, groups in model.filters():
        norms = filter_norms(*filter_view(weight, channel_dim, groups))
        torch.testing.assert_close(norms, torch.ones_like(norms))


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_compiles_whole(kind):
    model = random_network(kind, dtype=torch.float32)
    x = torch.randn(3, 2, 3)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], model(x)[0])


@pytest.mark.parametrize("options", [{}, {"recurrent_dropout": 0.25}, {"variances": "follow"}], ids=name_of)
@every_kind
def test_autocast_and_half_precision(kind, options):
    model = random_network(kind, dtype=torch.float32, **options).eval()
    x = torch.randn(5, 2, 3)
    right, state = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x)[0]
        again = model.train()(x, state)[0]  # a state of full precision, and zoneout at random
        packed = model.eval()(pack_sequence([x[:, 0], x[:2, 1]]))[0]
    assert again.shape == right.shape
    torch.testing.assert_close(pad_packed_sequence(packed)[0][:, 0].float(), right[:, 0], rtol=0.05, atol=0.05)
    torch.testing.assert_close(mixed.float(), right, rtol=0.05, atol=0.05)
    mixed.sum().backward()
    half = model.bfloat16()
    torch.testing.assert_close(half(x.bfloat16())[0].float(), right, rtol=0.1, atol=0.1)


def test_nothing_to_run():
    model = nn.LSTM(3, 4)
    assert model(torch.zeros(0, 2, 3))[0].shape == (0, 2, 4)
    assert model(torch.zeros(5, 0, 3))[0].shape == (5, 0, 4)


def test_on_the_meta_device():
    with torch.device("meta"):
        model = nn.LSTM(3, 4, 2, bidirectional=True)
    assert model.weight_hh_l1.is_meta
    assert nn.GRU(3, 4, device="meta", variances="follow")(torch.zeros(5, 2, 3, device="meta"))[0].shape == (5, 2, 4)


def test_orthogonal_embedding():
    layer = nn.OrthogonalEmbedding(5, 7, dtype=torch.float64)
    codes = layer(torch.arange(5))
    torch.testing.assert_close(codes @ codes.T, 7 * torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(layer.folded()(torch.tensor([[1, 2]])), codes[None, 1:3])
    assert torch.equal(nn.OrthogonalEmbedding(5, 7, dtype=torch.float64).weight, layer.weight)
    assert not list(layer.parameters())
    with pytest.raises(NormPropError, match="orthogonal"):
        nn.OrthogonalEmbedding(5, 4)


def test_repr():
    assert repr(nn.GRU(3, 4, 2, False, True)) == (
        "GRU(3, 4, num_layers=2, bias=False, batch_first=True, gain_ih_init=1.0, gain_hh_init=1.0)"
    )
    assert repr(nn.LSTMCell(3, 4, forget_bias=1.0, variances="follow")) == (
        "LSTMCell(3, 4, gain_ih_init=2.0, gain_hh_init=2.0, gain_cell_init=1.0, forget_bias=1.0, variances='follow')"
    )


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: nn.RNN(3, 4, nonlinearity="gelu"), "gelu"),
        (lambda: nn.GRU(0, 4), "1 or more"),
        (lambda: nn.GRUCell(3, 0), "1 or more"),
        (lambda: nn.GRU(3, 4, gain_ih_init=0.0), "positive"),
        (lambda: nn.LSTM(3, 4, gain_hh_init=float("nan")), "positive"),
        (lambda: nn.LSTM(3, 4, gain_cell_init=-1.0), "positive"),
        (lambda: nn.LSTM(3, 4, proj_size=4), "below 4"),
        (lambda: nn.LSTM(3, 4, 2, dropout=1.5), "probability"),
        (lambda: nn.LSTM(3, 4, recurrent_dropout=1.0), "probability"),
        (lambda: nn.LSTM(3, 4, variances="learned"), "fixed"),
        (lambda: nn.LSTM(3, 4, unit_rows="no"), "projection"),
        (lambda: nn.LSTM(3, 4, bias=False, forget_bias=1.0), "forget_bias"),
        (lambda: nn.LSTM(3, 4, forget_bias=float("inf")), "deviation"),
        (lambda: nn.LSTM(3, 4)(torch.zeros(5, 2, 4)), "last of size 3"),
        (lambda: nn.LSTM(3, 4)(torch.zeros(5, 2, 3, dtype=torch.int64)), "int64"),
        (lambda: nn.LSTM(3, 4)(pack_sequence([torch.zeros(2, 4)])), "last of size 3"),
        (lambda: nn.GRU(3, 4)(torch.zeros(5, 2, 3), torch.zeros(1, 1, 4)), r"\(1, 2, 4\)"),
        (lambda: nn.GRU(3, 4)(torch.zeros(5, 3), torch.zeros(1, 5)), r"\(1, 4\)"),
        (lambda: nn.LSTMCell(3, 4)(torch.zeros(2, 3), (torch.zeros(2, 4), torch.zeros(2, 5))), r"\(2, 4\)"),
        (lambda: nn.RNNCell(3, 4)(torch.zeros(2, 2, 3)), "one or two"),
    ],
)
def test_bad_input_is_refused(build, words):
    with pytest.raises(NormPropError, match=words):
        build()


def test_the_loop_is_one_for_both_ways():
    """Sequences of different length: what the loop does at their ends, by a state that counts."""
    step = lambda drive, state, block: (state[0] + drive,)
    drives = [torch.ones(n, 1) for n in (3, 2, 2, 1)]
    for reverse in (False, True):
        outputs, (last,) = unroll(step, drives, (torch.zeros(3, 1),), None, reverse=reverse)
        assert last.flatten().tolist() == [4, 3, 1]
        assert [len(y) for y in outputs] == [3, 2, 2, 1]


def long_run(model, steps=60):
    """The second half of a long run of white noise, and the last state."""
    torch.manual_seed(0)
    with torch.no_grad():
        output, state = model(torch.randn(steps, 32, model.input_size))
    return output[steps // 2 :].flatten(0, 1), state


@pytest.mark.parametrize(("kind", "tolerance"), [("rnn", 0.01), ("relu", 0.03), ("lstm", 0.06), ("gru", 0.07)])
def test_states_have_unit_variance_in_the_long_run(kind, tolerance):
    """Approximate by nature: gates aren't quite independent, and h isn't quite Gaussian."""
    torch.manual_seed(0)
    output, _ = long_run(KINDS[kind](64, 256))
    assert output.var().item() == pytest.approx(1, abs=tolerance)
    assert abs(output.mean().item()) < 0.1


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("lstm", {}),
        ("lstm", {"gain_cell_init": None}),
        ("lstm", {"gain_cell_init": 0.5, "forget_bias": 1.0}),
        ("gru", {}),
        ("gru", {"update_bias": 1.0}),
    ],
    ids=name_of,
)
def test_moments_are_right_where_the_state_hardly_feeds_back(kind, options):
    """Then gates at different times are independent, as the derivation assumes."""
    torch.manual_seed(0)
    model = KINDS[kind](64, 256, gain_ih_init=1.5, gain_hh_init=0.05, **options)
    output, state = long_run(model, 80)
    assert output.var().item() == pytest.approx(1, abs=0.03)
    if kind == "lstm":
        predicted = model.state_moments()
        assert predicted.cell_std is not None
        assert state[1].std().item() == pytest.approx(predicted.cell_std.item(), rel=0.03)


@pytest.mark.parametrize(("kind", "tolerance"), [("rnn", 0.01), ("relu", 0.03), ("lstm", 0.06), ("gru", 0.07)])
def test_variances_follow_gains_and_biases(kind, tolerance):
    torch.manual_seed(0)
    found = {}
    for variances in ("fixed", "follow"):
        model = KINDS[kind](64, 256, variances=variances)
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.startswith("gain"):
                    parameter.mul_(torch.exp(0.3 * torch.randn_like(parameter)))
                if name.startswith("bias"):
                    parameter.add_(0.5 * torch.randn_like(parameter))
        output, _ = long_run(model)
        found[variances] = (output.mean(0).square().mean().sqrt().item(), output.var(0).std().item())
        if variances == "follow":
            assert output.var(0).mean().item() == pytest.approx(1, abs=tolerance)
    assert found["follow"][0] < 0.5 * found["fixed"][0]
    assert found["follow"][1] < 0.5 * found["fixed"][1]


def test_zoneout_leaves_the_variance():
    torch.manual_seed(0)
    output, _ = long_run(nn.LSTM(64, 256, gain_hh_init=0.05, recurrent_dropout=0.3))
    assert output.var().item() == pytest.approx(1, abs=0.05)
