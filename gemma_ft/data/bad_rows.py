"""Rows that cannot be used: collected while reading, reported once, so that one run shows more than the first fault."""

from gemma_ft.errors import DataError

SHOWN = 5


class BadRows:
    """Collects `file:line: reason` lines; `raise_if_any` turns them into one DataError that lists the first five."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.count = 0

    def add(self, where: str, reason: str) -> None:
        """Remembers one bad row."""
        self.count += 1
        if len(self.shown) < SHOWN:
            self.shown.append(f"{where}: {reason}")

    def extend(self, others: "BadRows") -> None:
        """Remembers those of another collection, behind its own."""
        self.count += others.count
        self.shown = (self.shown + others.shown)[:SHOWN]

    def raise_if_any(self) -> None:
        """Nothing when every row was good. Raises: DataError with the first five rows and the number of others."""
        if not self.count:
            return
        more = self.count - len(self.shown)
        tail = [f"... and {more} more bad row{'s' if more > 1 else ''}"] if more else []
        raise DataError("\n".join(self.shown + tail))
