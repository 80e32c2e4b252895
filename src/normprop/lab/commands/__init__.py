"""The command line: `normprop COMMAND …`. Each command is a module, imported when it is asked for."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Sequence
from itertools import pairwise

from normprop.errors import NormPropError

__all__ = ["COMMANDS", "main"]

# Name: module, function, what it does. tyro turns the function's typed arguments into options.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "demo": ("normprop.lab.commands.demo", "demo", "see it train where BatchNorm can't, in two minutes, without downloads"),
    "train": ("normprop.lab.commands.train", "train", "train a network on a data set with any normaliser"),
    "compare": (
        "normprop.lab.commands.compare",
        "compare",
        "compare normalisers over learning rates, clippings and batch sizes",
    ),
    "reproduce": ("normprop.lab.commands.reproduce", "reproduce", "run the paper's experiments at three scales"),
    "inspect": ("normprop.lab.commands.inspect", "inspect", "predicted and measured moments of a network; what converts"),
    "moments": ("normprop.lab.commands.moments", "moments", "moments of activations for a Gaussian input"),
    "bench": (
        "normprop.lab.commands.bench",
        "bench",
        "what normalising costs: time and memory beside other normalisers and none",
    ),
    "data": ("normprop.lab.commands.data_sets", "data", "list the data sets, and where each is found"),
}

# The extra that installs a library; "cli" for all others.
_EXTRAS = {
    "matplotlib": "plot",
    "numpy": "data",
    "PIL": "data",
    "scipy": "data",
    "sklearn": "data",
    "timm": "integrations",
    "torchvision": "data",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 for a run that diverged, 2 for errors, 130 when interrupted.

    Example:
        >>> main(["moments", "relu", "--json"])  # doctest: +ELLIPSIS
        [{"function": "relu", "mean": 0.3989..., "std": 0.5838...
        0
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        print(f"normprop {importlib.metadata.version('normprop')}")
        return 0
    name, *rest = arguments
    try:
        if name not in COMMANDS:
            from normprop.lab.names import unknown

            raise unknown("command", name, COMMANDS, "normprop --help lists them.")
        import tyro

        module, function = _function(name, rest)
        command = getattr(importlib.import_module(module), function)
        style = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)
        code: int | None = tyro.cli(command, prog=f"normprop {name}", args=rest, config=style)
    except NormPropError as error:
        print(f"normprop: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library == "normprop":
            raise
        extra = _EXTRAS.get(library, "cli")
        print(f"normprop {name} needs {library}: pip install 'normprop[{extra}]'", file=sys.stderr)
        return 2
    except OSError as error:  # a disk that is full, a folder that can't be written
        where = f"{error.filename}: " if error.filename else ""
        print(f"normprop: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        print(f"\nnormprop: interrupted. {interruption}".rstrip(), file=sys.stderr)
        return 130
    return code or 0


def _function(name: str, arguments: Sequence[str]) -> tuple[str, str]:
    """Module and function of a command; a model of text and runs to the end of training have other options."""
    models = [after for option, after in pairwise(arguments) if option == "--model"]
    models += [argument.removeprefix("--model=") for argument in arguments]
    if name == "train" and "charlstm" in models:
        return "normprop.lab.commands.train_text", "train_text"
    if name == "reproduce" and arguments[:1] == ["long"]:
        return "normprop.lab.commands.reproduce_long", "reproduce_long"
    return COMMANDS[name][:2]


def _overview() -> str:
    rows = "\n".join(f"  {name:<10}{summary}" for name, (_, _, summary) in COMMANDS.items())
    return (
        "normprop: networks normalised by arithmetic instead of by batch statistics\n\n"
        f"usage: normprop COMMAND [options]\n\n{rows}\n\n"
        "normprop COMMAND --help shows a command's options. Under torchrun, train and reproduce share each batch:\n"
        "torchrun --nproc-per-node 2 -m normprop train …"
    )
