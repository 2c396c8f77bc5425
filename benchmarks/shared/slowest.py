"""The slowest operations of what torch's profiler has watched."""

from __future__ import annotations

from typing import Any

from torch.autograd import DeviceType

SHOWN = 10


def slowest(watch: Any, *, cuda: bool = False) -> dict[str, Any]:
    """`step_ms`: all operations by the time that they themselves take; and the ten that take most. `cuda`: the kernels
    of a GPU, and how many there were.
    """
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    of_each = {
        one: one.self_device_time_total if cuda else one.self_cpu_time_total
        for one in watch.key_averages()
        if one.device_type == kind
    }
    whole = sum(of_each.values())
    shown = [
        {"operation": one.key[:120], "ms": round(took / 1e3, 1), "calls": one.count, "share": round(took / whole, 3)}
        for one, took in sorted(of_each.items(), key=lambda pair: -pair[1])[:SHOWN]
    ]
    found: dict[str, Any] = {"step_ms": round(whole / 1e3), "slowest": shown}
    return found | ({"kernels": sum(one.count for one in of_each)} if cuda else {})
