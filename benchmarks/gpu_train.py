"""Parts of benchmarks/gpu.py: whole optimizer steps of LoRA and QLoRA, and the longest row that fits.

An arm is a process of its own (`python -m benchmarks.gpu_train SPEC`), so that memory is counted alone and peers may
have an environment of their own; arms take turns, forwards and backwards. Steps are timed by CUDA events.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks import gpu_models
from benchmarks.gpu_setup import Setup
from benchmarks.gpu_steps import Clock, Stepper
from benchmarks.shared.limits import flops_per_token, gemm_rate
from benchmarks.shared.record import ROOT
from benchmarks.shared.slowest import slowest
from benchmarks.shared.turns import order, paired

TOKENS_PER_STEP, WARM, STEPS, TURNS = 8192, 10, 15, 2  # steps of a turn: 30 timed ones in all
# arm: (our model, attention or None for the model's own choice, activation checkpointing, what must be importable)
ARMS: dict[str, tuple[bool, str | None, bool, str | None]] = {
    "ours": (True, None, False, None),
    "ours_checkpointed": (True, None, True, None),
    "stock": (False, "eager", True, None),  # its defaults under a trainer: eager for the cap, and checkpointing
    "stock_best": (False, "flex_attention", False, None),
    "liger": (False, "flex_attention", False, "liger_kernel"),
    "unsloth": (False, None, True, "unsloth"),
}


@dataclass(frozen=True)
class Spec:
    """One arm's run."""

    arm: str
    model: str
    quantize: bool
    tokens: int
    packed: bool
    steps: int = STEPS
    warm: int = WARM
    limit_gib: float | None = None  # of device memory: finds the longest row, of which `tokens` is the first tried
    dry: bool = False


def train(setup: Setup, model: str, kind: str, tokens: int, layout: str) -> dict[str, Any]:
    """One line of the grid: all arms in turns; a step of ours against the same step of the others."""
    few: dict[str, Any] = {"steps": 1, "warm": 1, "dry": True} if setup.dry else {}
    tokens = setup.small(tokens, 32)
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for arm in order(list(ARMS), 1 if setup.dry else TURNS):
        if not any("skipped" in one for one in found[arm]):
            found[arm].append(_process(setup, Spec(arm, model, kind == "qlora", tokens, layout == "packed", **few)))
    ran = {arm: ones for arm, ones in found.items() if not any("skipped" in one for one in ones)}
    seconds = {arm: [one for run in ones for one in run["seconds"]] for arm, ones in ran.items()}
    lines: dict[str, Any] = {
        arm: next(one for one in ones if "skipped" in one) for arm, ones in found.items() if arm not in ran
    }
    config = gpu_models.config_of(model, dry=setup.dry)
    rate = gemm_rate(setup.small(8192, 16), config.hidden_size, config.intermediate_size, setup.device, setup.tries)
    for arm, ones in ran.items():
        whole = sum(run["tokens"] for run in ones) / sum(seconds[arm])
        lines[arm] = {
            "tokens_per_second": round(whole, 1),
            "step_ms": round(statistics.median(seconds[arm]) * 1e3, 2),
            "of_the_gemm_rate": round(whole * ones[0]["flops_per_token"] / rate, 3),
            "peak_allocated_gib": round(max(run["allocated"] for run in ones) / 2**30, 2),
            "peak_reserved_gib": round(max(run["reserved"] for run in ones) / 2**30, 2),
            "first_step_seconds": round(ones[0]["first"], 1),  # compiling included
            "attention": ones[0]["attention"],
            "losses": ones[0]["losses"],
            "profile": ones[0]["profile"],
        }
        if "ours" in ran:
            lines[arm]["ours_over"] = paired(seconds[arm], seconds["ours"])
    return {"tokens_per_step": rows_of(tokens) * tokens, "gemm_tflops": rate / 1e12, "arms": lines}


def longest(setup: Setup, model: str, kind: str, limit_gib: float) -> dict[str, Any]:
    """Tokens of the longest row with which a step fits, activations checkpointed."""
    found = {}
    for arm in ("ours_checkpointed", "stock", "unsloth"):
        spec = Spec(arm, model, kind == "qlora", setup.small(1024, 32), True, 1, 0, limit_gib, setup.dry)
        found[arm] = _process(setup, spec)
    return found


def rows_of(tokens: int) -> int:
    return max(1, TOKENS_PER_STEP // tokens) if tokens >= 512 else 2


def _process(setup: Setup, spec: Spec) -> dict[str, Any]:
    """Run an arm in a process of its own; of a dry run, in this one."""
    if setup.dry:
        return one_arm(spec)
    python = str(setup.pythons.get(spec.arm, sys.executable))
    told = subprocess.run([python, "-m", "benchmarks.gpu_train", json.dumps(asdict(spec))], cwd=ROOT, check=False,
                          capture_output=True, text=True)  # fmt: skip
    lines = told.stdout.splitlines()
    if told.returncode or not lines:
        last = (told.stderr.strip().splitlines() or ["without a word"])[-1]
        return {"skipped": f"exit code {told.returncode}: {last[:300]}"}
    return dict(json.loads(lines[-1]))


def one_arm(spec: Spec) -> dict[str, Any]:
    """Seconds of each timed step, losses of all, memory; or why there is nothing."""
    from importlib.util import find_spec

    native, attention, checkpointed, needed = ARMS[spec.arm]
    if needed is not None and find_spec(needed) is None:
        return {"skipped": f"{needed} is not importable here"}
    device = torch.device("cpu" if spec.dry else "cuda")
    if spec.limit_gib is not None and not spec.dry:
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, spec.limit_gib * 2**30 / whole))
    config = gpu_models.config_of(spec.model, dry=spec.dry)
    try:
        if spec.arm == "unsloth":
            model = _unsloth(spec, config, device)
        else:
            if spec.arm == "liger":
                _liger(config)
            if attention == "flex_attention" and (spec.dry or config.model_type == "gemma"):
                attention = "eager" if spec.dry else "sdpa"  # a Gemma without a cap
            model = gpu_models.base(config, native=native, device=device, attention=attention, quantize=spec.quantize)
            model = gpu_models.with_lora(model, fused=native)
        model.train()
        if checkpointed and spec.arm != "unsloth":
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return (
            _search(model, config, spec, device) if spec.limit_gib is not None else _steps(model, config, spec, device)
        )
    except torch.OutOfMemoryError:
        return {"skipped": "out of memory"}


def _liger(config: Any) -> None:
    """Liger's kernels in place of transformers' layers, as its users switch them on."""
    from liger_kernel.transformers import apply_liger_kernel_to_gemma, apply_liger_kernel_to_gemma2

    (apply_liger_kernel_to_gemma2 if config.model_type == "gemma2" else apply_liger_kernel_to_gemma)()


def _unsloth(spec: Spec, config: Any, device: torch.device) -> Any:
    """unsloth opens folders only: its model is saved first."""
    import tempfile

    from unsloth import FastLanguageModel

    with tempfile.TemporaryDirectory() as folder:
        start = gpu_models.base(config, native=False, device=device, attention="eager", quantize=False)
        start.save_pretrained(folder)
        del start
        torch.cuda.empty_cache()
        model, _ = FastLanguageModel.from_pretrained(folder, max_seq_length=spec.tokens, dtype=torch.bfloat16,
                                                     load_in_4bit=spec.quantize)  # fmt: skip
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(model, r=gpu_models.RANK, lora_alpha=2 * gpu_models.RANK, lora_dropout=0,
                                             target_modules=targets, use_gradient_checkpointing="unsloth")  # fmt: skip
    gpu_models.fill(model, "lora_")
    return model


def _steps(model: Any, config: Any, spec: Spec, device: torch.device) -> dict[str, Any]:
    given = gpu_models.batches(config, tokens=spec.tokens, rows=rows_of(spec.tokens), packed=spec.packed,
                               steps=spec.warm + spec.steps, device=device)  # fmt: skip
    stepper, losses, clocks = Stepper(model), [], []
    begun = time.perf_counter()
    losses.append(stepper.step(given[0]))
    first = float(losses[0]) * 0 + time.perf_counter() - begun  # reading the loss waits for the device
    for batch in given[1:]:
        clock = Clock(device)
        losses.append(stepper.step(batch))
        clocks.append(clock.stop())
    lengths = [one for batch in given for one in _lengths(batch, spec)]
    cuda = device.type == "cuda"
    labelled = sum(int((batch["labels"] != -100).sum()) for batch in given) / sum(lengths)
    return {
        "seconds": [clock.seconds() for clock in clocks[spec.warm - 1 :]],
        "tokens": sum(one for batch in given[spec.warm :] for one in _lengths(batch, spec)),
        "flops_per_token": flops_per_token(config, lengths, rank=gpu_models.RANK, labelled=labelled),
        "losses": [round(float(one), 5) for one in losses],
        "first": first,
        "allocated": torch.cuda.max_memory_allocated() if cuda else 0,
        "reserved": torch.cuda.max_memory_reserved() if cuda else 0,
        "attention": str(model.config._attn_implementation),
        "profile": _profile(stepper, given[-1], cuda=cuda),
    }


def _profile(stepper: Stepper, batch: dict[str, torch.Tensor], *, cuda: bool) -> dict[str, Any]:
    """Where one more step goes."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as watch:
        float(stepper.step(batch))
    return slowest(watch, cuda=cuda)


def _lengths(batch: dict[str, torch.Tensor], spec: Spec) -> list[int]:
    """Tokens of each document of a batch, padding apart."""
    if "attention_mask" in batch:
        return [int(one) for one in batch["attention_mask"].sum(dim=1)]
    return gpu_models.document_lengths(spec.tokens) * len(batch["input_ids"])


def _search(model: Any, config: Any, spec: Spec, device: torch.device) -> dict[str, Any]:
    """Double a row until it does not fit, then halve the step between what fits and what does not."""
    stepper = Stepper(model)
    fits, size, most = 0, spec.tokens, 64 if spec.dry else 131_072
    too_long = most + 1
    while size < too_long and size <= most:
        batch = gpu_models.batches(config, tokens=size, rows=1, packed=False, steps=1, device=device)[0]
        del batch["attention_mask"]  # one full row
        try:
            float(stepper.step(batch))
            fits = size
        except torch.OutOfMemoryError:
            too_long = size
            stepper.optimizer.zero_grad(set_to_none=True)
        if not spec.dry:
            torch.cuda.empty_cache()
        size = 2 * fits if too_long > most else (fits + too_long) // 2 // 512 * 512
        if size <= fits:
            break
    return {"tokens": fits, "tried_up_to": min(too_long, most)}


if __name__ == "__main__":
    print(json.dumps(one_arm(Spec(**json.loads(sys.argv[1])))))
