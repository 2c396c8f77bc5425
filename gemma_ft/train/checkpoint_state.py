"""What a checkpoint of a run holds, beyond the folder that holds it: weights, optimizer, place in the schedule.

Nothing of it depends on the number of ranks: tensors are whole, and there is no random state, because what training
draws is a function of the seed, the step and the micro-batch (step.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from gemma_ft.build.weights import load_tensors, save_tensors
from gemma_ft.errors import CheckpointError, DiskError, NonFiniteError
from gemma_ft.system.files import is_disk_full, write_json
from gemma_ft.train.distributed import World
from gemma_ft.train.fsdp import put, reshard, whole

WEIGHTS, OPTIMIZER, STATE = "weights", "optimizer", "state.json"
FILE_BYTES = 2**30  # of tensors in one file: what a rank gathers and holds at a time


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters by name, and only those: an adapter run never saves its base. A tied weight is one."""
    reshard(model)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_weights(folder: Path | None, model: nn.Module, world: World) -> None:
    """Write the trainable parameters; every rank takes part, and the one that writes has a `folder`."""
    _save(folder, WEIGHTS, trained(model), world)


def load_weights(folder: Path, model: nn.Module) -> None:
    """Put the trainable parameters of a checkpoint into `model`, each rank its slices.

    Raises: CheckpointError when names or shapes are not those of this run.
    """
    saved, parameters = _load(folder, WEIGHTS), trained(model)
    if {n: t.shape for n, t in saved.items()} != {n: p.shape for n, p in parameters.items()}:
        raise CheckpointError(f"{folder}: holds other weights than this recipe trains; use the recipe that wrote it")
    for name, parameter in parameters.items():
        put(parameter, saved[name])


def save_optimizer(folder: Path | None, optimizer: torch.optim.Optimizer, model: nn.Module, world: World) -> None:
    """Write the optimizer's tensors as `<kind>:<parameter name>`, e.g. `exp_avg:...lora_A.weight`; as save_weights."""
    tensors = {
        f"{kind}:{name}": torch.as_tensor(value)
        for name, parameter in trained(model).items()
        for kind, value in optimizer.state[parameter].items()
    }
    _save(folder, OPTIMIZER, tensors, world)


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Put the tensors of `save_optimizer` into `optimizer`, parameter by parameter, by name.

    Raises: CheckpointError when they are not those of this run's parameters.
    """
    parameters, saved = trained(model), _load(folder, OPTIMIZER)
    if not saved:  # no update was made yet: each one was left out, for it was not finite
        return
    lost = sorted(parameters.keys() - {key.partition(":")[2] for key in saved})
    if lost:
        raise CheckpointError(f"{folder}: has no optimizer state of {lost[0]}; use the recipe that wrote it")
    for key, value in saved.items():
        kind, name = key.split(":", 1)
        parameter = parameters[name]
        if value.shape == parameter.shape and value.dim():
            state = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
            put(state, value)
        else:  # a count of steps
            state = value.to(parameter.device)
        optimizer.state[parameter][kind] = state


def _save(folder: Path | None, stem: str, tensors: dict[str, Tensor], world: World) -> None:
    """Write whole tensors into `<stem>-<number>.safetensors`, a file at a time, so that ranks never wait for one that
    has failed to write.
    """
    for number, names in enumerate(_files(tensors)):
        gathered = {name: whole(tensors[name].detach()) for name in names}
        damaged = next((name for name, one in gathered.items() if not bool(one.isfinite().all())), None)
        if damaged is not None:  # on all ranks alike
            raise NonFiniteError(f"{damaged} holds NaN or infinity; this checkpoint was not saved, --resume goes back")
        error: Exception | None = None
        if folder is not None:
            try:
                save_tensors(folder / f"{stem}-{number:05d}.safetensors", gathered)
            except Exception as one:
                error = one
                if isinstance(one, OSError | SafetensorError) and is_disk_full(one):  # what all ranks go on after
                    error = DiskError(f"{folder}: no space left to write it; free some")
        world.agree(error)


def _load(folder: Path, stem: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob(f"{stem}-*.safetensors")):
        found |= load_tensors(file)
    return found


def _files(tensors: dict[str, Tensor]) -> Iterator[list[str]]:
    """Names for each file, in order, of FILE_BYTES or a single tensor at most; one file where there are none."""
    names: list[str] = []
    filled = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if names and filled + size > FILE_BYTES:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += size
    yield names


def bytes_of(model: nn.Module) -> int:
    """About how much a checkpoint takes at most: the weights, and two float32 moments of each."""
    return 3 * sum(parameter.numel() * parameter.element_size() for parameter in trained(model).values())


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write the small figures of a run: step, tokens, seconds, the scores before training."""
    write_json(folder / STATE, state)


def load_state(folder: Path) -> dict[str, Any]:
    """Read what `save_state` wrote."""
    state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return state
