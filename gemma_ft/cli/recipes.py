"""`gemma-ft recipes`: list, show and copy the recipes that ship with the project."""

from pathlib import Path
from typing import Annotated

import typer

from gemma_ft.errors import UserError
from gemma_ft.system.paths import given_path

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of a shipped recipe, or a recipe file.")]


def build_app() -> typer.Typer:
    """The typer application of the verb."""
    app = typer.Typer(help="List, show and copy the shipped recipes.", rich_markup_mode=None)
    app.callback(invoke_without_command=True)(_list_by_default)
    app.command("list")(list_recipes)
    app.command("show")(show_recipe)
    app.command("cp")(copy_recipe)
    return app


def _list_by_default(context: typer.Context) -> int:
    """List, show and copy the shipped recipes."""
    return list_recipes() if context.invoked_subcommand is None else 0


def list_recipes() -> int:
    """List the shipped recipes: name, model, strategy, data."""
    from gemma_ft.recipe.load import load_recipe, names_of
    from gemma_ft.system.shipped import shipped_recipes

    lines = [("recipe", "model", "strategy", "data")]
    for path in shipped_recipes():
        recipe = load_recipe(path).recipe
        lines.append((path.stem, recipe.model.preset, recipe.strategy, names_of(recipe.data.train)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    return 0


def show_recipe(
    name: Name,
    resolved: Annotated[bool, typer.Option("--resolved", help="With its parent and every default.")] = False,
) -> int:
    """Print a recipe as it is written, or resolved."""
    from gemma_ft.recipe.load import dump_recipe, load_recipe

    loaded = load_recipe(name)
    print(dump_recipe(loaded.recipe) if resolved else loaded.path.read_text(encoding="utf-8"), end="")
    return 0


def copy_recipe(
    name: Name,
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="A new file, or a folder.", parser=given_path)],
) -> int:
    """Copy a recipe to a file of your own, to be edited there."""
    from gemma_ft.recipe.load import load_recipe

    source = load_recipe(name).path
    target = destination / source.name if destination.is_dir() else destination
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{target.parent}: cannot be a folder: {error.strerror}") from None
    try:
        with target.open("xb") as stream:  # x: what is there already is the user's
            stream.write(source.read_bytes())
    except FileExistsError:
        raise UserError(f"{target}: exists already; choose another name") from None
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror}") from None
    print(target)
    return 0
