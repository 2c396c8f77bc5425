"""How the rows of an optimizer step are dealt to devices: the one rule, computed once for a run and handed to whoever
plans, tells, deals or trains them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from gemma_ft.errors import UserError
from gemma_ft.recipe.schema import Recipe


@dataclass(frozen=True)
class BatchPlan:
    """global_batch_size rows of a step = micro_batch_size sequences that a rank computes at a time x accumulation_steps
    of them on each rank x ranks. How a step is cut changes memory and not the result.
    """

    global_batch_size: int
    micro_batch_size: int
    accumulation_steps: int
    ranks: int = 1

    def __post_init__(self) -> None:
        dealt = self.micro_batch_size * self.accumulation_steps * self.ranks
        assert dealt == self.global_batch_size, "a step is dealt without a rest"

    def smaller(self) -> BatchPlan:
        """The same step in micro-batches of half the size, or the next smaller part; there is one sequence at least
        after it.
        """
        size = self.micro_batch_size
        fewer = max(part for part in range(1, size) if size % part == 0)
        return replace(self, micro_batch_size=fewer, accumulation_steps=self.accumulation_steps * size // fewer)


def batch_plan(recipe: Recipe, ranks: int) -> BatchPlan:
    """The plan of a recipe on so many ranks: micro-batches of the size that the recipe says, or of the largest below it
    with which the global batch is dealt to all ranks without a rest.

    Raises: UserError when no size does.
    """
    train = recipe.train
    total = train.global_batch_size
    fitting = [size for size in range(1, train.micro_batch_size + 1) if total % (size * ranks) == 0]
    if fitting:
        return BatchPlan(total, fitting[-1], total // (fitting[-1] * ranks), ranks)
    fewer = [count for count in range(1, ranks) if total % count == 0][-2:]
    near = [size for size in (total // ranks * ranks, -(-total // ranks) * ranks) if size]
    raise UserError(
        f"train.global_batch_size: {total} rows cannot be dealt to {ranks} devices; use {' or '.join(map(str, fewer))} "
        f"device{'s' * (fewer[-1] > 1)}, or global_batch_size {' or '.join(map(str, near))}"
    )
