"""What is compared is what the names say, in turns; what was measured survives being written."""

import json
import platform
import statistics
import time

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

import normprop
from normprop.errors import NormPropError
from normprop.lab.cost.allocator import keep_freed_memory
from normprop.lab.cost.benchmark import measure_cost
from normprop.lab.cost.contenders import CONTENDERS, rivals
from normprop.lab.cost.cost_report import CONVERT, FOLD, LANE, READING, STEP, CostReport, ratio
from normprop.lab.cost.cost_tables import caption, tables
from normprop.lab.cost.lane_alone import LaneAlone, lane_step, reading_step
from normprop.lab.cost.memory import measured, peak_memory
from normprop.lab.cost.quartiles import Quartiles
from normprop.lab.cost.replacement import without_batchnorm
from normprop.lab.cost.rounds import Rounds, measure
from normprop.lab.cost.workload import Workload
from normprop.lab.networks.models import build
from normprop.lab.networks.normalizers import normalizer

TINY = Workload("resnet8", shape=(3, 8, 8), width=0.25, threads=torch.get_num_threads())
NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)
LAYERS = (nn.Conv2d, nn.Linear)


def layers(network, kind):
    return [m for m in network.modules() if isinstance(m, kind)]


def shapes(network):
    return sorted((tuple(m.weight.shape), m.bias is not None) for m in layers(network, LAYERS))


@pytest.mark.parametrize("model", ["resnet8", "nin", "plain5"])
def test_plain_network_has_the_layers_of_the_folded_one_and_nothing_more(model):
    workload = Workload(model, shape=(3, 16, 16), width=0.25)
    plain, folded = workload.contender("plain"), workload.deployed("normprop")
    assert not layers(plain, NORMS)
    assert shapes(plain) == shapes(folded)
    size = sum(p.numel() for p in plain.parameters())
    assert size == sum(p.numel() for p in folded.parameters()), "weights and biases alone"
    assert plain(torch.randn(2, 3, 16, 16)).shape == (2, 10)


def test_plain_network_of_the_built_in_kind_is_the_one_built_without_normaliser():
    built = Workload("resnet8", width=0.25).original()
    none = build("resnet8", shape=(3, 32, 32), classes=10, norm=normalizer("none"), width=0.25)
    plain = without_batchnorm(built, torch.randn(1, 3, 32, 32))
    assert {k: v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in none.state_dict().items()}


def test_batchnorm_after_other_things_leaves_nothing_behind():
    net = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1, bias=False))
    plain = without_batchnorm(net, torch.randn(1, 3, 4, 4))
    assert [type(m) for m in plain] == [nn.Conv2d, nn.ReLU, nn.Identity, nn.Conv2d]
    assert all(m.bias is None for m in layers(plain, LAYERS))
    assert isinstance(net[2], nn.BatchNorm2d), "the argument is as it was"


def test_activation_inside_a_batchnorm_module_stays():
    plain = Workload("timm:resnetv2_18", shape=(3, 32, 32)).contender("plain")
    rectifiers = layers(plain, nn.ReLU)
    assert not layers(plain, NORMS)
    assert len(rectifiers) == len(layers(Workload("timm:resnetv2_18", shape=(3, 32, 32)).original(), nn.ReLU))


@pytest.mark.parametrize("name", CONTENDERS)
def test_every_contender_starts_from_the_same_filters_and_trains(name):
    network = TINY.contender(name)
    step = TINY.training_step(network, 4)
    step()
    trainable = [p for p in network.parameters() if p.requires_grad]
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in trainable)
    first = next(m for m in TINY.original().modules() if isinstance(m, nn.Conv2d)).weight
    directions = [nn.functional.normalize(w.detach().flatten(1)) for w in (network.get_parameter("conv.weight"), first)]
    torch.testing.assert_close(*directions)  # the paper's form rescales its filters
    kinds = {"batch": nn.BatchNorm2d, "group": nn.GroupNorm, "layer": nn.GroupNorm}
    assert {type(m) for m in layers(network, NORMS)} == ({kinds[name]} if name in kinds else set())
    assert TINY.inference_step(TINY.deployed(name), 2)().shape == (2, 10)


def test_accumulated_batches_make_one_step():
    count = {"forward": 0}
    network = Workload("mlp", shape=(4,), accumulate=3).contender("plain")
    network.register_forward_hook(lambda *_: count.update(forward=count["forward"] + 1))
    step = Workload("mlp", shape=(4,), accumulate=3).training_step(network, 2)
    step()
    assert count["forward"] == 3


def test_lane_is_what_the_data_lane_reads_and_passes_its_gradient():
    network = TINY.contender("normprop")
    lane = LaneAlone(network)
    folded = normprop.fold(network)
    effective = sorted(tuple(p.shape) for m in layers(folded, nn.Conv2d) for p in (m.weight, m.bias))
    assert sorted(tuple(t.shape) for t in lane()) == effective
    lane_step(lane)()
    weights = [m.weight for m in layers(network, nn.Conv2d)]
    assert all(bool(w.grad.any()) for w in weights)
    assert len(reading_step(lane)()) == len(list(lane.parameters()))


@pytest.mark.parametrize("count", [1, 2, 5, 12])
def test_quartiles_are_those_of_the_standard_library(count):
    values = [((7 * i) % count) ** 1.5 for i in range(count)]
    found = Quartiles.of(values)
    expected = statistics.quantiles(values, n=4, method="inclusive") if count > 1 else values * 3
    assert [found.low, found.median, found.high] == pytest.approx(expected)


def test_ratios_are_of_the_same_round():
    rounds = Rounds({"normprop": [1.0, 10.0, 100.0], "plain": [2.0, 5.0, 100.0]}, {"normprop": [3.0], "plain": [1.0]})
    assert rounds.ratio("normprop", "plain") == Quartiles(0.75, 1.0, 1.5)
    assert ratio(rounds, "plain", "cpu").median == 3.0
    assert ratio(rounds, "batch") is None


def test_steps_take_turns_and_each_begins_some_round():
    order = []

    def step(name, seconds):
        end = time.perf_counter() + seconds
        order.append(name)
        while time.perf_counter() < end:
            pass

    rounds = measure({"a": lambda: step("a", 0.21), "b": lambda: step("b", 0.03)}, seconds=0, least=4)
    warm_up = 3
    assert "".join(order) == "a" * warm_up + "b" * warm_up + "abb" + "bba" + "abb" + "bba", "short ones once uncounted"
    assert {len(times) for clock in (rounds.wall, rounds.cpu) for times in clock.values()} == {4}


@pytest.fixture(scope="module")
def report():
    workload = Workload("mlp", shape=(6,), width=0.1, threads=torch.get_num_threads())
    return measure_cost(workload, batch_sizes=(4, 1), against=("batch", "plain"), seconds=0, memory=False, least=1)


def test_report_holds_every_measurement(report):
    assert [batch.batch_size for batch in report.batches] == [1, 4]
    one, four = report.batches
    assert "more than 1 value per channel" in one.failures["batch"]
    assert not four.failures
    assert set(one.training.wall) == {"normprop", "plain", LANE, READING}
    assert set(four.training.wall) == {"normprop", "plain", "batch", LANE, READING}
    assert set(one.inference.wall) == {"normprop", "plain", "batch"}, "BatchNorm infers at any batch size"
    assert set(report.construction.wall) == {CONVERT, FOLD, STEP}
    assert report.construction_batch == 4, "the least that the first rival trains at"
    assert all(seconds > 0 for batch in report.batches for seconds in batch.first_step.values())


def test_report_round_trip(report, tmp_path):
    path = tmp_path / "cost.json"
    path.write_text(report.to_json())
    assert CostReport.load(path) == report
    shown = json.loads(report.to_json())["quartiles"][1]
    expected = ratio(report.batches[1].training, "batch")
    assert shown["training_wall_ratio"]["batch"]["median"] == expected.median


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "normprop bench 1"}'])
def test_foreign_reports_are_refused(content, tmp_path):
    path = tmp_path / "cost.json"
    path.write_text(content)
    with pytest.raises(NormPropError, match="result of normprop bench"):
        CostReport.load(path)


def test_tables_say_who_cannot_train_and_name_the_machine(report):
    costs, lane, construction = tables(report)
    assert [row[2] for row in costs.rows if row[:2] == ("1", "BatchNorm")] == ["cannot train"]
    assert all(len(row) == len(table.columns) for table in (costs, lane, construction) for row in table.rows)
    assert len(costs.markdown().splitlines()) == 4 + len(costs.rows)
    assert report.machine.processor in caption(report)


def test_memory_of_a_process_of_its_own():
    plain, batch = (peak_memory(TINY, name, 64) for name in ("plain", "batch"))
    assert 0 < plain.allocated < batch.allocated, "BatchNorm keeps what it normalised"
    assert plain.resident is None or plain.resident > 0


def test_allocated_memory_repeats_and_grows_with_the_batch():
    peaks = [measured(TINY, "normprop", size).allocated for size in (2, 2, 4)]
    assert peaks[0] == peaks[1] < peaks[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"against": ["bach"]}, "Did you mean batch"),
        ({"against": ["normprop"]}, "Unknown contender"),
        ({"against": []}, "--against plain"),
        ({"batch_sizes": (0,)}, "batch sizes of 1"),
        ({"batch_sizes": ()}, "batch sizes of 1"),
        ({"seconds": -1.0}, "--seconds of 0"),
        ({"workload": Workload("resnet81")}, "Unknown model"),
        ({"workload": Workload("torchvision:squeezenet1_1")}, "has no BatchNorm"),
        ({"workload": Workload("torchvision:densenet121", shape=(3, 16, 16))}, "--shape"),
        (
            {"workload": Workload("mlp", shape=(6,), width=0.1), "against": ["batch"], "batch_sizes": (1,)},
            "another contender",
        ),
    ],
)
def test_what_cannot_be_compared_is_named(options, message):
    workload = options.pop("workload", TINY)
    with pytest.raises(NormPropError, match=message):
        measure_cost(workload, seconds=options.pop("seconds", 0), memory=False, least=1, **options)


def test_freed_memory_can_be_kept_where_glibc_allocates():
    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")


def test_share_beyond_no_normaliser_is_of_the_same_round(report):
    lane = tables(report)[1]
    batch = report.batches[0].training
    (share,) = [1 - plain / whole for plain, whole in zip(batch.wall["plain"], batch.wall["normprop"], strict=True)]
    assert lane.rows[0][3].startswith(f"{share:.3f} [")


def test_rivals_are_listed_once():
    assert rivals(["layer", "plain", "layer"]) == ["layer", "plain"]
