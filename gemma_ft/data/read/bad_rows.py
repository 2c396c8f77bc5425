"""Rows that cannot be used: collected while reading, told once, so that one run shows more than the first fault."""

import math

from gemma_ft.errors import DataError

SHOWN = 5
KEPT = 100_000  # more than a chunk has rows
SKIPPED_AT_MOST = 0.001  # share of the rows that may be left out unasked; more are a fault of the whole


class BadRows:
    """Collects places and reasons; `raise_if_any` turns them into one DataError that lists the first five."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str]] = []  # (where, reason), KEPT at most
        self.count = 0

    def add(self, where: str, reason: str) -> None:
        """Remembers one bad row."""
        self.count += 1
        if len(self.rows) < KEPT:
            self.rows.append((where, reason))

    def extend(self, others: "BadRows") -> None:
        """Remembers those of another collection, behind its own."""
        self.count += others.count
        self.rows = (self.rows + others.rows)[:KEPT]

    def raise_if_any(self) -> None:
        """Nothing when every row was good. Raises: DataError with the first five rows and the number of others."""
        if self.count:
            raise DataError("\n".join(self._lines()))

    def raise_if_many(self, rows: int) -> None:
        """As `raise_if_any`, when they are more than SKIPPED_AT_MOST of so many rows; one bad row is never too many."""
        if self.count > max(1, math.floor(rows * SKIPPED_AT_MOST)):
            told = f"{self.count:,} of {rows:,} rows are bad, more than data.on_bad_row: skip leaves out"
            raise DataError("\n".join([f"{told} ({SKIPPED_AT_MOST:.1%}); mend them, or the format", *self._lines()]))

    def _lines(self) -> list[str]:
        shown = [f"{where}: {reason}" for where, reason in self.rows[:SHOWN]]
        more = self.count - len(shown)
        return shown + ([f"... and {more} more bad row{'s' if more > 1 else ''}"] if more else [])
