"""How the rows of an optimizer step are dealt to devices: the one rule, which training and the planner both ask."""

from __future__ import annotations

from gemma_ft.errors import UserError
from gemma_ft.recipe.schema import Recipe


def micro_batch(recipe: Recipe, ranks: int) -> int:
    """Rows that each rank computes at a time: as many as the recipe says, or the most below with which the global batch
    is dealt to all ranks without a rest. It changes memory and not the result.

    Raises: UserError when no number does.
    """
    train = recipe.train
    fitting = [size for size in range(1, train.micro_batch_size + 1) if train.global_batch_size % (size * ranks) == 0]
    if fitting:
        return fitting[-1]
    total = train.global_batch_size
    fewer = [count for count in range(1, ranks) if total % count == 0][-2:]
    near = [size for size in (total // ranks * ranks, -(-total // ranks) * ranks) if size]
    raise UserError(
        f"train.global_batch_size: {total} rows cannot be dealt to {ranks} devices; use {' or '.join(map(str, fewer))} "
        f"device{'s' * (fewer[-1] > 1)}, or global_batch_size {' or '.join(map(str, near))}"
    )


def accumulation(recipe: Recipe, ranks: int) -> int:
    """Micro-batches that each rank computes for one optimizer step. Raises: UserError as `micro_batch`."""
    return recipe.train.global_batch_size // (micro_batch(recipe, ranks) * ranks)
