"""`normprop data`."""

from __future__ import annotations

from rich.table import Table

from normprop.lab.commands.console import console
from normprop.lab.samples.datasets import SOURCES, Place, data_root, locate


def data() -> None:
    """List the data sets that --data knows by name, and where each is found on this machine.

    The folder is $NORMPROP_DATA, by default ~/.cache/normprop. NAME.npz is looked for first, then torchvision's files;
    what isn't there is downloaded by torchvision when it is first used. FILE.npz and folders of images work too.
    """
    table = Table(title=f"Data sets; folder {data_root()}", title_justify="left")
    table.add_column("name")
    for column in ("train", "test"):
        table.add_column(column, justify="right")
    for column in ("shape", "classes", "found", "licence"):
        table.add_column(column)
    for name, source in SOURCES.items():
        shape = "×".join(map(str, source.shape))
        sizes = (f"{source.train:,}", f"{source.test:,}", shape, str(source.classes))
        table.add_row(name, *sizes, _found(locate(name)), source.licence)
    console().print(table)


def _found(place: Place) -> str:
    match place.kind:
        case "bundled":
            return "bundled with scikit-learn"
        case "download":
            return "not here; downloaded on first use"
    assert place.path is not None
    megabytes = sum(f.stat().st_size for f in ([place.path] if place.path.is_file() else place.path.rglob("*"))) / 1e6
    return f"{place.path.name} ({megabytes:,.0f} MB)"
