"""`gemma-ft preview`: the tokens a recipe would train on, and whether they are sound."""

from typing import Annotated

import typer


def preview(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file, or the name of a shipped one.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings to change; ~key removes one.")
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows to show.")] = 3,
) -> int:
    """Show rows as tokens, trained or masked; exit 2 on a fault."""
    from gemma_ft.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    from gemma_ft.runtime import quiet_libraries

    quiet_libraries()
    from gemma_ft.build import preview_recipe

    return 0 if preview_recipe(loaded, rows=rows) else 2
