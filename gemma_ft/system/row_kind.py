"""What an objective learns from: answers, pairs of a better and a worse answer, or answers with a label each."""

from typing import Literal

RowKind = Literal["answers", "pairs", "labelled"]
DOCUMENTS_OF: dict[RowKind, int] = {"answers": 1, "labelled": 1, "pairs": 2}  # of a row: a pair has one for each half
