"""`gemma-ft data`: look at the rows of a recipe, and write cleaned copies of them."""

from pathlib import Path
from typing import Annotated

import typer

from gemma_ft.cli.start import check_weights
from gemma_ft.system.paths import given_path

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file, or the name of a shipped one.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings to change; ~key removes one.")
]


def build_app() -> typer.Typer:
    """The typer application of the verb."""
    app = typer.Typer(help="Look at the rows of a recipe, and clean them.", rich_markup_mode=None)
    app.callback(invoke_without_command=True)(_help_by_default)
    app.command("check")(check)
    app.command("fix")(fix)
    return app


def _help_by_default(context: typer.Context) -> None:
    """Look at the rows of a recipe, and clean them."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def check(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="Where the report goes.", parser=given_path)
    ] = Path("data_report.json"),
    strict: Annotated[bool, typer.Option("--strict", help="Exit 2 on warnings too.")] = False,
) -> int:
    """Find what is wrong with the rows; exit 2 on an error.

    Bad rows; rows that repeat another, exactly or nearly; held-out rows among the training rows; empty and repeated
    answers; damaged text; secrets; rows that are too long. No row is printed.
    """
    from gemma_ft.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    check_weights(loaded.recipe)
    from rich.console import Console

    from gemma_ft.system.environment import quiet_libraries

    quiet_libraries()
    from gemma_ft.ui.data_check import check_and_show

    return check_and_show(loaded.recipe, out, strict=strict, console=Console())


def fix(
    recipe: RecipeName,
    out: Annotated[
        Path,
        typer.Option("--out", metavar="FOLDER", help="The new folder.", show_default=False, parser=given_path),
    ],
    overrides: Overrides = None,
) -> int:
    """Write cleaned copies of the rows.

    Bad rows, exact repetitions, rows with U+FFFD and training rows that are held out as well are left out; byte order
    marks and CRLF go; all else stays as it was. changes.log has a line for every change.
    """
    from gemma_ft.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    check_weights(loaded.recipe)
    from rich.console import Console

    from gemma_ft.system.environment import quiet_libraries

    quiet_libraries()
    from gemma_ft.ui.data_check import fix_and_show

    fix_and_show(loaded.recipe, out, console=Console())
    return 0
