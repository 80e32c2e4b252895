"""The page of the paper's experiments as it is before anything was run."""

from __future__ import annotations

from normprop.lab.pages.marked_page import marked
from normprop.lab.reproduction.experiment_tables import HEADINGS

SETTING, UNFINISHED = "setting", "not-run"


def skeleton() -> str:
    """A heading and an empty block for each experiment."""
    sections = "\n\n".join(f"## {heading}\n\n{marked(part, '')}" for part, heading in HEADINGS.items())
    return (
        f"# The paper's experiments\n\n{marked(SETTING, '')}\n\n{sections}\n\n"
        f"## What was not run\n\n{marked(UNFINISHED, '')}\n"
    )
