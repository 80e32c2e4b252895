"""InputStats and Standardize: numpy and float64 as oracles, and every bad input named."""

import copy
import pickle

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from normprop.data import InputStats, Standardize
from normprop.errors import NormPropError


def images(n=37, c=3, size=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, c, size, size, generator=g) * torch.tensor([1.0, 10.0, 0.01])[:c, None, None] + 100


@pytest.mark.parametrize("per", ["channel", "element"])
@pytest.mark.parametrize("batch", [1, 8, 37])
def test_streaming_equals_one_pass_in_float64(per, batch):
    x = images()
    loader = DataLoader(TensorDataset(x, torch.zeros(len(x))), batch_size=batch)
    dims = (0, 2, 3) if per == "channel" else (0,)
    for stats in (InputStats.from_loader(loader, per=per), InputStats.from_tensor(x, per=per)):
        torch.testing.assert_close(stats.mean, x.double().mean(dims), rtol=1e-13, atol=0)
        torch.testing.assert_close(stats.var, x.double().var(dims, correction=0), rtol=1e-9, atol=0)
        assert stats.mean.dtype == torch.float64
        assert stats.count == (37 * 25 if per == "channel" else 37)
        assert stats.shape == (3, 5, 5)


def test_merging_does_not_cancel_far_from_zero():
    x = torch.randn(4000, 2, dtype=torch.float64) + 1e8
    stats = InputStats.from_loader(x.split(7))
    torch.testing.assert_close(stats.var, x.var(0, correction=0), rtol=1e-6, atol=0)


def test_merge_is_the_pass_over_both():
    x = images()
    merged = InputStats.from_tensor(x[:10]).merge(InputStats.from_tensor(x[10:]))
    whole = InputStats.from_tensor(x)
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(merged.var, whole.var, rtol=1e-10, atol=0)
    assert merged.count == whole.count
    assert whole.synchronized() is whole


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: ("id", x, 3), lambda x: [x], lambda x: {"y": 1, "image": x}])
def test_batches_of_any_kind(wrap):
    x = images()
    assert torch.equal(InputStats.from_loader([wrap(x)]).mean, InputStats.from_tensor(x).mean)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.bool])
def test_every_real_dtype_is_promoted(dtype):
    x = torch.randint(0, 2, (50, 3, 4, 4)).to(dtype)
    stats = InputStats.from_tensor(x)
    torch.testing.assert_close(stats.mean, x.double().mean((0, 2, 3)))
    assert torch.isfinite(Standardize(stats)(x)).all()


def test_images_of_several_sizes_and_empty_batches_pass_per_channel():
    x, y = images(size=5), images(size=7, seed=1)
    stats = InputStats.from_loader([x[:0], x, y])
    assert stats.count == 37 * (25 + 49)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "empty"),
        ([torch.zeros(0, 3)], "empty"),
        ([torch.zeros(1, 3)], "One sample"),
        ([torch.tensor([[1.0], [float("nan")]])], "NaN"),
        ([torch.tensor([[1.0], [float("inf")]])], "NaN or infinite"),
        ([torch.zeros(2, 3, dtype=torch.complex64)], "Complex"),
        ([torch.zeros(5)], "lacks a batch"),
        ([torch.zeros(4, 3), torch.zeros(4, 2)], "don't go together"),
        ([("no", "tensor")], "holds no tensor"),
        ([7], "holds no tensor"),
    ],
)
def test_bad_loaders_are_named(loader, message):
    with pytest.raises(NormPropError, match=message) as caught:
        InputStats.from_loader(loader)
    assert len(str(caught.value).splitlines()) == 2, "what, then the remedy"


def test_merge_refuses_what_does_not_fit():
    x = images()
    with pytest.raises(NormPropError, match="don't go together"):
        InputStats.from_tensor(x).merge(InputStats.from_tensor(x, per="element"))
    with pytest.raises(NormPropError, match="weight"):
        InputStats.from_tensor(x).merge(InputStats.standard(3, 5, 5))


def test_stats_are_immutable_and_standard_is_checked():
    stats = InputStats.standard(3, 8, 8)
    assert torch.equal(stats.std, torch.ones(3, dtype=torch.float64))
    with pytest.raises(AttributeError):
        stats.count = 5  # type: ignore[misc]
    for bad in [(), (0,), (3, 0)]:
        with pytest.raises(NormPropError, match="shape"):
            InputStats.standard(*bad)


@pytest.mark.parametrize("per", ["channel", "element"])
def test_training_set_comes_out_standard(per):
    x = images().double()
    z = Standardize(InputStats.from_tensor(x, per=per)).double()(x)
    dims = (0, 2, 3) if per == "channel" else (0,)
    torch.testing.assert_close(z.mean(dims), torch.zeros_like(z.mean(dims)), rtol=0, atol=1e-3)  # float32 buffers at 100
    torch.testing.assert_close(z.var(dims, correction=0), torch.ones_like(z.mean(dims)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("mode", ["global", "batch"])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e6, 1e-6])
def test_constant_features_give_zero(mode, value):
    x = torch.cat([torch.full((64, 1, 3, 3), value), images(64, 1, 3)], 1)
    layer = Standardize(InputStats.from_tensor(x), mode=mode)
    z = layer(x)
    assert torch.equal(z[:, 0], torch.zeros_like(z[:, 0]))
    assert z[:, 1].std() > 0.9
    # A value never seen in training must not become infinite.
    assert torch.isfinite(layer.eval()(x + 1)).all()


def test_global_mode_treats_every_sample_alone_and_keeps_no_state():
    x = images()
    layer = Standardize(InputStats.from_tensor(x))
    before = copy.deepcopy(layer.state_dict())
    z = layer(x)
    assert torch.equal(z[3:4], layer(x[3:4]))
    assert torch.equal(z, layer.eval()(x))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    assert not list(layer.parameters())


@pytest.mark.parametrize("per", ["channel", "element"])
def test_batch_mode_is_batchnorm_without_affine(per):
    x = images().mul(0.01)
    stats = InputStats.from_tensor(x, per=per)
    layer = Standardize(stats, mode="batch", eps=1e-5)
    flat = x if per == "channel" else x.flatten(1)
    bn = (torch.nn.BatchNorm2d(3) if per == "channel" else torch.nn.BatchNorm1d(75)).requires_grad_(False)
    bn.running_mean.copy_(stats.mean.flatten())
    bn.running_var.copy_(stats.var.flatten())
    for part in (slice(0, 20), slice(20, 37)):
        torch.testing.assert_close(layer(x[part]), bn(flat[part]).view_as(x[part]), rtol=1e-3, atol=1e-3)
    layer.eval(), bn.eval()
    torch.testing.assert_close(layer(x), bn(flat).view_as(x), rtol=1e-3, atol=1e-3)


def test_batch_mode_refuses_one_sample_in_training_only():
    x = images()
    layer = Standardize(InputStats.from_tensor(x), mode="batch")
    with pytest.raises(NormPropError, match="batch size 1"):
        layer(x[:1])
    layer.eval()(x[:1])


@pytest.mark.parametrize(("given", "out"), [(torch.float64, torch.float64), (torch.bfloat16, torch.bfloat16)])
def test_dtype_follows_the_input_and_integers_get_the_buffers(given, out):
    layer = Standardize(InputStats.from_tensor(images()))
    assert layer(images().to(given)).dtype == out
    assert layer(images().to(torch.uint8)).dtype == torch.float32
    assert layer.double()(images().to(torch.uint8)).dtype == torch.float64


def test_wrong_input_is_named():
    layer = Standardize(InputStats.from_tensor(images()))
    with pytest.raises(NormPropError, match="Measure InputStats on the same"):
        layer(torch.zeros(2, 4, 5, 5))
    with pytest.raises(NormPropError, match="Complex"):
        layer(torch.zeros(2, 3, 5, 5, dtype=torch.complex64))
    with pytest.raises(NormPropError, match="Unknown data normalisation"):
        Standardize(InputStats.standard(3), mode="local")  # type: ignore[arg-type]
    bad = InputStats(torch.zeros(1), torch.tensor([-1.0]), 2, (1,))
    with pytest.raises(NormPropError, match="not negative"):
        Standardize(bad)


def test_standardize_survives_copies_and_round_trips():
    x = images()
    layer = Standardize(InputStats.from_tensor(x))
    other = Standardize(InputStats.standard(3, 5, 5))
    other.load_state_dict(layer.state_dict())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
        assert torch.equal(twin(x), layer(x))
