"""Imports run one way, and the core needs torch alone."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "normprop"

# From what knows nothing to what knows all; a package imports from its own line or from those above.
LAYERS = [
    "errors precision double_backward traced_constant native",
    "activations channel_moments",
    "rules sites nn data",
    "integrations optim",
    "graph",
    "conversion",
    "inspection opacus",
    "lab",
]
LEVEL = {name: level for level, line in enumerate(LAYERS) for name in line.split()}
OUTER = {"lab", "integrations", "opacus"}  # may need more than torch


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
        for path in SOURCE.rglob("*.py")
    }


MODULES = modules()


def imports(path: Path, *, top: bool = False) -> Iterator[str]:
    """Absolute names of what a file imports, anywhere in it or at its top level only."""
    tree = ast.parse(path.read_text())
    for node in tree.body if top else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(name: str) -> str | None:
    """The module of ours that an imported name comes from."""
    parts = name.split(".")
    if parts[0] != "normprop":
        return None
    while parts[1:] and ".".join(parts[1:]) not in MODULES:
        parts.pop()
    return ".".join(parts[1:])


def family(module: str) -> str:
    return "opacus" if module.startswith("integrations.opacus") else module.partition(".")[0]


def edges() -> Iterator[tuple[str, str]]:
    for module, path in MODULES.items():
        for name in imports(path):
            target = own(name)
            if target and target != module and module not in ("__init__", "__main__"):
                yield module, target


def test_imports_run_one_way() -> None:
    for module, target in edges():
        a, b = family(module), family(target)
        if a in LEVEL and b in LEVEL:
            assert LEVEL[b] <= LEVEL[a], f"{module} imports {target}, which is further out"


def test_every_file_has_a_layer() -> None:
    assert {family(module) for module in MODULES} - LEVEL.keys() <= {"__init__", "__main__", ""}


def test_nn_needs_activations_and_sites_alone() -> None:
    below = {"nn", "activations", "sites", "errors", "precision", "double_backward"}
    assert {family(target) for module, target in edges() if family(module) == "nn"} <= below


def test_nothing_imports_the_command_line() -> None:
    inside = lambda module: module.startswith("lab.commands")
    assert not [(a, b) for a, b in edges() if inside(b) and not inside(a)]


def test_there_are_no_cycles() -> None:
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for module, path in MODULES.items():
        graph[module] |= {t for name in imports(path, top=True) if (t := own(name)) and t != module}
    graphlib.TopologicalSorter(graph).prepare()


def test_the_core_imports_torch_and_the_standard_library() -> None:
    for module, path in MODULES.items():
        if family(module) not in OUTER and module not in (
            "__main__",
            "inspection.depth_figure",
        ):  # imported for a plot alone
            foreign = {name.partition(".")[0] for name in imports(path)} - sys.stdlib_module_names - {"normprop", "torch"}
            assert not foreign, f"{module} imports {foreign}"


def fresh(code: str) -> str:
    """What a new process prints."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_compiler_is_not_imported() -> None:
    """It takes longer than torch itself."""
    slow = "torch._dynamo torch._inductor sympy tyro rich matplotlib torchvision".split()
    assert fresh(f"import sys, normprop, normprop.lab.commands; print([m for m in {slow!r} if m in sys.modules])") == "[]\n"


def test_the_overview_is_printed_without_any_command() -> None:
    code = (
        "import sys; from normprop.lab.commands import main; main(['--help']); "
        "print([m for m in sys.modules if 'lab.commands.' in m])"
    )
    printed = fresh(code)
    assert "usage: normprop COMMAND" in printed
    assert printed.endswith("[]\n")


def test_it_works_with_torch_alone() -> None:
    blocked = "numpy rich tyro matplotlib PIL sklearn scipy torchvision timm opacus onnx onnxscript onnxruntime".split()
    code = f"""
import sys, warnings
sys.modules.update(dict.fromkeys({blocked!r}))
warnings.simplefilter("ignore")  # torch notes that there is no numpy
import torch, normprop
net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.GELU(), torch.nn.Linear(8, 2))
model = normprop.convert(net)
model(torch.randn(1, 4)).sum().backward()
normprop.calibrate(model, torch.randn(9, 4))
normprop.fold(model)
normprop.propagate(net).table()
normprop.nn.Linear(4, 2, activation="relu")(torch.randn(1, 4))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
