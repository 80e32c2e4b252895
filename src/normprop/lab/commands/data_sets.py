"""`normprop data`."""

from __future__ import annotations

from normprop.lab.commands.console import console, on_screen
from normprop.lab.pages.text_table import Table
from normprop.lab.samples.datasets import SOURCES, TEXTS, Place, data_root, locate


def data() -> None:
    """List the data sets that --data knows by name, and where this machine has them.

    They are kept in $NORMPROP_DATA, by default ~/.cache/normprop. NAME.npz is looked for first, then torchvision's files;
    torchvision downloads what isn't there on first use. --data also takes FILE.npz and folders of images. Texts, for --model
    charlstm, are NAME.txt there, or any FILE.txt.
    """
    columns = ("name", "train", "test", "shape", "classes", "found", "licence")
    rows = []
    for name, source in SOURCES.items():
        sizes = (f"{source.train:,}", f"{source.test:,}", "×".join(map(str, source.shape)), str(source.classes))
        rows.append((name, *sizes, _found(locate(name)), source.licence))
    screen = console()
    screen.print(on_screen(Table(columns, rows, f"Data sets; folder {data_root()}", words=(0, 5, 6))))
    for name in TEXTS:
        file = data_root() / f"{name}.txt"
        found = f"{file.name} ({file.stat().st_size / 1e6:,.0f} MB)" if file.is_file() else f"not here; put it into {file}"
        screen.print(f"text for --model charlstm: {name}, {found}", soft_wrap=True)


def _found(place: Place) -> str:
    match place.kind:
        case "bundled":
            return "bundled with scikit-learn"
        case "download":
            return "not here; downloaded on first use"
    assert place.path is not None
    megabytes = sum(f.stat().st_size for f in ([place.path] if place.path.is_file() else place.path.rglob("*"))) / 1e6
    return f"{place.path.name} ({megabytes:,.0f} MB)"
