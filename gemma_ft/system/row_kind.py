"""What an objective learns from: answers, pairs of a better and a worse answer, or answers with a label each."""

from typing import Literal

RowKind = Literal["answers", "pairs", "labelled"]
