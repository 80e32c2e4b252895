"""The promises of docs/index.md, each over many networks, in float64 and float32."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import normprop
from normprop import NormPropError
from tests.zoo import FAST, SMALL, TIMM, TORCHVISION, build, outputs, randomise, without_dropout

DTYPES = (torch.float64, torch.float32)


def tolerance(dtype: torch.dtype, wide: float, narrow: float) -> float:
    return wide if dtype == torch.float64 else narrow


def close(a: Any, b: Any, limit: float) -> None:
    for x, y in zip(outputs(a), outputs(b), strict=True):
        x, y = x.detach().double(), y.detach().double()
        difference = float((x - y).abs().max() / y.abs().max().clamp(min=1e-30))
        assert difference <= limit


def small(name: str, dtype: torch.dtype, seed: int = 0, **options: Any) -> tuple[nn.Module, Tensor]:
    """A converted small network whose moments are not trivial, and four samples."""
    torch.manual_seed(seed)
    make, shape = SMALL[name]
    model = randomise(make()).to(dtype)
    converted = normprop.convert(model, **({"preserve": False} | options))
    return without_dropout(converted), torch.randn(4, *shape, dtype=dtype)


def forms() -> list[Any]:
    exact = [pytest.param(name, {}, id=name) for name in SMALL]
    kept = [pytest.param(name, {"preserve": True}, id=f"{name}-kept") for name in SMALL]
    return exact + kept + [pytest.param("residual", {"method": "paper"}, id="residual-paper")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "options"), forms())
def test_a_sample_does_not_depend_on_its_batch(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    model, x = small(name, dtype, **options)
    model.eval()
    whole = outputs(model(x))
    for i in range(len(x)):
        for together, alone in zip(whole, outputs(model(x[i : i + 1])), strict=True):
            close(together[i : i + 1], alone, tolerance(dtype, 1e-10, 1e-4))


@pytest.mark.parametrize(("name", "options"), forms())
def test_training_and_evaluation_compute_the_same(name: str, options: dict[str, Any]) -> None:
    model, x = small(name, torch.float64, **options)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    if name == "shared":  # its dropout is functional: only in evaluation does it stand still
        first, second = model.eval()(x), model.eval()(x)
    else:
        first, second = model.train()(x), model.eval()(x)
    for a, b in zip(outputs(first), outputs(second), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "options"), forms())
def test_gradients_add(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    model, x = small(name, dtype, **options)
    model.eval()
    parameters = {k: p for k, p in model.named_parameters() if p.requires_grad}
    constants = {k: p for k, p in model.named_parameters() if not p.requires_grad}

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        out = functional_call(model, {**constants, **parameters}, (sample.unsqueeze(0),))
        return sum((t.square().sum() for t in outputs(out)), torch.zeros((), dtype=dtype))

    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    whole = torch.autograd.grad(sum(t.square().sum() for t in outputs(model(x))), parameters.values(), allow_unused=True)
    one_by_one = [torch.autograd.grad(loss(parameters, s), parameters.values(), allow_unused=True) for s in x]
    limit = tolerance(dtype, 1e-9, 1e-4)
    size = max(float(g.abs().max()) for g in whole if g is not None)
    for i, (key, total) in enumerate(zip(parameters, whole, strict=True)):
        if total is None:
            continue
        assert float((per_sample[key].sum(0) - total).abs().max().detach()) <= limit * size
        assert float((sum(g[i] for g in one_by_one) - total).abs().max()) <= limit * size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "options"), forms())
def test_fold_keeps_the_function_and_leaves_nothing_of_ours(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    model, x = small(name, dtype, **options)
    if name == "shared" and not options:  # its layer is called under different moments
        with pytest.raises(NormPropError, match="called several times with different effective weights"):
            normprop.fold(model)
        return
    folded = normprop.fold(model.eval())
    close(folded(x), model(x), tolerance(dtype, 1e-9, 1e-4))
    assert not any(type(m).__module__.startswith("normprop") for m in folded.modules())
    assert type(folded) is type(model)
    assert not any(hasattr(hook, "unrecorded") for m in folded.modules() for hook in m._forward_pre_hooks.values())
    assert not any("shift" in k for k in folded.state_dict())
    copied = pickle.loads(pickle.dumps(folded))
    close(copied(x), folded(x), 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*SMALL, *FAST])
def test_a_trained_network_keeps_its_function_and_still_trains(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    make, shape = SMALL[name] if name in SMALL else (lambda: build(name), None)
    model = randomise(make()).to(dtype).eval()
    converted = normprop.convert(model)
    x = torch.randn(2, *(shape or example_shape(converted, name)), dtype=dtype)
    with torch.no_grad():
        close(converted(x), model(x), tolerance(dtype, 1e-8, 1e-3))
    assert_trains(converted, x[:1])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*(f"torchvision:{n}" for n in TORCHVISION), *(f"timm:{n}" for n in TIMM)])
def test_the_whole_zoo_converts_keeps_its_function_trains_and_folds(name: str) -> None:
    torch.manual_seed(0)
    model = randomise(build(name)).double().eval()
    converted = normprop.convert(model)
    x = torch.randn(2, *example_shape(converted, name), dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        # What rounding alone does to the original bounds what can be asked of any other order of the same operations.
        rounding = max(
            float((a - b).abs().max() / b.abs().max())
            for a, b in zip(outputs(model(x * (1 + 1e-15))), outputs(expected), strict=True)
        )
        close(converted(x), expected, max(1e-8, 100 * rounding))
        close(normprop.fold(converted, check=False)(x), converted(x), max(1e-9, 100 * rounding))
    for form in (converted, normprop.convert(model, preserve=False)):
        assert_trains(form, x[:1])


def example_shape(model: Any, name: str) -> tuple[int, ...]:
    """The smallest input that is safe for a real model."""
    fixed = "levit efficientformer inception googlenet".split()
    shape = tuple(normprop.lane(model).example.args[0].shape[1:])
    if any(f in name for f in fixed):
        return shape
    return (shape[0], *((8,) if len(shape) == 4 else ()), *(min(s, 96) for s in shape[-2:]))


def assert_trains(model: nn.Module, x: Tensor) -> None:
    """A step at batch size 1: every trainable parameter has a finite gradient, and the output moves."""
    model = without_dropout(model.train())
    before = outputs(model(x))
    sum(t.square().mean() for t in before).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert bool(torch.isfinite(parameter.grad).all()), name
    size = max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=1e-4 / size)
    assert any(not torch.equal(a, b) for a, b in zip(before, outputs(model(x)), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [n for n in SMALL if n != "pre-activation"])  # it has sites without a layer only
def test_an_uncalibrated_site_does_not_feel_the_scale_of_its_weight(name: str, dtype: torch.dtype) -> None:
    model, x = small(name, dtype)
    model.eval()
    before = model(x)
    weights = {f"{entry.layer}.weight" for entry in normprop.lane(model).all_entries() if entry.layer is not None}
    assert weights
    with torch.no_grad():
        for i, path in enumerate(sorted(weights)):
            model.get_parameter(path).mul_(10.0 ** (i % 5 - 2))
    close(model(x), before, tolerance(dtype, 1e-9, 1e-4))


@pytest.mark.parametrize(("name", "options"), forms())
def test_copies_compute_the_same(name: str, options: dict[str, Any]) -> None:
    model, x = small(name, torch.float32, **options)
    model.eval()
    expected = model(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    again = normprop.convert(randomise(SMALL[name][0](), seed=5), **({"preserve": False} | options)).eval()
    again.load_state_dict(model.state_dict())
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
        averaged,
        again,
    ):
        close(other.eval()(x), expected, 0.0)
        assert {k for k, _ in other.named_modules()}


def in_autocast(model: nn.Module, x: Tensor) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(x)


def checkpointed(model: nn.Module, x: Tensor) -> Any:
    return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)


@pytest.mark.parametrize("run", [in_autocast, checkpointed])
@pytest.mark.parametrize("name", SMALL)
def test_autocast_and_checkpointing(name: str, run: Callable[[nn.Module, Tensor], Any]) -> None:
    model, x = small(name, torch.float32)
    close(run(model.eval(), x), model(x), 0.05 if run is in_autocast else 0.0)


@pytest.mark.parametrize("name", SMALL)
def test_half_precision(name: str) -> None:
    model, x = small(name, torch.float32)
    half = copy.deepcopy(model).bfloat16().eval()
    for a, b in zip(outputs(half(x.bfloat16())), outputs(model.eval()(x)), strict=True):
        assert a.dtype == torch.bfloat16
        assert float(((a.float() - b).abs().max() / b.abs().max()).detach()) < 0.1


@pytest.mark.parametrize("name", [n for n in SMALL if n != "gated"])  # torch's hardsigmoid has no second derivative
def test_double_backward(name: str) -> None:
    model, x = small(name, torch.float64)
    model.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = sum(t.square().sum() for t in outputs(model(x)))
    first = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first if g is not None), parameters, allow_unused=True)
    assert all(bool(torch.isfinite(g).all()) for g in second if g is not None)


@pytest.mark.parametrize("name", ["residual", "gated", "pre-activation", "decoder", "sequence"])
def test_export_with_a_dynamic_batch(name: str) -> None:
    model, x = small(name, torch.float32)
    model.eval()
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    for n in (1, 3):
        close(program.module()(x[:n]), model(x[:n]), 1e-5)


@pytest.mark.parametrize(("name", "options"), [("residual", {}), ("mlp", {}), ("mlp", {"method": "paper"})], ids=str)
def test_compile_is_one_graph(name: str, options: dict[str, Any]) -> None:
    """Also of a network that comes from a file and has not run yet."""
    model, x = small(name, torch.float32, **options)
    compiled = torch.compile(pickle.loads(pickle.dumps(model)), fullgraph=True, backend="aot_eager")
    close(compiled(x), model(x), 1e-5)
    gradients = []
    for run in (compiled, model):
        sum(t.square().sum() for t in outputs(run(x))).backward()
        gradients.append([p.grad for p in run.parameters() if p.grad is not None])
    size = max(float(g.abs().max()) for g in gradients[1])
    assert all(float((a - b).abs().max()) < 1e-4 * size for a, b in zip(*gradients, strict=True))


def test_onnx(tmp_path: Path) -> None:
    model, x = small("residual", torch.float32)
    model.eval()
    for network in (model, normprop.fold(model)):
        torch.onnx.export(network, (x,), tmp_path / "network.onnx", dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(tmp_path / "network.onnx")
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        close(torch.from_numpy(found), model(x), 1e-4)
