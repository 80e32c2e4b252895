"""A converted network stays the user's own: its class, forward, hooks, regions, randomness, surgery and parts."""

from __future__ import annotations

import copy
import pickle
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import normprop
from normprop import NormPropError
from normprop.sites.site import Site
from tests.test_promises import close
from tests.zoo import SMALL, outputs, randomise, without_dropout

NAMES = list(SMALL)


def pair(name: str, **options: Any) -> tuple[nn.Module, nn.Module, Tensor]:
    """A trained network in evaluation mode, what became of it, and samples."""
    torch.manual_seed(0)
    make, shape = SMALL[name]
    model = randomise(make()).double().eval()
    return model, normprop.convert(model, **options), torch.randn(3, *shape, dtype=torch.float64)


def gradients(model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    sum(t.square().sum() for t in outputs(model(*inputs))).backward()  # type: ignore[union-attr]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def linear_layers(model: nn.Module) -> list[str]:
    return [path for path, m in model.named_modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]


@pytest.mark.parametrize("name", NAMES)
def test_class_keys_and_parameters_stay(name: str) -> None:
    model, converted, _ = pair(name)
    assert type(converted) is type(model)
    kinds = {path: type(m) for path, m in model.named_modules() if not isinstance(m, nn.modules.batchnorm._NormBase)}
    assert {path: type(m) for path, m in converted.named_modules() if path in kinds} == kinds
    kept = {k for k in model.state_dict() if "running" not in k and "num_batches" not in k}
    assert kept <= converted.state_dict().keys()
    assert dict(model.named_parameters()).keys() <= dict(converted.named_parameters()).keys()
    for path in linear_layers(converted):
        layer = converted.get_submodule(path)
        assert isinstance(layer.weight, nn.Parameter)
        assert "weight" not in vars(layer)


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "output": lambda m: m.register_forward_hook(lambda _, __, out: out * 2 + 1 if isinstance(out, Tensor) else None),
    "input": lambda m: m.register_forward_pre_hook(lambda _, args: (args[0] + 0.5, *args[1:])),
    "nothing": lambda m: m.register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("when", ["before", "after", "later"])
@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("name", ["residual", "pre-activation", "mlp", "decoder"])
def test_hooks_act_as_in_the_network(name: str, kind: str, when: str) -> None:
    torch.manual_seed(0)
    make, shape = SMALL[name]
    model = randomise(make()).double().eval()
    x = torch.randn(3, *shape, dtype=torch.float64)
    paths = ["", *linear_layers(model)]
    if when == "before":
        paths += [path for path, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    for path in paths:
        original = copy.deepcopy(model)
        if when == "before":
            HOOKS[kind](original.get_submodule(path))
            converted = normprop.convert(original)
        else:
            converted = normprop.convert(original)
            if when == "later":
                converted(x)
            unhooked = original(x)
            handles = [HOOKS[kind](network.get_submodule(path)) for network in (original, converted)]
            close(converted(x), original(x), 1e-10)
            close(converted(x), original(x), 1e-10)
            handles[1].remove()
            close(converted(x), unhooked, 1e-10)
            continue
        close(converted(x), original(x), 1e-10)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["register_full_backward_hook", "register_full_backward_pre_hook"])
@pytest.mark.parametrize("name", ["residual", "pre-activation", "mlp", "video"])
def test_hooks_of_the_backward_see_what_they_see_in_the_network(name: str, kind: str, when: str) -> None:
    torch.manual_seed(0)
    make, shape = SMALL[name]
    original = randomise(make()).double().eval()
    x = torch.randn(3, *shape, dtype=torch.float64, requires_grad=True)
    for module in original.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # which torch refuses behind such a hook
    for path, _ in original.named_modules():
        model = copy.deepcopy(original)
        seen: list[tuple[str, list[Tensor]]] = []
        if when == "before":
            getattr(model.get_submodule(path), kind)(_noting(seen))
        converted = normprop.convert(model)
        if when == "after":
            for network in (model, converted):
                getattr(network.get_submodule(path), kind)(_noting(seen))
        for network in (model, converted):
            gradients(network, x)
        assert seen
        theirs, mine = seen[: len(seen) // 2], seen[len(seen) // 2 :]
        assert [kind for kind, _ in mine] == [kind for kind, _ in theirs]
        for (_, a), (_, b) in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def _noting(seen: list[tuple[str, list[Tensor]]]) -> Callable[..., None]:
    def note(module: nn.Module, *grads: Any) -> None:
        flat = [t for g in grads for t in (g if isinstance(g, tuple) else (g,)) if t is not None]
        is_norm = isinstance(module, Site | nn.modules.batchnorm._NormBase)
        seen.append(("norm" if is_norm else type(module).__name__, [t.clone() for t in flat]))

    return note


def test_after_a_hook_has_gone_a_layer_runs_with_its_effective_weight_again() -> None:
    _, converted, x = pair("residual")
    layer = converted.get_submodule("conv1")
    run = normprop.lane(converted).run()
    converted(x)
    handle = layer.register_forward_hook(lambda *_: None)
    for _ in range(2):
        converted(x)
    assert [entry.layer for entry in run.placements[converted.training].apart] == ["conv1"]
    handle.remove()
    converted(x)
    assert not run.placements[converted.training].apart


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_hooks_that_a_hook_of_the_network_puts_on_its_layers_act(kind: str) -> None:
    model, converted, x = pair("residual")
    for network in (model, converted):
        network(x)
        outputs: list[Tensor] = []

        def put(root: nn.Module, _: Any, outputs: list[Tensor] = outputs) -> None:
            layer = root.get_submodule("conv1")
            if kind == "forward":
                layer.register_forward_hook(lambda _, __, out: outputs.append(out.detach().clone()))
            else:
                layer.register_full_backward_hook(lambda _, __, grads: outputs.append(grads[0].clone()))

        handle = network.register_forward_pre_hook(put)
        network(x.clone().requires_grad_()).square().sum().backward()
        handle.remove()
        network.noted = outputs
    close(converted.noted[0], model.noted[0], 1e-9)


def test_hooks_see_what_a_layer_gives() -> None:
    model, converted, x = pair("residual")
    seen: dict[str, list[Tensor]] = {"model": [], "converted": []}
    for key, network in (("model", model), ("converted", converted)):
        network.get_submodule("conv1").register_forward_hook(lambda _, __, out, key=key: seen[key].append(out))
        network(x)
    (mine,), (theirs,) = seen["converted"], seen["model"]
    torch.testing.assert_close(mine, theirs)


COUNTED: list[int] = []


def test_converting_leaves_no_trace() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.steps += 1
            y: Tensor = self.norm(self.conv(x))
            return y * random.random() + torch.randn_like(y)

    model = Counting().train()
    fired: list[str] = []
    model.conv.register_forward_hook(lambda *_: fired.append("closure"))
    model.norm.register_forward_hook(lambda *_: COUNTED.append(1))
    model.norm.running_mean.fill_(0.5)  # type: ignore[union-attr]  # it keeps statistics
    states = torch.get_rng_state(), random.getstate()
    before = copy.deepcopy(model.state_dict())
    normprop.convert(model, preserve=False)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (model.calls, fired, COUNTED, model.training) == (0, [], [], True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Frozen(nn.Module):
    def __init__(self, region: str = "no_grad") -> None:
        super().__init__()
        self.region = region
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        if self.region == "no_grad":
            with torch.no_grad():
                h = self.trunk(x)
        elif self.region == "detach":
            h = self.trunk(x).detach()
        else:
            h = Reverse.apply(self.trunk(x)) if self.region == "reverse" else Sign.apply(self.trunk(x))
        return self.head(h)


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@pytest.mark.parametrize("region", ["no_grad", "detach", "reverse", "sign"])
def test_regions_and_custom_backwards_stay(region: str) -> None:
    torch.manual_seed(0)
    model = randomise(Frozen(region)).double().eval()
    converted = normprop.convert(model)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    found, expected = [], []
    for network, into in ((model, expected), (converted, found)):
        x.grad = None
        gradients(network, x)
        into.append(x.grad)
    trunk = {n for n, p in converted.named_parameters() if n.startswith("trunk") and p.grad is not None}
    if region in ("no_grad", "detach"):
        assert not trunk
        assert x.grad is None
    else:
        assert trunk
        torch.testing.assert_close(found[0], expected[0])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("where", ["inside", "outside", "parts"])
@pytest.mark.parametrize("name", ["residual", "mlp", "written out"])
def test_checkpoints_recompute_the_same(name: str, where: str, reentrant: bool) -> None:
    _, converted, x = pair(name)
    x.requires_grad_()
    expected, out = gradients(converted, x), converted(x).detach()
    if where == "inside":
        for child in converted.modules():
            if not len(list(child.children())) or child is converted:
                continue
            forward = type(child).forward.__get__(child)
            child.forward = lambda *a, f=forward: checkpoint(f, *a, use_reentrant=reentrant)  # type: ignore[method-assign]
        run: Callable[[Tensor], Any] = converted
    elif where == "outside":
        run = lambda x: checkpoint(converted, x, use_reentrant=reentrant)
    elif not isinstance(converted, nn.Sequential):
        pytest.skip("a part is called by itself where a chain has one")
    else:
        half = len(converted) // 2

        def run(x: Tensor) -> Any:
            first, second = converted[:half], converted[half:]
            return checkpoint(second, checkpoint(first, x, use_reentrant=reentrant), use_reentrant=reentrant)

    converted.zero_grad()
    y = run(x)
    torch.testing.assert_close(y.detach(), out, rtol=1e-12, atol=1e-12)
    y.square().sum().backward()
    for key, value in expected.items():
        grad = converted.get_parameter(key).grad
        assert grad is not None
        torch.testing.assert_close(grad, value, rtol=1e-9, atol=1e-10)


class Skipping(nn.Module):
    """Stochastic depth by Python's own dice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()) for _ in range(6)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            if not self.training or random.random() < 0.5:
                x = x + block(x)
        return x


def test_randomness_of_python_stays() -> None:
    torch.manual_seed(0)
    model = randomise(Skipping()).double().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    converted = normprop.convert(model).train()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for seed in range(20):
        random.seed(seed)
        expected = model(x)
        random.seed(seed)
        torch.testing.assert_close(converted(x), expected)


@pytest.mark.parametrize("name", ["residual", "mlp", "sequence", "video"])
def test_parts_called_by_themselves(name: str) -> None:
    model, converted, x = pair(name)
    chain = name != "residual"
    children = list(model.children()) if chain else [model.stem]
    mine = list(converted.children()) if chain else [converted.stem]
    a = b = x
    for theirs, own in zip(children, mine, strict=True):
        a, b = theirs(a), own(b)
        if not isinstance(theirs, nn.Conv1d | nn.Conv3d | nn.Linear) or theirs is children[-1]:
            torch.testing.assert_close(b, a)


def test_a_layer_called_by_itself_is_normalised_already_and_a_site_alone_is_refused() -> None:
    model, converted, x = pair("video")
    torch.testing.assert_close(converted[0](x), model[1](model[0](x)))
    fresh = copy.deepcopy(converted)
    with pytest.raises(NormPropError, match="has not run before it"):
        fresh[1](x.new_zeros(1, 4, 2, 2, 2))


def test_an_exception_leaves_nothing_behind() -> None:
    model, converted, x = pair("residual")
    for bad in (x[:, :2], x[:, :, :1, :1]):
        with pytest.raises(RuntimeError):
            converted(bad)
        assert not any("weight" in vars(m) or "bias" in vars(m) for m in converted.modules())
    handle = converted.get_submodule("bn2").register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        converted(x)
    handle.remove()
    close(converted(x), model(x), 1e-10)


@pytest.mark.parametrize("name", ["residual", "pre-activation", "shared"])
def test_threads_share_a_network(name: str) -> None:
    model, converted, x = pair(name)
    samples = [torch.randn_like(x) for _ in range(6)]
    expected = [outputs(model(s)) for s in samples]
    converted.zero_grad()
    found: dict[int, Any] = {}

    def work(i: int) -> None:
        for _ in range(5):
            found[i] = outputs(converted(samples[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(samples))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(samples)
    for i, want in enumerate(expected):
        close(found[i], want, 1e-10)
    sum(t.square().sum() for out in found.values() for t in out).backward()
    together = {n: p.grad.clone() for n, p in converted.named_parameters() if p.grad is not None}
    converted.zero_grad()
    for s in samples:
        sum(t.square().sum() for t in outputs(converted(s))).backward()
    for key, value in together.items():
        torch.testing.assert_close(converted.get_parameter(key).grad, value)


class Adapted(nn.Module):
    """A low-rank adapter around a convolution."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Conv2d(base.in_channels, 2, base.kernel_size, base.stride, base.padding, bias=False)
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) * 1.5 + self.up(self.down(x))


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("path", ["conv1", "stem.0", "skip.0"])
def test_adapters_act_as_in_the_network(path: str, ran: bool) -> None:
    model, converted, x = pair("residual")
    if ran:
        converted(x)
    parent, _, name = path.rpartition(".")
    base = model.get_submodule(path)
    assert isinstance(base, nn.Conv2d)
    adapter = Adapted(base).double()
    own = copy.deepcopy(adapter)
    inner = converted.get_submodule(path)
    assert isinstance(inner, nn.Conv2d)
    own.base = inner
    setattr(model.get_submodule(parent), name, adapter)
    setattr(converted.get_submodule(parent), name, own)
    close(converted(x), model(x), 1e-10)
    converted(x).square().sum().backward()
    assert own.up.weight.grad is not None
    assert inner.weight.grad is not None


def test_layers_that_were_replaced_or_pruned_are_refused_when_they_run() -> None:
    _, converted, x = pair("residual")
    converted(x)
    replaced = copy.deepcopy(converted)
    replaced(x)
    replaced.conv1 = nn.Conv2d(8, 8, 3, padding=1).double()
    with pytest.raises(NormPropError, match=r"(?s)bn1.*conv1.*Convert again"):
        replaced(x)
    prune.l1_unstructured(converted.get_submodule("conv1"), "weight", 0.5)
    with pytest.raises(NormPropError, match=r"(?s)conv1.*parametriz"):
        converted(x)


def test_what_a_layer_does_can_be_changed() -> None:
    model, converted, x = pair("sequence")
    for network in (model, converted):
        network[0].padding, network[4].stride = (2,), (1,)
    torch.testing.assert_close(converted(x), model(x))


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5


@pytest.mark.parametrize("when", ["before", "after"])
def test_parametrised_weights(when: str) -> None:
    torch.manual_seed(0)
    model = randomise(SMALL["residual"][0]()).double().eval()
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    if when == "before":
        parametrize.register_parametrization(model.get_submodule("conv1"), "weight", Half())
        converted = normprop.convert(model)
    else:
        converted = normprop.convert(model)
        converted(x)
        parametrize.register_parametrization(converted.get_submodule("conv1"), "weight", Half())
        close(converted(x), normprop.fold(converted)(x), 1e-10)
        return
    close(converted(x), model(x), 1e-10)
    assert converted.get_parameter("conv1.parametrizations.weight.original") is not None


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_computed_gains_are_refused(name: str) -> None:
    norm = nn.BatchNorm2d(4)
    converted = normprop.convert(nn.Sequential(nn.Conv2d(3, 4, 3), copy.deepcopy(norm)))
    parametrize.register_parametrization(norm, name, Half())
    with pytest.raises(NormPropError, match=r"γ or β of 1 is computed"):
        normprop.convert(nn.Sequential(nn.Conv2d(3, 4, 3), norm))
    parametrize.register_parametrization(converted.get_submodule("1"), name, Half())
    with pytest.raises(NormPropError, match=r"γ or β of 1"):
        converted(torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize(
    "how", [nn.utils.weight_norm, nn.utils.spectral_norm, lambda c: prune.l1_unstructured(c, "weight", 0.5)]
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_hooks_that_own_a_weight_are_refused(how: Callable[[nn.Module], Any]) -> None:
    layer = nn.Conv2d(3, 4, 3)
    how(layer)
    with pytest.raises(NormPropError, match="parametriz"):
        normprop.convert(nn.Sequential(layer, nn.BatchNorm2d(4)))


def test_a_part_in_place() -> None:
    torch.manual_seed(0)
    detector = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3
    ).eval()
    randomise(detector)
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 64)]
    expected = detector(images)
    backbone = detector.backbone
    weights = [id(p) for p in backbone.parameters()]
    assert normprop.convert(detector.backbone, in_place=True) is backbone
    assert [i for i in weights if i in {id(p) for p in backbone.parameters()}] == weights
    assert any(isinstance(m, Site) for m in backbone.modules())
    for a, b in zip(detector(images), expected, strict=True):
        torch.testing.assert_close(a["scores"], b["scores"], rtol=1e-3, atol=1e-4)
    targets = [{"boxes": torch.tensor([[5.0, 5.0, 40.0, 40.0]]), "labels": torch.tensor([1])}]
    sum(detector.train()(images[:1], targets).values()).backward()
    assert backbone.get_parameter("body.0.0.weight").grad is not None


def test_a_conversion_that_fails_leaves_the_model_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.LSTM(4, 4), nn.Identity())
    before = {path: type(m) for path, m in model.named_modules()}
    net = nn.Sequential(model[0], model[1], nn.Flatten(0), nn.Unflatten(0, (-1, 4)), nn.BatchNorm1d(4))
    with pytest.raises(NormPropError):
        normprop.convert(nn.Sequential(model[2]), in_place=True)
    assert {path: type(m) for path, m in model.named_modules()} == before
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_frozen_batchnorm_counts_as_a_trained_one() -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None, norm_layer=torchvision.ops.FrozenBatchNorm2d, num_classes=4)
    for module in model.modules():
        if isinstance(module, torchvision.ops.FrozenBatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    converted = normprop.convert(model.double().eval())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    close(converted(x), model(x), 1e-10)
    assert converted.get_parameter("bn1.weight").requires_grad


def test_converted_parts_nest() -> None:
    torch.manual_seed(0)
    inner, outer = randomise(SMALL["sequence"][0]()).double().eval(), None
    model = nn.Sequential(inner, nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)).double().eval()
    randomise(model[2])
    original = copy.deepcopy(model)
    x = torch.randn(3, 4, 32, dtype=torch.float64)
    normprop.convert(model[0], in_place=True)
    torch.testing.assert_close(model(x), original(x))
    outer = normprop.convert(model)
    torch.testing.assert_close(outer(x), original(x))
    assert not any(isinstance(m, nn.modules.batchnorm._NormBase) for m in outer.modules())
    with pytest.raises(NormPropError, match="converted already"):
        normprop.convert(outer)
    gradients(outer, x)
    close(normprop.fold(outer)(x), original(x), 1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_holds_all(name: str) -> None:
    _, converted, x = pair(name)
    without_dropout(converted)
    samples = torch.randn(32, *x.shape[1:], dtype=torch.float64)
    normprop.calibrate(converted, samples, preserve=True)
    state = copy.deepcopy(converted.state_dict())
    torch.manual_seed(9)
    for options in ({}, {"center": True, "preserve": False}, {"center": False, "preserve": False}):
        fresh = normprop.convert(SMALL[name][0]().double().eval(), **options) if options.get("center") is not True else None
        if fresh is None:
            continue
        fresh.load_state_dict(state)
        close(fresh(x), converted(x), 0.0)


def test_an_average_made_before_calibration_follows() -> None:
    torch.manual_seed(0)
    model = normprop.convert(SMALL["residual"][0]().double(), preserve=False)
    average = AveragedModel(model)
    x = torch.randn(16, 3, 12, 12, dtype=torch.float64)
    normprop.calibrate(model, x)
    average.update_parameters(model)
    close(average(x), model(x), 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_pickles(name: str) -> None:
    _, converted, x = pair(name)
    for again in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert type(again) is type(converted)
        close(again(x), converted(x), 0.0)
        with torch.no_grad():
            for p in again.parameters():
                p.zero_()
        assert float(outputs(converted(x))[0].detach().abs().max()) > 0
    if isinstance(converted, nn.Sequential):
        part = copy.deepcopy(converted[0])
        close(part(x), converted[0](x), 0.0)


class Wandering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.b = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.other = False

    def forward(self, x: Tensor) -> Tensor:
        return self.b(x) if self.other else self.a(x)


def test_a_path_that_was_not_recorded_is_refused_and_says_how_to_record_it() -> None:
    model = normprop.convert(Wandering())
    model.other = True
    with pytest.raises(NormPropError, match="example="):
        model(torch.randn(3, 4))


class Mapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.n = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, batch: dict[str, Tensor], scale: Tensor) -> dict[str, Tensor]:
        return {"out": self.n(self.c(batch["image"] * scale))}


def test_inputs_of_every_structure() -> None:
    torch.manual_seed(0)
    model = randomise(Mapped()).double().eval()
    batch = {"image": torch.randn(2, 3, 8, 8, dtype=torch.float64)}, torch.ones(2, 1, 1, 1, dtype=torch.float64)
    for example in (batch, {"batch": batch[0], "scale": batch[1]}):
        converted = normprop.convert(model, example=example)
        close(converted(*batch)["out"], model(*batch)["out"], 1e-12)
    with pytest.raises(normprop.TracingError, match="example="):
        normprop.convert(model)


def replicated(module: nn.Module) -> nn.Module:
    """What `nn.DataParallel` runs on another device: modules without parameters, and tensors in their place."""
    replica: nn.Module = module._replicate_for_data_parallel()  # type: ignore[operator]  # torch has no types for it
    for name, parameter in module._parameters.items():
        if parameter is None:
            replica._parameters[name] = None
        else:
            setattr(replica, name, parameter * 1.0 if parameter.requires_grad else parameter.detach())
    for name, child in module._modules.items():
        assert child is not None
        replica._modules[name] = replicated(child)
    return replica


@pytest.mark.parametrize("name", ["residual", "pre-activation", "gated", "mlp"])
def test_replicas_of_data_parallel(name: str) -> None:
    _, converted, x = pair(name)
    expected = gradients(converted, x)
    out = outputs(converted(x))
    converted.zero_grad()
    found = outputs(replicated(converted)(x))
    close(found, out, 1e-12)  # the lane of a replica, which has no parameters, is torch's operations
    sum(t.square().sum() for t in found).backward()  # type: ignore[union-attr]
    for key, value in expected.items():
        torch.testing.assert_close(converted.get_parameter(key).grad, value)


@pytest.mark.parametrize("name", ["residual", "pre-activation", "gated", "mlp"])
def test_graph_modules(name: str) -> None:
    """What torch.fx traced, or another library made of an ONNX file, loses hooks of its own when it is copied or pickled."""
    network, _, x = pair(name)
    model = normprop.convert(torch.fx.symbolic_trace(network.eval()), example=x)
    expected = outputs(model(x))
    pickled = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    for copied in (
        copy.deepcopy(copy.deepcopy(model)),
        pickle.loads(pickle.dumps(nn.Sequential(pickled)))[0],
        copy.deepcopy(pickled),
    ):
        assert len(copied._forward_pre_hooks) == len(model._forward_pre_hooks) == 1
        assert normprop.lane(copied).root is copied
        close(outputs(copied(x)), expected, 0.0)
        folded = normprop.fold(copied)
        close(outputs(folded(x)), expected, 1e-9)
        assert not copy.deepcopy(folded)._forward_pre_hooks
        assert b"normprop" not in pickle.dumps(folded)
