"""The probe of a network in training: what it measures, what it costs, what it leaves behind."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normprop
from normprop import MomentProbe, NormPropError
from normprop.inspection import moment_probe
from tests.zoo import SMALL


def train(model: nn.Module, x: Tensor, steps: int, rate: float = 0.01) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for _ in range(steps):
        out = model.train()(x)
        tensors = out.values() if isinstance(out, dict) else [out]
        optimizer.zero_grad()
        sum(t.square().mean() for t in tensors).backward()
        optimizer.step()


def hooks(model: nn.Module) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("converted", [False, True])
def test_numbers_are_those_of_the_outputs_of_modules(name: str, converted: bool) -> None:
    make, shape = SMALL[name]
    torch.manual_seed(0)
    model = normprop.convert(make()) if converted else make()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    x = torch.randn(32, *shape)
    seen: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_hook(lambda _, __, out, path=path: seen.setdefault(path, []).append(out.detach().double()))
        for path, module in model.named_modules()
        if path and not list(module.children())
    ]
    with MomentProbe(model, interval=1) as probe, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.train()(x)
    for handle in handles:
        handle.remove()
    paths = {key.removeprefix("normprop/").rpartition("/")[0] for key in probe.latest if key.endswith("/std")}
    assert paths
    assert {path.partition(":")[0] for path in paths} <= seen.keys()
    for path in paths:
        base, _, call = path.partition(":")
        out = seen[base][int(call or 1) - 1]
        assert probe.latest[f"normprop/{path}/mean"] == pytest.approx(float(out.mean()), abs=1e-4)
        assert probe.latest[f"normprop/{path}/std"] == pytest.approx(float(out.std(correction=0)), rel=1e-3, abs=1e-5)
    if "shared" in name:
        assert "conv:2" in paths


def test_drift_is_that_of_inspect() -> None:
    torch.manual_seed(0)
    model, x = SMALL["residual"][0](), torch.randn(64, 3, 12, 12)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    model.train()(x)
    report = {row.path: row for row in normprop.inspect(model, x)}
    with MomentProbe(model, interval=1) as probe:
        model.train()(x)
    drifts = {k.split("/")[1]: v for k, v in probe.latest.items() if k.endswith("/drift")}
    assert len(drifts) > 6
    for path, drift in drifts.items():
        assert drift == pytest.approx(report[path].drift, abs=1e-3)
    assert probe.latest["normprop/largest_drift"] == max(drifts.values())


def test_training_is_as_without_a_probe() -> None:
    for converted in (False, True):
        torch.manual_seed(0)
        model = SMALL["residual"][0]()
        model = normprop.convert(model) if converted else model
        other, x = copy.deepcopy(model), torch.randn(8, 3, 12, 12)
        before = hooks(model)
        with MomentProbe(model, interval=2, threshold=99):
            train(model, x, 5)
        train(other, x, 5)
        for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b)
        assert hooks(model) == before


def test_looks_come_at_the_interval() -> None:
    seen: list[dict[str, float]] = []
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with MomentProbe(model, interval=3, log=seen.append) as probe:
        for _ in range(8):
            model.train()(torch.randn(16, 4))
        model.eval()(torch.randn(16, 4))
    assert [numbers["step"] for numbers in seen] == [0, 3, 6]
    assert probe.step == 8  # evaluation doesn't count
    model.train()(torch.randn(16, 4))
    assert len(seen) == 3


@pytest.mark.parametrize("cost", [0.001, 0.1, 1.0])
def test_by_default_looks_take_a_hundredth_of_the_time(cost: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which a forward takes a second, and a look `cost` seconds more."""
    now = [0.0]
    monkeypatch.setattr(moment_probe.time, "perf_counter", lambda: now[0])
    looks: list[float] = []

    def log(_: Any) -> None:
        now[0] += cost
        looks.append(now[0])

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).train()
    with MomentProbe(model, log=log, threshold=99):
        for _ in range(400):
            now[0] += 1.0
            model(torch.randn(2, 4))
    spent = cost * len(looks)
    assert spent <= 0.01 * now[0] + cost
    assert len(looks) >= min(400, 0.01 * 400 / cost) - 1


def test_a_layer_that_drifts_is_warned_of_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).train()
    with torch.no_grad():
        model[0].weight.abs_()
    x = torch.randn(64, 1).repeat(1, 32)
    repeated = lambda: [model(x) for _ in range(5)]
    with MomentProbe(model, interval=1), pytest.warns(UserWarning, match="drifted") as caught:
        repeated()
    told = [str(warning.message).split()[0] for warning in caught]
    assert told.count("0") == 1
    assert len(told) == len(set(told))


def test_every_log_gets_every_look(tmp_path: Path) -> None:
    class Board:
        def __init__(self) -> None:
            self.scalars: list[tuple[str, float, int]] = []

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            self.scalars.append((tag, value, step))

    board, seen, file = Board(), [], tmp_path / "log.jsonl"
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).train()
    with MomentProbe(model, interval=2, log=[board, seen.append, file, str(tmp_path / "again.jsonl")]):
        for _ in range(5):
            model(torch.randn(16, 4))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines == seen
    assert (tmp_path / "again.jsonl").read_text() == file.read_text()
    assert {(k, v, n["step"]) for n in seen for k, v in n.items() if k != "step"} == set(board.scalars)
    page = normprop.propagate(model).to_html(log=file)
    assert json.loads(page.split('id="data">')[1].split("</script>")[0])["history"]["steps"] == [0, 2, 4]


def test_tensorboards_own_writer(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).train()
    with SummaryWriter(str(tmp_path)) as board, MomentProbe(model, log=board):
        model(torch.randn(16, 4))
    assert any(path.stat().st_size > 100 for path in tmp_path.iterdir())


def test_one_sample_is_no_drift() -> None:
    """At batch size 1 a channel has one value: all channels of a layer are taken together."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64))
    model = normprop.convert(model).train()
    drifts = []
    with MomentProbe(model, interval=1) as probe:
        for _ in range(20):
            model(torch.randn(1, 64))
            drifts.append(probe.latest["normprop/0/drift"])
    assert max(drifts) < 1.0


def test_bad_arguments(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    for arguments in ({"interval": 0}, {"log": 3}, {"log": tmp_path / "none" / "log.jsonl"}):
        with pytest.raises(NormPropError):
            MomentProbe(model, **arguments)
    assert not model._forward_pre_hooks


def test_copies_and_pickles_of_the_model_are_not_probed() -> None:
    seen: list[Any] = []
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).train()
    with MomentProbe(model, interval=1, log=seen.append) as probe:
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            other(torch.randn(16, 4))
        assert seen == []
        model(torch.randn(16, 4))
    assert probe.step == len(seen) == 1


def test_a_forward_that_fails_leaves_no_hooks() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).train()
    with MomentProbe(model, interval=1):
        with pytest.warns(UserWarning, match="cannot look"), pytest.raises(RuntimeError):
            model(torch.randn(16, 5))
        model(torch.randn(16, 4))
        with pytest.raises(RuntimeError):
            model(torch.randn(16, 5))
        assert not model[0]._forward_hooks
        model(torch.randn(16, 4))
    assert not model[0]._forward_hooks


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        out = self.body(x)
        return out if labels is None else {"loss": (out.squeeze(1) - labels).square().mean(), "logits": out}


@pytest.mark.filterwarnings("ignore")
def test_hugging_faces_trainer_logs_the_numbers(tmp_path: Path) -> None:
    import transformers

    model = Regression()
    data = [{"x": torch.randn(4), "labels": torch.tensor(0.0)} for _ in range(32)]
    probe = MomentProbe(model, interval=2, example=torch.randn(8, 4), log=tmp_path / "log.jsonl")
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=5, per_device_train_batch_size=8, logging_steps=1, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[probe.trainer_callback()])
    trainer.train()
    probe.remove()
    assert any("normprop/body.0/std" in entry for entry in trainer.state.log_history)
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [0, 2, 4]
