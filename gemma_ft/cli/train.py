"""`gemma-ft train`: the main job, recipe in, tuned Gemma out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_ft.cli.start import check_weights
from gemma_ft.errors import UserError
from gemma_ft.system.paths import given_path

if TYPE_CHECKING:
    from gemma_ft.recipe.load import LoadedRecipe

Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in output_dir.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run in output_dir.")]
Launch = Annotated[
    str | None,
    typer.Option("--launch", metavar="NAME", help="Start ranks as accelerate_configs/NAME.yaml, or a file, says."),
]
Nproc = Annotated[int | None, typer.Option("--nproc", metavar="N", min=1, help="With --launch: how many ranks.")]
StopFile = Annotated[
    Path | None,
    typer.Option("--stop-file", metavar="FILE", help="When it appears, stop with a checkpoint.", parser=given_path),
]
AllowDrift = Annotated[
    list[str] | None,
    typer.Option("--allow-drift", metavar="KEY", help="With --resume: a setting, data, base or tokenizer may differ."),
]

ProveResume = Annotated[
    bool,
    typer.Option("--prove-resume", help="Instead: a few steps whole, and killed and resumed; are they the same run?"),
]


def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file, or the name of a shipped one.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings to change; ~key removes one.")
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    launch: Launch = None,
    nproc: Nproc = None,
    stop_file: StopFile = None,
    allow_drift: AllowDrift = None,
    prove_resume: ProveResume = False,
) -> int:
    """Tune Gemma as a recipe says.

    SIGTERM, SIGHUP, Ctrl-C and SIGUSR1 end a run after its step, with a checkpoint; a second one ends it at once.
    """
    if resume and overwrite:
        raise UserError("--resume and --overwrite: one continues the run, the other replaces it; give one")
    if allow_drift and not resume:
        raise UserError("--allow-drift: nothing can differ from a run that is not resumed; add --resume")
    if nproc is not None and launch is None:
        raise UserError("--nproc: says how many ranks --launch starts; add --launch NAME")
    from gemma_ft.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    check_weights(loaded.recipe)
    if prove_resume:
        return _prove(loaded, [recipe, *(overrides or ())])
    if launch is not None:
        from gemma_ft.system.launch import launch_ranks

        words = [recipe, *(overrides or ()), *(["--resume"] if resume else []), *(["--overwrite"] if overwrite else [])]
        words += ["--stop-file", str(stop_file)] if stop_file is not None else []
        words += [word for key in allow_drift or () for word in ("--allow-drift", key)]
        return launch_ranks(launch, nproc, ["train", *words])
    from gemma_ft.system.environment import quiet_libraries

    quiet_libraries()
    from gemma_ft.ui.training import train_and_show

    return train_and_show(
        loaded, resume=resume, overwrite=overwrite, stop_file=stop_file, allow_drift=allow_drift or ()
    )


def _prove(loaded: "LoadedRecipe", words: list[str]) -> int:
    from gemma_ft.system.environment import quiet_libraries

    quiet_libraries()
    from gemma_ft.verify.resume import prove_resume

    return prove_resume(loaded, words, lambda line: typer.echo(f"  {line}"))
