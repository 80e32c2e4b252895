"""One thing in a network that its user should know of."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """A fault, where it is, and how large.

    Attributes:
        kind: "overflow", "jump", "explosion", "collapse", "statistics", "drift", "dead", "saturated", "mean", "input",
            "shape" or "scarce".
        severity: "error" where nothing can be learned, "warning", or "note" for what a normaliser behind it takes back.
        name: of the `Row`.
        path: module path of the row.
        value: what the finding is about, in the unit that the sentence names.
        sentence: the finding in words, with its place.
        source: ``file:line`` of the model's code.
    """

    kind: str
    severity: Severity
    name: str
    path: str
    value: float
    sentence: str
    source: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.sentence}{f' ({self.source})' if self.source else ''}"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        return asdict(self)
