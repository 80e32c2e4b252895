"""The command line as its users meet it: each command, its errors and exit codes, and torchrun."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from normprop.lab.commands import COMMANDS, main
from normprop.lab.commands.demo import SETTINGS, conclusion, recipe_of
from normprop.lab.figures.curves import Curve, plot_curves
from normprop.lab.training import checkpoint
from normprop.lab.training.history import Row

TINY = ("--model", "resnet8", "--width", "0.25", "--norm", "batch", "--batch-size", "32", "--train-images", "96")
LAUNCHER = (
    *("torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"),
    *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
)


@pytest.fixture(autouse=True)
def in_a_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*argv):
    """Exit code of a command in this process."""
    try:
        return main(argv)
    except SystemExit as end:
        return end.code


def start(*argv, **environment):
    """A command in its own process, one thread."""
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"} | environment
    return subprocess.run([sys.executable, "-m", *argv], env=settings, capture_output=True, text=True, timeout=120)


def test_overview_and_version(capsys):
    assert run() == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("normprop ")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    assert run(command, "--help") == 0
    assert f"normprop {command}" in capsys.readouterr().out


def test_unknown_command_and_option(capsys):
    assert run("trian") == 2
    assert "Did you mean train" in capsys.readouterr().err
    assert run("train", "--optimiser", "adam") == 2
    assert "--optimizer" in capsys.readouterr().err


def test_train_then_resume_then_overwrite(tmp_path, capsys):
    assert run("train", *TINY, "--epochs", "1", "--schedule", "constant", "--halve-every", "1") == 0
    out = capsys.readouterr().out
    assert "epoch   1/1" in out
    assert "\x1b" not in out, "a pipe gets plain text"
    folder = tmp_path / "runs" / "digits-resnet8-batch-b32-s0"
    assert {p.name for p in folder.iterdir()} == {"checkpoint.pt", "metrics.jsonl", "recipe.json"}
    again = ("train", *TINY, "--epochs", "2", "--schedule", "constant", "--halve-every", "1")
    assert run(*again) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert run(*again, "--resume") == 0
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert run(*again, "--overwrite", "--threads", "1") == 0


def test_divergence_has_its_own_exit_code(tmp_path, capsys):
    options = ("--norm", "none", "--lr", "1e9", "--epochs", "3", "--schedule", "constant", "--out", "here")
    assert run("train", *TINY, *options) == 1
    assert "diverged" in capsys.readouterr().err
    assert json.loads((tmp_path / "here" / "metrics.jsonl").read_text().splitlines()[-1])["diverged"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--norm", "batchnorm"), "Did you mean batch"),
        (("--model", "resnet81"), "Did you mean"),
        (("--data", "digit"), "Did you mean digits"),
        (("--resume",), "no checkpoint"),
        (("--threads", "0"), "--threads is 0"),
        (("--batch-size", "1"), "works at any batch size"),
    ],
)
def test_errors_are_a_line_and_a_remedy(options, message, capsys):
    assert run("train", *TINY, *options) == 2
    captured = capsys.readouterr().err
    assert message in captured
    assert captured.startswith("normprop: ")
    assert len(captured.splitlines()) == 2


def test_interruption_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("normprop.lab.training.loop.train", interrupted)
    assert run("train", *TINY) == 130
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize("library", ["tyro", "rich"])
def test_a_missing_library_is_one_line(library, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("normprop.lab.commands.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    for name in [name for name in sys.modules if name.startswith(f"{library}.")]:
        monkeypatch.delitem(sys.modules, name)
    assert run("data") == 2
    assert capsys.readouterr().err == f"normprop data needs {library}: pip install 'normprop[cli]'\n"


def test_moments_table_and_json(capsys):
    assert run("moments", "relu", "lambda x: x * x", "nn.LeakyReLU(0.2)") == 0
    out = capsys.readouterr().out
    assert "0.398942" in out
    assert "lambda x: x * x" in out
    assert run("moments", "lambda x: 3 * x + 1", "--mean", "1", "--std", "2", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["mean"] == pytest.approx(4)
    assert row["std"] == pytest.approx(6)
    assert row["second"] == pytest.approx(16 + 36)
    assert row["slope"] == pytest.approx(9)
    assert row["gain"] == pytest.approx(1 / 6)
    assert row["jacobian"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Name one"),
        (("gelo",), "gelu"),
        (("1 +",), "can't be evaluated"),
        (("3",), "not a function"),
        (("lambda x: x.nothing()",), "nothing"),
        (("relu", "--std", "0"), "--std"),
        (("relu", "--mean", "nan"), "nan"),
    ],
)
def test_moments_errors(arguments, message, capsys):
    assert run("moments", *arguments) == 2
    assert message in capsys.readouterr().err


def test_data_lists_every_set_and_where_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NORMPROP_DATA", str(tmp_path))
    (tmp_path / "mnist.npz").write_bytes(bytes(2_000_000))
    (tmp_path / "cifar-100-python").mkdir()
    assert run("data") == 0
    out = capsys.readouterr().out
    for text in ("bundled with scikit-learn", "mnist.npz (2 MB)", "cifar-100-python", "downloaded", "MIT"):
        assert text in out


def test_demo_at_its_smallest(tmp_path, capsys, monkeypatch):
    large = [(label, norm, 479 if norm == "normprop" else 529) for label, norm, _ in SETTINGS]
    monkeypatch.setattr("normprop.lab.commands.demo.SETTINGS", large)
    assert run("demo", "--epochs", "1", "--seeds", "1", "--workers", "1", "--out", "figures/demo.png") == 0
    out = capsys.readouterr().out
    assert "NormProp, batch size 1" in out
    assert "demonstration, not a benchmark" in out
    assert (tmp_path / "figures" / "demo.png").read_bytes().startswith(b"\x89PNG")


def rows(*accuracies):
    return [Row(i + 1, i, 0.1, 1.0, 0.5, a, 1.0, 1.0, diverged=a is None) for i, a in enumerate(accuracies)]


def test_the_demo_says_what_it_found_and_no_more():
    small = [[rows(0.90), rows(0.92)], [rows(None), rows(None)], [rows(0.91), rows(0.93)]]
    text = conclusion([*small, [rows(0.95), rows(0.97)], [rows(0.98), rows(0.99)]])
    assert "NormProp is 2.5 points below BatchNorm" in text
    assert "not comparable (runs diverged) with GroupNorm" in text
    assert "5.0 points below itself at 50 and within the spread of BatchNorm at 2" in text


def test_the_demos_recipes_differ_only_where_they_say():
    recipes = [recipe_of(norm, size, 4, 0).resolved() for _, norm, size in SETTINGS]
    varying = {f for f in vars(recipes[0]) if len({getattr(r, f) for r in recipes}) > 1}
    assert varying == {"norm", "batch_size", "lr", "clip", "keep_calibrated", "center", "beta"}
    assert {r.norm for r in recipes if r.keep_calibrated} == {"normprop"}
    assert len({round(r.lr / r.batch_size**0.75, 9) for r in recipes}) == 1
    assert len({round(r.clip * r.batch_size**0.5, 9) for r in recipes}) == 1


@pytest.mark.parametrize("log", [False, True])
def test_curves_show_each_setting_and_keep_labels_apart(log):
    curves = [Curve(f"setting {i}", [[10, 50, 90 + i / 10], [12, 48, 90]]) for i in range(5)]
    figure = plot_curves(curves, title="t", y_label="accuracy, %", log=log)
    (axes,) = figure.axes
    assert len(axes.lines) == 2 * 5, "each with a line to its name"
    assert sorted(text.get_text() for text in axes.texts) == [c.label for c in curves]
    heights = sorted(text.get_position()[1] for text in axes.texts)
    assert min(b - a for a, b in pairwise(heights)) > 0.04
    assert heights[-1] <= 1
    assert len({line.get_color() for line in axes.lines}) == 5


def test_python_dash_m(tmp_path):
    done = start("normprop", "train", *TINY, "--epochs", "1", "--out", "sub")
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert "test accuracy" in done.stdout
    assert checkpoint.load(tmp_path / "sub" / "checkpoint.pt")["epoch"] == 1


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs the threads of a process as files")
def test_no_thread_of_the_group_outlives_it(tmp_path):
    script = tmp_path / "joined.py"
    script.write_text(
        "from pathlib import Path\n"
        "import torch\n"
        "from normprop.lab.training.processes import processes\n"
        "def threads(): return sorted(p.read_text().strip() for p in Path('/proc/self/task').glob('*/comm'))\n"
        "with processes('cpu') as group:\n"
        "    model = group.parallel(torch.nn.Linear(3, 3))\n"
        "    model(torch.ones(2, 3)).sum().backward()\n"
        "    del model\n"
        "    within = any('gloo' in name for name in threads())\n"
        "Path(f'rank{group.rank}').write_text(f'{within} {any(\"gloo\" in name for name in threads())}')\n"
    )
    done = start(*LAUNCHER, str(script))
    assert done.returncode == 0, done.stderr
    assert [Path(f"rank{rank}").read_text() for rank in (0, 1)] == ["True False"] * 2


@pytest.mark.parametrize("norm", ["group", "normprop"])
def test_two_processes_train_what_one_does(norm, tmp_path):
    options = ("train", *TINY, "--norm", norm, "--epochs", "2", "--flips")
    assert run(*options, "--out", "one") == 0
    done = start(*LAUNCHER, "-m", "normprop", *options, "--out", "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch   2/2") == 1, "one process reports"
    one, two = (checkpoint.load(tmp_path / folder / "checkpoint.pt") for folder in ("one", "two"))
    for key, value in one["model"].items():
        torch.testing.assert_close(two["model"][key], value, rtol=1e-3, atol=1e-4)
    for a, b in zip(one["rows"], two["rows"], strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-3)
        assert b["step"] == a["step"]


@pytest.mark.parametrize(
    ("command", "out"),
    [
        *(
            (command, out)
            for command in (
                ("train", *TINY), ("train", *TINY, "--overwrite"), ("compare", "--summary-only"),
                ("reproduce", "--summary-only"),
            )
            for out in ("file", "file/below", "/dev/null/below")
        ),
        (("demo",), "file/figure.png"),
        (("demo",), "."),
    ],
)  # fmt: skip
def test_an_out_that_can_hold_no_results_is_named_at_once(command, out, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert run(*command, "--out", out) == 2
    message = capsys.readouterr().err.splitlines()
    assert len(message) == 2
    assert message[0].startswith("normprop: ")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("largest", [10**12, 2**62])
def test_labels_that_no_network_has_outputs_for(largest, tmp_path, capsys):
    import numpy as np

    x, y = np.zeros((40, 8, 8), np.uint8), np.arange(40) % 2
    y[3] = largest
    np.savez(tmp_path / "labels.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    assert run("train", *TINY, "--data", str(tmp_path / "labels.npz")) == 2
    assert capsys.readouterr().err.splitlines()[0].startswith("normprop: labels: a label is")
