"""Documents -> rows of a token budget, as full as a simple rule gets them."""

from bisect import bisect_left, insort
from collections.abc import Sequence


def best_fit_decreasing(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Rows of document indices, each row's lengths summing to at most `budget`; every index occurs exactly once.

    Longest first, each into the fullest row that still has room: O(n log n) comparisons. Deterministic. Rows are
    ordered by their first document, and documents within a row by index: the data's own order survives where it can.
    """
    assert all(0 < length <= budget for length in lengths), "cut or drop documents to the budget before packing"
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    rows: list[list[int]] = []
    rooms: list[int] = []  # the distinct free spaces of open rows, ascending
    rows_with: dict[int, list[int]] = {}  # free space -> open rows that have it
    for index in order:
        length = lengths[index]
        at = bisect_left(rooms, length)
        if at == len(rooms):
            row, room = len(rows), budget
            rows.append([])
        else:
            room = rooms[at]
            row = rows_with[room].pop()
            if not rows_with[room]:
                del rows_with[room], rooms[at]
        rows[row].append(index)
        left = room - length
        if left and left not in rows_with:
            insort(rooms, left)
            rows_with[left] = []
        if left:
            rows_with[left].append(row)
    return sorted((sorted(row) for row in rows), key=lambda row: row[0])
