"""`gemma-ft train`: the main job, recipe in, tuned Gemma out."""

from typing import Annotated

import typer

from gemma_ft.errors import UserError


def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file, or the name of a shipped one.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings to change; ~key removes one.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in output_dir.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in output_dir.")] = False,
) -> int:
    """Tune Gemma as a recipe says."""
    if resume and overwrite:
        raise UserError("--resume and --overwrite: one continues the run, the other replaces it; give one")
    from gemma_ft.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    from gemma_ft.runtime import quiet_libraries

    quiet_libraries()
    from gemma_ft.train.run import train_recipe

    return train_recipe(loaded, resume=resume, overwrite=overwrite)
