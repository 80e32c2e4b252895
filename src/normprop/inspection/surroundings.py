"""What lies before and behind a row."""

from __future__ import annotations

from collections.abc import Sequence

from normprop.inspection.row import Row


class Surroundings:
    """The graph of a report's rows.

    Args:
        rows: in order.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = {row.name: row for row in rows}
        self.users: dict[str, list[Row]] = {row.name: [] for row in rows}
        self.numbers: dict[str, int] = {}
        self.layers = 0
        self._averaged: dict[str, bool] = {}
        self._normalised: dict[str, bool] = {}
        for row in rows:
            sources = self.sources(row)
            for source in sources:
                self.users[source.name].append(row)
            before = max((self.numbers[source.name] for source in sources), default=0)
            self.numbers[row.name] = before + (row.role == "linear")
            self.layers = max(self.layers, self.numbers[row.name])
            self._averaged[row.name] = self._is_averaged(row, sources)
        for row in reversed(rows):
            self._normalised[row.name] = self._is_normalised(row)

    def sources(self, row: Row) -> list[Row]:
        """The rows that a row reads."""
        return [self.rows[name] for name in row.inputs if name in self.rows]

    def layer(self, row: Row) -> int:
        """How many linear layers the longest way from the input to a row has, its own among them."""
        return self.numbers[row.name]

    def averaged(self, row: Row) -> bool:
        """Whether a row holds averages over positions or tokens: little but means is left of those."""
        return self._averaged[row.name]

    def normalised(self, row: Row) -> bool:
        """Whether a normaliser reads a row, and all that is made of it without an activation or a layer between."""
        return self._normalised[row.name]

    def _is_averaged(self, row: Row, sources: Sequence[Row]) -> bool:
        if row.role == "normaliser":
            return False
        if row.role == "average":
            return True
        if row.role == "join":  # a gate made of averages multiplies what is none
            return bool(sources) and all(self._averaged[source.name] for source in sources)
        return any(self._averaged[source.name] for source in sources)

    def _is_normalised(self, row: Row) -> bool:
        users = self.users[row.name]
        passing = ("other", "join")
        return bool(users) and all(
            user.role == "normaliser" or (user.role in passing and self._normalised[user.name]) for user in users
        )
