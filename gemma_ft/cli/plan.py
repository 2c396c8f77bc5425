"""`gemma-ft plan`: the memory that a model or a recipe takes, before anything is downloaded."""

from typing import TYPE_CHECKING, Annotated

import typer

from gemma_ft.cli.start import check_weights
from gemma_ft.errors import UserError

if TYPE_CHECKING:
    from gemma_ft.plan.run import Ranks
    from gemma_ft.plan.shape import Shape

Name = Annotated[
    str | None,
    typer.Argument(
        metavar="RECIPE_OR_PRESET",
        help="Recipe file or name, or a preset, or a folder with a model; none: all published sizes.",
    ),
]
Cpu = Annotated[str | None, typer.Option("--cpu", metavar="SIZE", help="Memory of a machine without a GPU: 8GiB.")]
Gpu = Annotated[str | None, typer.Option("--gpu", metavar="SIZE", help="Memory of your GPU, such as 24GiB.")]


def plan(
    name: Name = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings to change; ~key removes one.")
    ] = None,
    gpu: Gpu = None,
    cpu: Cpu = None,
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
    if cpu is not None and (gpu is not None or launch is not None):
        raise UserError("--cpu: plans a machine without a GPU; leave --gpu and --launch out")
    from gemma_ft.plan.gpus import cpu_bytes, gpu_bytes
    from gemma_ft.ui.plan import cpu_plan, known, model_plan, overview, recipe_plan

    size = gpu_bytes(gpu) if gpu is not None else None
    shape = _shape(name) if name is not None else None
    if name is None or shape is not None:
        if cpu is not None:
            raise UserError("--cpu: name a recipe that is to fit")
        if overrides or launch is not None:
            raise UserError("plan: settings and --launch belong to a recipe; name one")
        if name is None and size is not None:
            raise UserError("--gpu: name a recipe or a preset that is to fit")
        print(overview() if shape is None else model_plan(shape, size))
        return 0
    from gemma_ft.recipe.load import load_recipe
    from gemma_ft.system.shipped import locate_recipe

    if locate_recipe(name) is None:
        raise UserError(f"{name}: no recipe and no preset; {known()}")
    loaded = load_recipe(name, overrides or ())
    check_weights(loaded.recipe)
    if cpu is not None:
        text, fits = cpu_plan(loaded, cpu_bytes(cpu))
    else:
        text, fits = recipe_plan(loaded, size, _ranks(launch, nproc))
    print(text)
    return 0 if fits else 2


def _shape(name: str) -> "Shape | None":
    """The shape of a preset, or of a model in a folder; None for what is neither."""
    from gemma_ft.families.records import PRESETS
    from gemma_ft.plan.shape import preset_shape, shape_in
    from gemma_ft.system.shipped import locate

    if name in PRESETS:
        return preset_shape(name)
    found = locate(name)
    if found is None:
        return None
    folder = found.parent if found.name == "config.json" else found
    return shape_in(folder) if (folder / "config.json").is_file() else None


def _ranks(launch: str | None, nproc: int | None) -> "Ranks":
    from gemma_ft.plan.run import Ranks, ranks_in

    if launch is None:
        return Ranks()
    from gemma_ft.system.launch import find_config

    return ranks_in(find_config(launch), nproc)
