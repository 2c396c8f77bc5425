"""Training steps on the CPU, side by side: ours, and transformers + PEFT + TRL at their defaults and at their best.

    .venv/bin/python -m benchmarks.train_cpu              the grid, to benchmarks/results/train_cpu.json
    .venv/bin/python -m benchmarks.train_cpu NAME ...     some lines of it
    .venv/bin/python -m benchmarks.train_cpu --brief ...  a timed step less of the others, which take most of the time

All arms have the same Gemma 2 of 100M parameters (random weights at a realistic scale), adapter, ids, labels, order,
AdamW and clipping, and compute in bf16; in lines named `full` all weights are trained, float32 under bf16 autocast. An
arm is a process of its own that trains with its own trainer; arms take turns, forwards and backwards, and the ratio is
the median over the turns.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.shared.hundred_million import RANK, SHAPE, VOCABULARY, gemma, tokenizer, write_base
from benchmarks.shared.limits import flops_per_token, gemm_rate
from benchmarks.shared.our_trainer import trainer_of
from benchmarks.shared.record import write_result
from benchmarks.shared.turns import QUICK, order, paired
from gemma_ft.system import hardware

ARMS = ("ours", "stock", "stock_best")
STEPS, WARM, TURNS = 3, 1, 2
BRIEF = "--brief"
LABELLED = 0.5


@dataclass(frozen=True)
class Line:
    """One line of the grid."""

    tokens: int  # of a row
    rows: int  # in a step
    vocabulary: int = VOCABULARY
    quantize: str | None = None
    padded: bool = False  # rows of unequal length; else full rows of several documents
    full: bool = False  # all weights are trained: float32, under bf16 autocast


GRID = {
    "lora_512": Line(512, 4),
    "lora_2048": Line(2048, 1),
    "qlora_2048": Line(2048, 1, quantize="nf4"),
    "lora_1024": Line(1024, 2),
    "lora_1024_padded": Line(1024, 2, padded=True),
    "lora_1024_256k": Line(1024, 2, vocabulary=256_000),
    "qlora_512": Line(512, 4, quantize="nf4"),
    "full_1024": Line(1024, 2, full=True),
}


def steps_of(arm: str, *, brief: bool) -> int:
    """Steps of an arm, those to warm up among them."""
    return STEPS - 1 if brief and arm != "ours" else STEPS


def rows_of(line: Line) -> list[dict[str, list[int]]]:
    """The rows of all steps, the same for every arm."""
    draw = torch.Generator().manual_seed(1)
    found = []
    for number in range(line.rows * STEPS):
        size = line.tokens if not line.padded or number % 2 == 0 else line.tokens * (2 + number % 3) // 5
        cuts = [size] if line.padded else [size // 2, size // 3, size - size // 2 - size // 3]
        ids = torch.randint(4, line.vocabulary, (size,), generator=draw).tolist()
        labelled = (torch.rand(size, generator=draw) < LABELLED).tolist()
        starts = {sum(cuts[:index]) for index in range(len(cuts))}
        labels = [
            one if on and at not in starts else -100 for at, (one, on) in enumerate(zip(ids, labelled, strict=True))
        ]
        found.append({
            "input_ids": ids,
            "labels": labels,
            "position_ids": [place for cut in cuts for place in range(cut)],
            "document_ids": [document for document, cut in enumerate(cuts) for _ in range(cut)],
        })  # fmt: skip
    return found


def arguments(folder: Path, line: Line, **changes: Any) -> Any:
    """What all arms share of TRL's settings."""
    from trl import SFTConfig

    return SFTConfig(
        output_dir=str(folder / "out"), seed=0, max_steps=STEPS, per_device_train_batch_size=line.rows,
        learning_rate=1e-4, lr_scheduler_type="constant", max_grad_norm=1.0, optim="adamw_torch_fused",
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, log_level="error", use_cpu=True,
        remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None, **changes,
    )  # fmt: skip


def our_model(folder: Path, quantize: str | None = None) -> Any:
    """Ours with the adapter that all arms begin with."""
    from peft import PeftConfig, PeftModel

    from gemma_ft.adapters.fused_layers import with_fused_layers
    from gemma_ft.build.located import Source
    from gemma_ft.build.pretrained import load_base

    base = load_base(Source(str(folder / "base"), None), dtype=torch.bfloat16, quantize=quantize)
    start = with_fused_layers(PeftConfig.from_pretrained(str(folder / "adapter")))
    return PeftModel.from_pretrained(base, str(folder / "adapter"), is_trainable=True, config=start)


def our_whole_model(folder: Path) -> Any:
    """Ours, all of it trained: float32, as a run of `strategy: full` has it."""
    from gemma_ft.build.located import Source
    from gemma_ft.build.pretrained import load_base

    return load_base(Source(str(folder / "base"), None), dtype=torch.float32).train().requires_grad_(True)


def our_trainer(folder: Path, line: Line) -> Any:
    model = our_whole_model(folder) if line.full else our_model(folder, line.quantize)
    settings = arguments(folder, line, bf16=False, gradient_checkpointing=False, ddp_find_unused_parameters=False)
    settings._n_gpu = 0
    return trainer_of(model, settings, rows_of(line), torch.bfloat16 if line.full else None)


def stock_trainer(folder: Path, line: Line, *, best: bool, attention: str = "eager") -> Any:
    import datasets
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from trl import SFTTrainer

    from gemma_ft.adapters.quantize import quantization_config

    more: dict[str, Any] = {}
    if line.quantize:
        more["quantization_config"] = quantization_config("nf4", double_quant=True, compute_dtype=torch.bfloat16)
    base = AutoModelForCausalLM.from_pretrained(
        str(folder / "base"),
        dtype=torch.float32 if line.full else torch.bfloat16,
        attn_implementation=attention,
        **more,
    )
    model = base if line.full else PeftModel.from_pretrained(base, str(folder / "adapter"), is_trainable=True)
    changes: dict[str, Any] = {"gradient_checkpointing": False} if best else {}
    changes |= {"bf16": True} if line.full else {}
    rows = [{key: one[key] for key in ("input_ids", "labels", "position_ids")} for one in rows_of(line)]
    trainer = SFTTrainer(
        model=model, args=arguments(folder, line, **changes), train_dataset=datasets.Dataset.from_list(rows),
        data_collator=padded_by_mask if line.padded else stacked, processing_class=tokenizer(),
    )  # fmt: skip
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
    return trainer


def stacked(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Full rows; positions that restart tell transformers the documents."""
    return {key: torch.tensor([one[key] for one in rows]) for key in rows[0]}


def padded_by_mask(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(one["input_ids"]) for one in rows)
    pads = {"input_ids": 0, "labels": -100}
    batch = {
        key: torch.tensor([one[key] + [pad] * (longest - len(one[key])) for one in rows]) for key, pad in pads.items()
    }
    sizes = torch.tensor([len(one["input_ids"]) for one in rows])
    return {**batch, "attention_mask": (torch.arange(longest)[None] < sizes[:, None]).long()}


def one_arm(arm: str, name: str, folder: Path, steps: int = STEPS) -> None:
    """Train and print seconds of each step, losses and memory."""
    line = GRID[name]
    trainer = our_trainer(folder, line) if arm == "ours" else stock_trainer(folder, line, best=arm == "stock_best")
    run_steps(trainer, line, steps)


def run_steps(trainer: Any, line: Line, steps: int) -> None:
    """Train and print seconds of each step, losses and memory."""
    tokens = sum(len(one["input_ids"]) for one in rows_of(line)[WARM * line.rows : steps * line.rows])
    print(json.dumps(trained(trainer, steps) | {"tokens": tokens}))


def trained(trainer: Any, steps: int) -> dict[str, Any]:
    """Train: seconds of each step behind the first, losses and memory."""
    from transformers import TrainerCallback

    from gemma_ft.system import environment

    environment.quiet_libraries()
    times: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(-time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times[-1] += time.perf_counter()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))

    trainer.args.max_steps = steps
    trainer.add_callback(Clock())
    built = _rss()
    trainer.train()
    moments = sum(
        one.nbytes
        for state in trainer.optimizer.state.values()
        for one in state.values()
        if isinstance(one, torch.Tensor)
    )
    return {"seconds": times[WARM:], "losses": losses, "above_the_model": _rss() - built, "moments": moments}


def _rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def flops_of(line: Line) -> float:
    """FLOPs of a token, for documents of half, a third and a sixth of a row (limits.flops_per_token)."""
    cuts = [line.tokens] if line.padded else [line.tokens // 2, line.tokens // 3, line.tokens // 6]
    return flops_per_token(gemma(line.vocabulary), cuts, rank=RANK, labelled=LABELLED, full=line.full)


def measured(name: str, turns: int = TURNS, *, brief: bool = False) -> dict[str, Any]:
    """One line of the grid: all arms in turns."""
    line, found = GRID[name], {arm: [] for arm in ARMS}
    rates: dict[str, list[float]] = {"bf16": [], "float32": []}
    with tempfile.TemporaryDirectory() as place:
        write_base(Path(place), line.vocabulary)
        for arm in order(ARMS, turns):
            if arm == "ours":
                for dtype, ones in rates.items():  # of the MLP
                    sizes = (2048, SHAPE["hidden_size"], SHAPE["intermediate_size"])
                    ones.append(gemm_rate(*sizes, dtype=hardware.dtype_by_name(dtype)))
            told = subprocess.run([sys.executable, "-m", "benchmarks.train_cpu", arm, name, place,
                                   str(steps_of(arm, brief=brief))],
                                  check=True, capture_output=True, text=True)  # fmt: skip
            found[arm].append(json.loads(told.stdout.splitlines()[-1]))
    speed = {arm: [one["tokens"] / sum(one["seconds"]) for one in ones] for arm, ones in found.items()}
    return {
        "tokens_per_second": {arm: round(statistics.median(ones), 1) for arm, ones in speed.items()},
        "ours_over": {arm: round(paired(speed["ours"], speed[arm])["median"], 2) for arm in ARMS[1:]},
        "above_the_model_mib": {
            arm: round(min(one["above_the_model"] for one in ones) / 2**20) for arm, ones in found.items()
        },
        "above_model_and_moments_mib": {
            arm: round(min(one["above_the_model"] - one["moments"] for one in ones) / 2**20)
            for arm, ones in found.items()
        },
        "losses": {arm: ones[0]["losses"] for arm, ones in found.items()},
        "gemm_gflops": {dtype: round(max(ones) / 1e9) for dtype, ones in rates.items()},
        "of_the_limit": {
            dtype: round(statistics.median(speed["ours"]) * flops_of(line) / max(ones), 3)
            for dtype, ones in rates.items()
        },
    }  # fmt: skip


def main(names: list[str], turns: int = TURNS) -> None:
    """Some lines of the grid, or all, and the result file."""
    brief = BRIEF in names
    chosen = [name for name in GRID if name in names] or list(GRID)
    lines = {}
    for name in chosen:
        lines[name] = measured(name, turns, brief=brief)
        print(name, json.dumps(lines[name], indent=2), flush=True)
    command = " ".join(["python -m benchmarks.train_cpu", *names])
    grid = {name: vars(GRID[name]) for name in chosen}
    write_result("train_cpu", also=("peft", "trl"), command=command, shape=SHAPE, rank=RANK,
                 threads=torch.get_num_threads(), turns=turns,
                 steps={arm: steps_of(arm, brief=brief) - WARM for arm in ARMS}, grid=grid, arms=lines)  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) == 5 and sys.argv[1] in ARMS:
        one_arm(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    else:
        main([name for name in sys.argv[1:] if name != QUICK], 1 if QUICK in sys.argv else TURNS)
