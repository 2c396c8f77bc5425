"""What a checkpoint of a run holds, beyond the folder that holds it: weights, optimizer, place in the schedule,
randomness.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

from gemma_ft.checkpoint import load_tensors, save_tensors, write_json
from gemma_ft.errors import CheckpointError

WEIGHTS, OPTIMIZER, RANDOM, STATE = "weights.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"


def save_weights(folder: Path, model: nn.Module) -> None:
    """Write the trainable parameters, and only those: an adapter run never saves its base. A tied weight is written
    once.
    """
    save_tensors(folder / WEIGHTS, {name: p for name, p in model.named_parameters() if p.requires_grad})


def load_weights(folder: Path, model: nn.Module) -> None:
    """Put the trainable parameters of a checkpoint into `model`.

    Raises: CheckpointError when names or shapes are not those of this run.
    """
    saved = load_tensors(folder / WEIGHTS)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if {n: t.shape for n, t in saved.items()} != {n: p.shape for n, p in trainable.items()}:
        raise CheckpointError(f"{folder}: holds other weights than this recipe trains; use the recipe that wrote it")
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(saved[name])


def save_optimizer(folder: Path, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Write the optimizer's tensors as `<kind>:<parameter name>`, e.g. `exp_avg:...lora_A.weight`."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors = {
        f"{kind}:{names[id(parameter)]}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for kind, value in state.items()
    }
    save_tensors(folder / OPTIMIZER, tensors)


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Put the tensors of `save_optimizer` into `optimizer`, parameter by parameter, by name."""
    parameters = dict(model.named_parameters())
    for key, value in load_tensors(folder / OPTIMIZER).items():
        kind, name = key.split(":", 1)
        parameter = parameters[name]
        optimizer.state[parameter][kind] = value.to(parameter.device)


def save_randomness(folder: Path) -> None:
    """Write the state of every random generator that training draws from (torch, CUDA, numpy, Python)."""
    kind, keys, position, has_gauss, gauss = numpy.random.get_state(legacy=True)
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(numpy.asarray(keys).astype(numpy.int64))}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    save_tensors(folder / RANDOM, tensors)
    version, words, gauss_next = random.getstate()
    scalars = {
        "numpy": [str(kind), int(position), int(has_gauss), float(gauss)],
        "python": [version, list(words), gauss_next],
    }
    write_json(folder / "random.json", scalars)


def load_randomness(folder: Path) -> None:
    """Restore what `save_randomness` wrote."""
    tensors = load_tensors(folder / RANDOM)
    scalars = json.loads((folder / "random.json").read_text(encoding="utf-8"))
    torch.set_rng_state(tensors["torch"].to(torch.uint8))
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"].to(torch.uint8))
    kind, position, has_gauss, gauss = scalars["numpy"]
    numpy.random.set_state((kind, tensors["numpy"].numpy().astype(numpy.uint32), position, has_gauss, gauss))
    version, words, gauss_next = scalars["python"]
    random.setstate((version, tuple(words), gauss_next))


@contextlib.contextmanager
def randomness_kept() -> Iterator[None]:
    """Whatever is drawn while this is open, training draws afterwards what it would have drawn without it.

    An evaluation draws too: each pass of a data loader takes a seed from torch's generator.
    """
    numpy_state, python_state = numpy.random.get_state(), random.getstate()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        numpy.random.set_state(numpy_state)
        random.setstate(python_state)


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write the small figures of a run: step, tokens, seconds, the scores before training."""
    write_json(folder / STATE, state)


def load_state(folder: Path) -> dict[str, Any]:
    """Read what `save_state` wrote."""
    state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return state
