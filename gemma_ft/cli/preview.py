"""`gemma-ft preview`: the tokens a recipe would train on, and whether they are sound."""

from pathlib import Path
from typing import Annotated

import typer

from gemma_ft.cli.start import check_weights
from gemma_ft.system.paths import given_path


def preview(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file, or the name of a shipped one.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings to change; ~key removes one.")
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Examples to show.")] = 3,
    row_ids: Annotated[
        list[str] | None,
        typer.Option("--row-id", metavar="WHERE", help="Show the examples that hold this row: file.jsonl:12, or 12."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write it as a page, too.", parser=given_path)
    ] = None,
) -> int:
    """Show rows as tokens, trained or masked; exit 2 on a fault."""
    from gemma_ft.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    check_weights(loaded.recipe)
    from gemma_ft.system.environment import quiet_libraries

    quiet_libraries()
    from gemma_ft.ui.data_preview import preview_and_show

    if html is None:
        return 2 if preview_and_show(loaded, rows=rows, row_ids=row_ids or ()).faults else 0
    from gemma_ft.ui.pages.preview import check_page, write_preview

    check_page(html)
    found = preview_and_show(loaded, rows=rows, row_ids=row_ids or ())
    print(f"page: {write_preview(found, html, recipe=loaded.path)}")
    return 2 if found.faults else 0
