"""`gemma-ft plan`: the memory that a model or a recipe takes, before anything is downloaded."""

from typing import TYPE_CHECKING, Annotated

import typer

from gemma_ft.cli.start import check_weights
from gemma_ft.errors import UserError

if TYPE_CHECKING:
    from gemma_ft.plan.run import Ranks

Name = Annotated[
    str | None,
    typer.Argument(metavar="RECIPE_OR_PRESET", help="Recipe file or name, or a preset; none: all published sizes."),
]
Gpu = Annotated[str | None, typer.Option("--gpu", metavar="SIZE", help="Memory of your GPU, such as 24GiB.")]


def plan(
    name: Name = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings to change; ~key removes one.")
    ] = None,
    gpu: Gpu = None,
    launch: Annotated[
        str | None, typer.Option("--launch", metavar="NAME", help="On the ranks of accelerate_configs/NAME.yaml.")
    ] = None,
    nproc: Annotated[
        int | None, typer.Option("--nproc", metavar="N", min=1, help="With --launch: how many ranks.")
    ] = None,
) -> int:
    """Show what fits into which GPU, and the smallest change that makes a recipe fit; exit 2 where it does not fit."""
    if nproc is not None and launch is None:
        raise UserError("--nproc: says how many ranks --launch starts; add --launch NAME")
    from gemma_ft.plan.gpus import gpu_bytes
    from gemma_ft.ui.plan import is_preset, known, overview, preset_plan, recipe_plan

    size = gpu_bytes(gpu) if gpu is not None else None
    if name is None or is_preset(name):
        if overrides or launch is not None:
            raise UserError("plan: settings and --launch belong to a recipe; name one")
        if name is None and size is not None:
            raise UserError("--gpu: name a recipe or a preset that is to fit")
        print(overview() if name is None else preset_plan(name, size))
        return 0
    from gemma_ft.recipe.load import load_recipe
    from gemma_ft.system.shipped import locate_recipe

    if locate_recipe(name) is None:
        raise UserError(f"{name}: no recipe and no preset; {known()}")
    loaded = load_recipe(name, overrides or ())
    check_weights(loaded.recipe)
    text, fits = recipe_plan(loaded, size, _ranks(launch, nproc))
    print(text)
    return 0 if fits else 2


def _ranks(launch: str | None, nproc: int | None) -> "Ranks":
    from gemma_ft.plan.run import Ranks, ranks_in

    if launch is None:
        return Ranks()
    from gemma_ft.system.launch import find_config

    return ranks_in(find_config(launch), nproc)
