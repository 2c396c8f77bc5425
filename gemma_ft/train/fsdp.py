"""FSDP2 around a model: its base read on rank 0, a tensor at a time, quantized on the way, each rank keeping its slice.

accelerate's own preparation of a model cannot do this: it needs the whole model on every rank, or at least once, and
leaves 4-bit weights out of its memory-saving path (accelerate.utils.fsdp_utils.fsdp2_prepare_model). So no process ever
holds more than its shards and one tensor, however many ranks there are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from gemma_ft.adapters.quantize import fill_quantized, quantized
from gemma_ft.adapters.trainable_tokens import native_of
from gemma_ft.build.empty_weights import base_name, is_empty
from gemma_ft.build.located import Source, folder_of
from gemma_ft.build.text_weights import model_weights
from gemma_ft.errors import UserError
from gemma_ft.system import hardware
from gemma_ft.train.distributed import World


def shard(model: Any, source: Source | None, world: World) -> None:
    """Shard a model over all ranks, in place: one unit per decoder layer, embedding and head in the root's.

    What is unfilled (`unfilled`) is filled from `source`, what is there (adapters, fresh weights) is cut into slices.
    Raises: UserError before anything is wrapped, naming the parameter that FSDP cannot move.
    """
    assert world.mesh is not None, "several ranks"
    native = native_of(model)
    check_dtypes(model)
    unfilled = {name for name, parameter in model.named_parameters() if is_empty(parameter)}
    _to_meta(model)
    native.tie_weights()
    policy = CPUOffloadPolicy() if world.offload else OffloadPolicy()
    for layer in native.model.layers:
        fully_shard(layer, mesh=world.mesh, reshard_after_forward=world.reshard_after_forward, offload_policy=policy)
    fully_shard(model, mesh=world.mesh, offload_policy=policy)
    device = torch.device("cpu") if world.offload else torch.device(world.mesh.device_type)
    for module in model.modules():
        module._apply(
            lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor, recurse=False
        )
    native.tie_weights()
    if unfilled:
        assert source is not None, "an unfilled model has a base"
        _fill(model, unfilled, source, world)
    _prefetch(native)


def check_dtypes(model: nn.Module) -> None:
    """Raises: UserError naming a frozen weight that FSDP would cast or cannot cut, or trainables of several dtypes.

    FSDP moves parameters as they are: 4-bit weights must lie in a floating dtype (`bnb_4bit_quant_storage`), or it
    leaves them whole on every rank; the trainables of a unit must have one dtype.
    """
    trained: dict[torch.dtype, str] = {}
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise UserError(
                f"{name} is stored as {parameter.dtype}, which FSDP cannot shard; use quantize.kind=nf4, or "
                "--launch ddp"
            )
        if parameter.requires_grad:
            trained.setdefault(parameter.dtype, name)
    if len(trained) > 1:
        named = ", ".join(f"{name} in {dtype}" for dtype, name in trained.items())
        raise UserError(f"trainable weights of several dtypes cannot be sharded together: {named}")


def _to_meta(model: nn.Module) -> None:
    """Put unfilled parameters on the meta device, where FSDP cuts them without memory."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if is_empty(parameter):
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                module.register_parameter(name, nn.Parameter(empty, requires_grad=parameter.requires_grad))


@torch.no_grad()
def _fill(model: nn.Module, names: set[str], source: Source, world: World) -> None:
    """Read the base on rank 0, a tensor at a time, and give each rank its slices."""
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    files = model_weights(folder_of(source, downloaded=True)) if world.main else None
    for name in sorted(names):
        parameter = parameters[name]
        module = modules[name.rpartition(".")[0]]
        value = files.tensor(base_name(name)) if files is not None else None
        if isinstance(module, Linear4bit):
            value = _quantized(module, value, world)
        _scatter(parameter, value, world)
        del value
        if world.main:
            hardware.give_memory_back()


def _quantized(module: Linear4bit, value: Tensor | None, world: World) -> Tensor | None:
    """Rank 0's weight in 4 bits, and on every rank the state that it is read with."""
    told: list[Any] = [None]
    if value is not None:
        value, state = quantized(module, value, _device(world))
        told = [{key: one.cpu() for key, one in state.items()}]
    dist.broadcast_object_list(told, src=0, device=torch.device("cpu"))
    fill_quantized(module, told[0], _device(world))
    return value


def _scatter(parameter: Any, value: Tensor | None, world: World) -> None:
    """Give each rank its rows of rank 0's `value`, as FSDP cuts them: equal pieces, the last ones shorter or empty."""
    assert isinstance(parameter, DTensor), "the model is sharded"
    rows = -(-parameter.shape[0] // world.size)
    device = _device(world)
    mine = torch.empty((rows, *parameter.shape[1:]), dtype=parameter.dtype, device=device)
    pieces = None
    if value is not None:
        assert value.shape == parameter.shape, "the base has the shape of its config"
        padded = torch.zeros((rows * world.size, *value.shape[1:]), dtype=parameter.dtype, device=device)
        padded[: len(value)] = value.to(device, parameter.dtype)
        pieces = list(padded.chunk(world.size))
    dist.scatter(mine, pieces, src=0)
    local = parameter.to_local()
    local.copy_(mine[: len(local)])


def _device(world: World) -> torch.device:
    assert world.mesh is not None, "several ranks"
    return torch.device(world.mesh.device_type)


def _prefetch(native: Any) -> None:
    """Gather the next layer's weights while one computes, in both directions."""
    layers = list(native.model.layers)
    for one, following in pairwise(layers):
        one.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([one])


@contextlib.contextmanager
def gathered_root(model: Any) -> Iterator[None]:
    """Embedding, head and final norm whole on every rank while this is open, for whoever calls the model's parts
    without the model: generation. Layers gather themselves. All ranks call them alike.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        reshard(model)


@contextlib.contextmanager
def gradients_deferred(model: Any) -> Iterator[None]:
    """Around the backward of a step's micro-batches but the last: ranks sum their gradients once, in the last one's.
    Those of a whole model cut by FSDP2 are summed each time, or they would take as much memory as the model on every
    rank; an adapter's are small.
    """
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    elif isinstance(model, FSDPModule) and hasattr(model, "get_base_model"):
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    else:
        yield


def reshard(model: Any) -> None:
    """Put slices back in the place of whole parameters: a forward pass without gradients leaves some of them whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A tensor that every rank has all of, out of its slices; as it is where it was not cut. All ranks call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def put(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole `value` into a parameter, or each rank's slice of it."""
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(value.to_local())
    else:
        parameter.copy_(value)
