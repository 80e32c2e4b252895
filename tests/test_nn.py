"""The promises of the normalised layers, over kinds, methods, activations and precisions."""

import copy
import io
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call, grad, vmap
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from normprop import nn
from normprop.errors import NormPropError
from normprop.nn.filters import filter_norms, filter_view


class Residual(torch.nn.Module):
    """A skip, a branch and their sum, as users would write it."""

    def __init__(self, **options):
        super().__init__()
        self.branch = nn.Conv2d(4, 4, 3, padding=1, **options)
        self.sum = nn.ResidualSum(depth=3)

    def forward(self, input):
        return self.sum(input, self.branch(input))


def head(inputs, **options):
    factory = {"dtype": options.get("dtype")}
    return torch.nn.Flatten(), nn.Linear(inputs, 6, **options), nn.Linear(6, 3, activation=None, **factory)


NETWORKS = {
    "linear": (lambda **o: (nn.Linear(5, 8, **o), *head(8, **o)), (5,)),
    "conv1d": (lambda **o: (nn.Conv1d(2, 4, 3, stride=2, padding=1, **o), *head(16, **o)), (2, 8)),
    "conv2d": (lambda **o: (nn.Conv2d(4, 8, 3, padding="same", groups=2, **o), *head(128, **o)), (4, 4, 4)),
    "depthwise": (
        lambda **o: (nn.Conv2d(4, 4, 3, groups=4, padding=1, padding_mode="circular", **o), *head(64, **o)),
        (4, 4, 4),
    ),
    "conv3d": (lambda **o: (nn.Conv3d(2, 3, 2, **o), *head(24, **o)), (2, 3, 3, 3)),
    "transposed": (lambda **o: (nn.ConvTranspose2d(4, 6, 3, 2, 1, groups=2, **o), *head(54, **o)), (4, 2, 2)),
    "residual": (lambda **o: (Residual(**o), *head(64, **o)), (4, 4, 4)),
}
OPTIONS = [
    {"method": "exact"},
    {"method": "paper"},
    {"method": "exact", "activation": "gelu"},
    {"method": "exact", "activation": "prelu"},
]
PRECISIONS = {torch.float64: {"rtol": 1e-9, "atol": 1e-10}, torch.float32: {"rtol": 1e-4, "atol": 1e-4}}


def network(kind, dtype=torch.float64, seed=0, **options):
    """The network with all its parameters random, and an input for it."""
    torch.manual_seed(seed)
    build, shape = NETWORKS[kind]
    model = torch.nn.Sequential(*build(dtype=dtype, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "activation" not in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model, torch.randn(4, *shape, dtype=dtype)


every_network = pytest.mark.parametrize("kind", NETWORKS)
every_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o.values()))
every_precision = pytest.mark.parametrize("dtype", PRECISIONS, ids=lambda d: str(d).removeprefix("torch."))


@every_precision
@every_option
@every_network
def test_a_sample_does_not_depend_on_its_batch(kind, options, dtype):
    model, x = network(kind, dtype, **options)
    whole = model(x)
    for i in range(len(x)):
        torch.testing.assert_close(whole[i : i + 1], model(x[i : i + 1]), **PRECISIONS[dtype])


@every_option
@every_network
def test_training_and_evaluation_are_the_same_and_stateless(kind, options):
    model, x = network(kind, torch.float32, **options)
    before = copy.deepcopy(model.state_dict())
    assert torch.equal(model.train()(x), model.eval()(x))
    assert not list(model.buffers())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@every_precision
@every_option
@every_network
def test_gradients_add_over_samples(kind, options, dtype):
    model, x = network(kind, dtype, **options)
    parameters = dict(model.named_parameters())

    def loss(parameters, sample):
        return functional_call(model, parameters, (sample[None],)).square().sum()

    whole = torch.autograd.grad(model(x).square().sum(), list(parameters.values()))
    per_sample = vmap(grad(loss), (None, 0))(parameters, x)
    for sample in x:
        model(sample[None]).square().sum().backward()
    tolerance = PRECISIONS[dtype] | {"rtol": 1e-8 if dtype == torch.float64 else 1e-3}
    for expected, (name, parameter) in zip(whole, parameters.items(), strict=True):
        torch.testing.assert_close(per_sample[name].sum(0), expected, **tolerance)
        torch.testing.assert_close(parameter.grad, expected, **tolerance)


@every_precision
@every_option
@every_network
def test_folding_gives_plain_torch_and_the_same_function(kind, options, dtype):
    model, x = network(kind, dtype, **options)
    expected = model(x)
    folded = copy.deepcopy(model)
    for name, module in model.named_modules():
        if hasattr(module, "folded") and not name.endswith("activation"):
            folded.set_submodule(name, module.folded())
    modules = [m for m in folded.modules() if not isinstance(m, Residual)]
    assert all(type(m).__module__.startswith("torch.") for m in modules)
    torch.testing.assert_close(folded(x), expected, **PRECISIONS[dtype])
    torch.testing.assert_close(pickle.loads(pickle.dumps(folded.eval()))(x), expected, **PRECISIONS[dtype])


@every_option
@every_network
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_scale_of_a_filter_does_not_matter(kind, options, scale):
    model, x = network(kind, **options)
    expected = model(x)
    with torch.no_grad():
        for module in model.modules():
            for weight, channel_dim, groups in getattr(module, "filters", tuple)():
                view, inside = filter_view(weight, channel_dim, groups)
                view.mul_(scale * torch.rand_like(filter_norms(view, inside)).add(0.5))
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-10)


@every_option
@every_network
def test_survives_copies_and_checkpoints(kind, options):
    model, x = network(kind, **options)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    assert torch.equal(AveragedModel(model)(x), expected)
    other, _ = network(kind, seed=1, **options)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(x), expected)
    x.requires_grad_()
    assert torch.equal(checkpoint(model, x, use_reentrant=False), expected)


@pytest.mark.parametrize(
    ("kind", "method"), [("linear", "exact"), ("conv2d", "exact"), ("conv2d", "paper"), ("transposed", "exact")]
)
def test_compiles_and_exports_whole(kind, method):
    model, x = network(kind, torch.float32, method=method)
    expected = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    compiled(x).sum().backward()
    exported = torch.export.export(model.eval(), (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    torch.testing.assert_close(exported.module()(x[:3]), expected[:3], rtol=1e-4, atol=1e-5)


def test_runs_in_onnx_with_any_batch(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x = network("transposed", torch.float32)
    shapes = ({0: torch.export.Dim("batch", min=2)},)
    program = torch.onnx.export(model.eval(), (x,), dynamo=True, dynamic_shapes=shapes, verbose=False)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (output,) = session.run(None, {session.get_inputs()[0].name: x[:3].numpy()})
    torch.testing.assert_close(torch.from_numpy(output), model(x[:3]).detach(), rtol=1e-4, atol=1e-5)


@every_option
@pytest.mark.parametrize("kind", ["linear", "conv2d", "transposed"])
def test_first_and_second_derivatives(kind, options):
    model, x = network(kind, **options)
    names = [name for name, _ in model.named_parameters()]
    values = tuple(p.detach().requires_grad_() for p in model.parameters())
    call = lambda *values: functional_call(model, dict(zip(names, values, strict=True)), (x[:1],)).square().sum()
    assert torch.autograd.gradcheck(call, values, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, values, fast_mode=True, atol=1e-4)


@every_option
@every_network
def test_reduced_precision_stays_close(kind, options):
    model, x = network(kind, torch.float32, **options)
    expected = model(x)
    scale = expected.abs().max().item()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    assert (output.float() - expected).abs().max() < 0.05 * scale + 0.05
    output.float().sum().backward()
    for dtype, tolerance in ((torch.bfloat16, 0.1), (torch.float16, 0.02)):
        low = copy.deepcopy(model).to(dtype)
        output = low(x.to(dtype))
        assert output.dtype == dtype
        assert (output.float() - expected).abs().max() < tolerance * scale + tolerance
        output.sum().backward()
        assert all(p.grad.isfinite().all() for p in low.parameters())


def test_norms_of_half_precision_weights_do_not_overflow():
    layer = nn.Linear(4096, 4, dtype=torch.float16)
    with torch.no_grad():
        layer.weight.normal_().mul_(1000)
    assert layer(torch.randn(2, 4096, dtype=torch.float16)).isfinite().all()


@every_precision
@every_option
@pytest.mark.parametrize("center", ["auto", False])
@every_network
def test_vanishing_filters_are_finite(kind, options, dtype, center):
    if options["method"] == "exact":
        options = options | {"center": center}
    model, x = network(kind, dtype, **options)
    for value in (0.0, 0.1):  # a constant filter vanishes when it is centred
        first = next(m for m in model.modules() if hasattr(m, "filters"))
        model.zero_grad()
        with torch.no_grad():
            first.weight.fill_(value)
        output = model(x)
        output.square().sum().backward()
        assert output.isfinite().all()
        assert all(p.grad.isfinite().all() and p.grad.abs().max() < 1e4 for p in model.parameters())
        if value == 0 or first.center:
            u = first.bias.detach().reshape(1, -1, *[1] * first._spatial_dims)
            y = first(torch.randn_like(x))
            expected = first.activation(u, *((first.bias, first.gain) if first.method == "exact" else ()))
            torch.testing.assert_close(y, expected.expand_as(y), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gain", [0.0, 1e-6, -1.0])
@pytest.mark.parametrize("bias", [0.0, -50.0, 50.0])
@every_precision
def test_shut_units_are_quiet(gain, bias, dtype):
    layer = nn.Linear(8, 3, dtype=dtype)
    with torch.no_grad():
        layer.gain.fill_(gain)
        layer.bias.fill_(bias)
    output = layer(torch.randn(100, 8, dtype=dtype))
    output.square().sum().backward()
    assert output.abs().max() < 10
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def z_scores(samples):
    """How many standard errors the mean is off 0, and the mean square off 1, over dimension 0."""
    scores = [(s.mean(0) - target) / s.std(0) * math.sqrt(len(s)) for s, target in ((samples, 0.0), (samples.square(), 1.0))]
    return torch.stack(scores).abs().max().item()


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh", "silu", "leaky_relu", "prelu", "elu"])
def test_exact_outputs_are_standardised(activation):
    """Disjoint patches of normal noise respond with independent Gaussians: (mean, var) is (0, 1) whatever γ and β."""
    torch.manual_seed(3)
    layers = [
        (nn.Linear(20, 6, activation=activation), (40_000, 20)),
        (nn.Conv2d(3, 6, 2, stride=2, activation=activation), (400, 3, 20, 20)),
        (nn.Conv1d(4, 6, 3, stride=3, groups=2, activation=activation, bias=False), (400, 4, 300)),
        (nn.Conv3d(2, 4, (1, 2, 2), stride=(1, 2, 2), activation=activation), (400, 2, 4, 10, 10)),
        (nn.ConvTranspose2d(3, 4, 1, activation=activation), (400, 3, 10, 10)),
    ]
    for layer, shape in layers:
        with torch.no_grad():
            layer.gain.copy_(1 + 0.5 * torch.randn(layer.gain.shape))
            if layer.bias is not None:
                layer.bias.normal_(std=0.5)
            output = layer(torch.randn(shape))
        assert z_scores(output.movedim(1, -1).reshape(-1, output.shape[1]).double()) < 5


@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (3, 3), (4, 2), (3, 2), (5, 3), (1, 2)])
def test_transposed_preactivations_have_unit_variance_on_average(kernel, stride):
    torch.manual_seed(4)
    layer = nn.ConvTranspose2d(6, 3, kernel, stride, activation="identity", bias=False)
    with torch.no_grad():
        output = layer(torch.randn(4000, 6, 7, 7))
    first = math.ceil(kernel / stride) * stride  # beyond the border, and as many outputs of each phase
    inner = output[..., first : first + 2 * stride, first : first + 2 * stride]
    energy = inner.double().square().mean((2, 3))
    assert ((energy.mean(0) - 1) / energy.std(0) * math.sqrt(len(energy))).abs().max() < 5


def test_paper_constants_are_wrong_away_from_unit_gain():
    """Why "exact" exists: at the printed γ = 1/1.21 a layer has mean −0.119 and variance 0.682."""
    torch.manual_seed(5)
    output = nn.Linear(50, 40, method="paper")(torch.randn(20_000, 50))
    assert output.mean().item() == pytest.approx(-0.119, abs=0.01)
    assert output.var(0).mean().item() == pytest.approx(0.682, abs=0.01)


def test_residual_sum_keeps_the_variance():
    x, y = torch.randn(2, 100_000, 1, dtype=torch.float64)
    for sum in (nn.ResidualSum(0.3), nn.ResidualSum(depth=10), nn.ResidualSum(0.0), nn.ResidualSum(1.0)):
        assert z_scores(sum(x, y)) < 5
    assert nn.ResidualSum(depth=16).alpha == 0.25


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.booleans(), st.sampled_from(["exact", "paper"]))
def test_filters_start_at_unit_length(groups, per_group, kernel, bias, method):
    channels = groups * per_group
    options = {"groups": groups, "bias": bias, "method": method}
    for layer in (
        nn.Conv2d(channels, 2 * groups, kernel, **options),
        nn.ConvTranspose2d(channels, 3 * groups, kernel, **options),
        nn.Linear(channels, 3, bias, method=method),
    ):
        ((weight, channel_dim, blocks),) = layer.filters()
        norms = filter_norms(*filter_view(weight, channel_dim, blocks)).flatten()
        assert weight is layer.weight
        assert norms.shape == layer.gain.shape
        torch.testing.assert_close(norms, torch.ones_like(norms))
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.fill_(7.0)
        layer.reset_parameters()
        assert bias == (layer.bias is not None)
        assert layer.bias is None or not layer.bias.any()
        assert layer.gain.detach().unique().numel() == 1
        assert layer.gain[0].item() == pytest.approx(1.0 if method == "exact" else 1 / 1.211174, rel=1e-6)


def test_gain_init_overrides_the_method():
    assert nn.Linear(3, 2, method="paper", gain_init=1.0).gain.tolist() == [1.0, 1.0]
    assert nn.Linear(3, 2, gain_init=0.5).gain.tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("ours", "theirs", "arguments", "shape"),
    [
        (nn.Linear, torch.nn.Linear, (5, 3, False), (2, 5)),
        (nn.Conv1d, torch.nn.Conv1d, (4, 6, 3, 1, 2, 2, 2, True, "circular"), (2, 4, 9)),
        (nn.Conv2d, torch.nn.Conv2d, (4, 6, 3, 2, 1), (2, 4, 9, 9)),
        (nn.Conv3d, torch.nn.Conv3d, (1, 2, 2), (2, 1, 3, 3, 3)),
        (nn.ConvTranspose2d, torch.nn.ConvTranspose2d, (4, 6, 3, 2, 1, 1, 2, True, 1), (2, 4, 3, 3)),
    ],
)
def test_without_activation_a_layer_is_torchs_own(ours, theirs, arguments, shape):
    torch.manual_seed(0)
    layer = ours(*arguments, activation=None)
    torch.manual_seed(0)
    plain = theirs(*arguments)
    x = torch.randn(shape)
    assert layer.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(layer(x), plain(x))
    assert torch.equal(layer(x[0]), plain(x[0]))
    assert type(layer.folded()) is theirs
    assert torch.equal(layer.folded()(x), plain(x))
    assert not list(layer.filters())
    assert repr(layer).endswith("activation=None)")


@every_option
def test_inputs_without_a_batch_and_with_many_dimensions(options):
    for layer, shape in (
        (nn.Linear(5, 4, **options), (5,)),
        (nn.Conv1d(2, 3, 2, **options), (2, 5)),
        (nn.Conv2d(2, 3, 2, **options), (2, 5, 4)),
        (nn.Conv3d(2, 3, 2, **options), (2, 5, 4, 3)),
        (nn.ConvTranspose2d(2, 3, 2, **options), (2, 5, 4)),
    ):
        x = torch.randn(6, *shape)
        torch.testing.assert_close(layer(x[0]), layer(x)[0])
        assert len(layer(x[:0])) == 0
    linear = nn.Linear(5, 4, **options)
    x = torch.randn(2, 3, 5)
    torch.testing.assert_close(linear(x), linear(x.flatten(0, 1)).unflatten(0, (2, 3)))


@pytest.mark.parametrize("method", ["exact", "paper"])
def test_slopes_per_channel(method):
    slopes = torch.nn.PReLU(3)
    with torch.no_grad():
        slopes.weight.copy_(torch.tensor([0.0, 0.25, 0.9]))
    linear = nn.Linear(5, 3, activation=slopes, method=method, gain_init=1.0)
    convolution = nn.Conv1d(5, 3, 1, activation=slopes, method=method, gain_init=1.0)
    with torch.no_grad():
        convolution.weight.copy_(linear.weight[..., None])
    x = torch.randn(20_000, 5)
    torch.testing.assert_close(linear(x), convolution(x[..., None])[..., 0])
    torch.testing.assert_close(linear(x.view(4, -1, 5)).view(-1, 3), linear(x))
    torch.testing.assert_close(convolution(x.T)[None], convolution(x.T[None]))
    assert z_scores(linear(x).detach().double()) < 5


def test_output_size_of_a_transposed_convolution():
    layer = nn.ConvTranspose2d(2, 3, 3, stride=2)
    assert layer(torch.randn(1, 2, 4, 4), output_size=[10, 10]).shape == (1, 3, 10, 10)


def test_every_memory_format():
    layer = nn.Conv2d(4, 6, 3)
    x = torch.randn(2, 4, 6, 6)
    expected = layer(x)
    layer.to(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), expected)


def test_meta_device_and_later_materialisation():
    layer = torch.nn.utils.skip_init(nn.Conv2d, 3, 4, 3, activation="prelu", method="paper")
    layer.reset_parameters()
    assert layer.weight.device.type == "cpu"
    with torch.device("meta"):
        meta = nn.Linear(3, 4)
    assert meta.weight.is_meta
    meta.to_empty(device="cpu").reset_parameters()
    assert meta(torch.randn(2, 3)).isfinite().all()


@pytest.mark.parametrize("fn", ["relu", torch.nn.Tanh, torch.nn.LeakyReLU(0.2), torch.nn.PReLU(), lambda u: u.abs() + u])
def test_activation_is_standardised(fn):
    torch.manual_seed(0)
    layer = nn.Activation(fn).double()
    x = torch.randn(100_000, 1, dtype=torch.float64)
    assert z_scores(layer(x).detach()) < 5
    torch.testing.assert_close(layer.folded()(x), layer(x))
    assert layer(x[0, 0]).shape == ()


def test_repr_tells_everything():
    text = repr(nn.Conv2d(3, 4, 3, padding=1, activation=torch.nn.SiLU(), method="paper", gain_init=0.5))
    assert "3, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), method='paper', center=False, gain_init=0.5" in text
    assert "SiLU()" in text
    assert "(activation): Activation(relu)" in repr(nn.Linear(2, 3))
    assert repr(nn.ResidualSum(depth=4)) == "ResidualSum(alpha=0.5)"


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: nn.Linear(2, 3, activation="rleu"), "rleu"),
        (lambda: nn.Linear(2, 3, activation=3), "no activation"),
        (lambda: nn.Linear(2, 3, activation=torch.zeros_like), "constant"),
        (lambda: nn.Linear(2, 3, method="papre"), "unknown method"),
        (lambda: nn.Linear(2, 3, method="paper", center=True), "center=True"),
        (lambda: nn.Linear(1, 3, center=True), "fan-in"),
        (lambda: nn.Conv2d(4, 4, 1, groups=4, center=True), "fan-in"),
        (lambda: nn.ConvTranspose2d(4, 4, 1, groups=4, center=True), "fan-in"),
        (lambda: nn.Linear(2, 3, activation=None, center=True), "without an activation"),
        (lambda: nn.Linear(2, 3, activation=None, gain_init=1.0), "without an activation"),
        (lambda: nn.Linear(2, 3, dtype=torch.complex64), "complex64"),
        (lambda: nn.Linear(2, 3)(torch.zeros(4, 5)), "2 channels in dimension -1"),
        (lambda: nn.Linear(2, 3)(torch.zeros(())), "2 channels"),
        (lambda: nn.Linear(2, 3, activation=None)(torch.zeros(4, 5)), "2 channels"),
        (lambda: nn.Conv2d(2, 3, 1)(torch.zeros(4, 3, 5, 5)), "2 channels in dimension -3"),
        (lambda: nn.Conv2d(2, 3, 1)(torch.zeros(5, 5)), "2 channels"),
        (lambda: nn.Conv2d(2, 3, 1)(torch.zeros(4, 2, 5, 5, dtype=torch.int64)), "int64"),
        (lambda: nn.ConvTranspose2d(2, 3, 1)(torch.zeros(4, 2, 5, 5, dtype=torch.complex64)), "complex64"),
        (lambda: nn.ResidualSum(), "either"),
        (lambda: nn.ResidualSum(0.5, depth=3), "either"),
        (lambda: nn.ResidualSum(1.5), "from 0"),
        (lambda: nn.ResidualSum(math.nan), "from 0"),
        (lambda: nn.ResidualSum(depth=0), "1 or more"),
    ],
)
def test_bad_input_is_refused(build, words):
    with pytest.raises(NormPropError, match=words) as error:
        build()
    assert "\n" in str(error.value) or words == "rleu"


@pytest.mark.parametrize("options", OPTIONS[:2], ids=lambda o: o["method"])
def test_opacus_sees_per_sample_gradients(options):
    from opacus import GradSampleModule
    from opacus.validators import ModuleValidator

    model, x = network("conv2d", torch.float32, **options)
    assert not ModuleValidator.validate(model, strict=False)
    plain = copy.deepcopy(model)
    wrapped = GradSampleModule(model, strict=True, loss_reduction="sum")
    wrapped(x.requires_grad_()).square().sum().backward()
    for i, sample in enumerate(x):
        gradients = torch.autograd.grad(plain(sample[None]).square().sum(), list(plain.parameters()))
        for parameter, expected in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad_sample[i], expected, rtol=1e-3, atol=1e-4)
