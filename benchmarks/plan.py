"""What the planner says against what was measured: training steps, evaluation, answers, a load and a merge of random
Gemmas on a CPU, each in its own process, to benchmarks/results/plan.json.

    .venv/bin/python -m benchmarks.plan              all arms
    .venv/bin/python -m benchmarks.plan NAME ...     some of them; nothing is written
    .venv/bin/python -m benchmarks.plan --add NAME ...    some of them, put beside what was measured before

Each arm says at which commit, with which versions, on what processor and with how many threads it was measured.

A process's peak resident memory is compared, above what it held before it had a model: that is the planner's overhead.
The C library is told to give freed memory back at once (MALLOC_MMAP_THRESHOLD_), so that tensors are measured and not
what an allocator keeps.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.shared.hundred_million import random_gemma, tokenizer
from benchmarks.shared.our_trainer import trainer_of
from benchmarks.shared.record import PUBLISHED, ROOT, commit, processor, write_result

SIZES = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 256, "vocab_size": 32_000}  # fmt: skip
# what an arm's model has instead of its preset's sizes; Gemma 3 270M is as it is published
FAMILIES = {"gemma-2-2b": {**SIZES, "sliding_window": 1024}, "gemma-2b": SIZES, "gemma-3-270m": {},
            "vaultgemma-1b": {**SIZES, "layer_types": ["full_attention"] * 8}}  # fmt: skip
WITHIN = 0.10
STEPS = 2
FIRST_STEP = 24 * 2**20  # what libraries set up in a first training step, measured with a model of next to nothing


@dataclass(frozen=True)
class Arm:
    """One process: what it does, and with what."""

    phase: str = "train"
    strategy: str = "lora"
    quantize: str | None = None
    tokens: int = 2048
    rows: int = 1
    checkpointed: int = 0
    accumulation: int = 1
    precision: str = "bf16"
    preset: str = "gemma-2-2b"
    objective: str = "sft"
    attention: str = "auto"


REFERENCES = {"sft": "none", "dpo": "adapter_off"}
NF4 = {"strategy": "qlora", "quantize": "nf4"}
G3 = {"preset": "gemma-3-270m"}
ARMS = {
    "lora": Arm(),
    "lora, half of the layers": Arm(checkpointed=4),
    "lora, all layers": Arm(checkpointed=8),
    "lora, 4 x 512 tokens": Arm(tokens=512, rows=4),
    "lora, float32": Arm(tokens=512, precision="float32"),
    "lora, eager attention": Arm(tokens=1024, attention="eager"),
    "lora, Gemma 1": Arm(tokens=1024, preset="gemma-2b"),
    "nf4": Arm(**NF4, tokens=1024),
    "nf4, all layers": Arm(**NF4, checkpointed=8),
    "int8": Arm(strategy="qlora", quantize="int8", tokens=1024),
    "dpo": Arm(objective="dpo", tokens=1024),
    "dpo, all layers": Arm(objective="dpo", tokens=1024, checkpointed=8),
    "full": Arm(strategy="full", tokens=1024),
    "full, half of the layers": Arm(strategy="full", checkpointed=4, tokens=1024),
    "full, all layers, 2 accumulations": Arm(strategy="full", checkpointed=8, accumulation=2, tokens=512),
    "evaluate": Arm("evaluate", rows=2),
    "generate": Arm("generate", rows=4, tokens=1024),
    "generate, nf4": Arm("generate", rows=4, tokens=1024, **NF4),
    "merge": Arm("merge"),
    "lora, VaultGemma": Arm(tokens=512, preset="vaultgemma-1b"),
    "lora, Gemma 3 270M": Arm(**G3, tokens=1024),
    "lora, Gemma 3 270M, half of the layers": Arm(**G3, tokens=1024, checkpointed=9),
    "nf4, Gemma 3 270M": Arm(**G3, **NF4, tokens=512),
    "full, Gemma 3 270M": Arm(**G3, strategy="full", tokens=256),
    "evaluate, Gemma 3 270M": Arm("evaluate", **G3, tokens=512, rows=2),
    "generate, Gemma 3 270M": Arm("generate", **G3, tokens=512, rows=4),
}


def planned(arm: Arm, *, widened: bool) -> dict[str, int]:
    """What the planner says of an arm, by part, without its overhead."""
    from gemma_ft.families.records import PRESETS
    from gemma_ft.plan.phases import phases
    from gemma_ft.plan.run import Run, attention_of
    from gemma_ft.plan.shape import shape_of

    preset = PRESETS[arm.preset]
    shape = shape_of(arm.preset, {"model_type": preset.model_type, **preset.fields, **FAMILIES[arm.preset]})
    run = Run(
        shape=shape, strategy=arm.strategy, quantize=arm.quantize, micro_batch_size=arm.rows, tokens=arm.tokens,
        checkpointed=arm.checkpointed, accumulation_steps=arm.accumulation, precision=arm.precision, device="cpu",
        attention=attention_of(arm.attention, softcap=shape.attn_softcap, windows=any(shape.windows), device="cpu"),
        own_kernels=True, widened=widened, eval_rows=arm.rows, new_tokens=16, objective=arm.objective,
        reference=REFERENCES[arm.objective],
    )  # type: ignore[arg-type]  # fmt: skip
    phase = next(one for one in phases(run) if one.name == arm.phase)
    found = {name: size for name, size in phase.device.items() if name != "overhead"}
    if arm.phase == "train":
        found["libraries in a first step"] = FIRST_STEP  # of the overhead: what comes after the baseline was taken
    elif arm.phase == "merge":
        found = {"shard and tensor": phase.host}
    else:  # a model that is asked, which was never trained
        del found["optimizer"]
    return {name: size for name, size in found.items() if size}


def write_base(folder: Path, preset: str) -> None:
    """A Gemma of random weights at the scale of trained ones, in bf16."""
    from gemma_ft.data.encode.tokenizer_files import save_tokenizer
    from gemma_ft.families.records import PRESETS

    random_gemma(PRESETS[preset].config(**FAMILIES[preset])).save_pretrained(str(folder))
    save_tokenizer(tokenizer(), folder, system_policy="fold")


def rows_of(arm: Arm) -> list[dict[str, list[Any]]]:
    """Full rows of one document, all of whose tokens are labelled; of dpo two of them, which have nothing in common."""
    draw, places, found = torch.Generator().manual_seed(1), list(range(arm.tokens)), list[dict[str, list[Any]]]()
    count = arm.rows * arm.accumulation * STEPS
    for _ in range(count if arm.objective == "sft" else 2 * count):
        ids = torch.randint(4, SIZES["vocab_size"], (arm.tokens,), generator=draw).tolist()
        found.append({"input_ids": ids, "labels": ids, "position_ids": places, "document_ids": [0] * arm.tokens})
    if arm.objective == "sft":
        return found
    for one in found[1::2]:
        one["document_ids"] = [1] * arm.tokens
    pairs = [
        {name: one[name] + other[name] for name in one} for one, other in zip(found[0::2], found[1::2], strict=True)
    ]
    return [{**pair, "sides": [1, 0], "row_weights": [1.0], "margins": [0.0]} for pair in pairs]


def adapter(model: Any, base: str) -> Any:
    from gemma_ft.adapters.lora import add_adapter

    return add_adapter(model, rank=16, alpha=32.0, dropout=0.0, targets="all-linear", rslora=False, dora=False,
                       init="default", base=base, revision=None)  # fmt: skip


def trainer_for(arm: Arm, model: Any, folder: Path) -> Any:
    from trl import SFTConfig

    from gemma_ft.train.activation_checkpointing import checkpoint_layers

    settings = SFTConfig(
        output_dir=str(folder / "out"), max_steps=STEPS, per_device_train_batch_size=arm.rows,
        gradient_accumulation_steps=arm.accumulation, learning_rate=1e-4, lr_scheduler_type="constant",
        optim="adamw_torch_fused", logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        log_level="error", use_cpu=True, remove_unused_columns=False, max_length=None, bf16=False,
        dataset_kwargs={"skip_prepare_dataset": True}, gradient_checkpointing=False,
    )  # fmt: skip
    checkpoint_layers(model, arm.checkpointed)
    narrow = arm.strategy == "full" and arm.precision == "bf16"
    reference = REFERENCES[arm.objective]
    autocast = torch.bfloat16 if narrow else None
    return trainer_of(model, settings, rows_of(arm), autocast, kind=arm.objective, reference=reference)


def evaluate(arm: Arm, model: Any) -> None:
    from gemma_ft.data.pack.collate import Collator
    from gemma_ft.evaluate.held_out import held_out_loss

    rows = rows_of(arm)[: arm.rows]
    held_out_loss(model, [Collator(0)(rows)])


def generate(arm: Arm, model: Any) -> None:
    from gemma_ft.infer.generate import generate_answers

    prompts = [one["input_ids"] for one in rows_of(arm)[: arm.rows]]
    generate_answers(model, prompts, stop_ids=[1], max_new_tokens=16, batch_size=arm.rows)


def merge(folder: Path) -> None:
    from gemma_ft.build.place import place_of
    from gemma_ft.export.merge.merge import merge_to_folder

    merge_to_folder(place_of(folder / "adapter"), folder / "merged")


def one_arm(name: str, folder: Path) -> None:
    """Do what an arm is for, and print what the process held before and at its peak, in bytes."""
    from gemma_ft.adapters.lora import save_adapter
    from gemma_ft.build.located import Source
    from gemma_ft.build.pretrained import load_base
    from gemma_ft.system import environment, hardware

    environment.quiet_libraries()
    arm, base = ARMS[name], folder / ARMS[name].preset
    dtype = torch.float32 if arm.strategy == "full" else hardware.dtype_by_name(arm.precision)
    for library in ("bitsandbytes", "trl", "gemma_ft.train.trainer", "gemma_ft.export.merge.merge"):
        __import__(library)
    if arm.phase == "merge":
        with torch.no_grad():
            model = adapter(load_base(Source(str(base), None), dtype=dtype), str(base))
            for weight in (one for one in model.parameters() if one.requires_grad):
                weight.normal_(0, 0.01)  # as if it had been trained
            save_adapter(model, folder / "adapter")
        del model
        hardware.give_memory_back()
    first_use()
    hardware.give_memory_back()
    before = memory("VmRSS")
    work = partial(merge, folder)
    loaded = 0
    if arm.phase != "merge":
        attention = None if arm.attention == "auto" else arm.attention
        model = load_base(
            Source(str(base), None), dtype=dtype, quantize=arm.quantize, attention=attention,
            trainable=arm.phase == "train",
        )  # fmt: skip
        loaded = memory("VmHWM") - before
        own_memory(model)
        model = model if arm.strategy == "full" else adapter(model, str(base))
        if arm.phase == "train":
            work = trainer_for(arm, model, folder).train
        else:
            work = partial({"evaluate": evaluate, "generate": generate}[arm.phase], arm, model)
    hardware.give_memory_back()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    work()
    print(json.dumps({"before": before, "load": loaded, "peak": memory("VmHWM") - before}))


def first_use() -> None:
    """A forward and a backward of next to nothing: what kernels and libraries set up once is not the model's."""
    from gemma_ft.families.records import PRESETS
    from gemma_ft.model.gemma import GemmaForCausalLM

    tiny = GemmaForCausalLM(PRESETS["gemma-tiny"].config(vocab_size=256, num_hidden_layers=2)).to(torch.bfloat16)
    ids = torch.arange(64)[None]
    tiny(input_ids=ids, labels=ids, use_cache=False).loss.backward()


@torch.no_grad()
def own_memory(model: Any) -> None:
    """Weights that lie in a file that is mapped, copied into memory: the pages of a mapped file that were read once
    count as resident, though the system may take them back.
    """
    for weight in model.parameters():
        if type(weight) is torch.nn.Parameter:
            weight.data = weight.data.clone()
    model.tie_weights()


def memory(key: str) -> int:
    """A line of this process's status, in bytes: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def main(names: list[str], *, add: bool = False) -> int:
    """Some arms, or all and the result file, `add`: some and the result file; 1 where a plan is not within 10%."""
    from gemma_ft.kernels.matmul import widens
    from gemma_ft.system.environment import versions

    found: dict[str, Any] = {}
    former = json.loads((PUBLISHED / "plan.json").read_text(encoding="utf-8"))["arms"] if add else {}
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    with tempfile.TemporaryDirectory() as place:
        for preset in {ARMS[name].preset for name in names or ARMS}:
            write_base(Path(place) / preset, preset)
        for name in names or ARMS:
            told = subprocess.run([sys.executable, "-m", "benchmarks.plan", "--arm", name, place], cwd=ROOT,
                                  env=environment, check=True, capture_output=True, text=True)  # fmt: skip
            measured, plan = json.loads(told.stdout.splitlines()[-1]), planned(ARMS[name], widened=widens())
            error = sum(plan.values()) / measured["peak"] - 1
            found[name] = {
                "planned": sum(plan.values()), "measured": measured["peak"], "error": round(error, 3),
                "before": measured["before"], "loaded": measured["load"], "parts": plan, "widened": widens(),
                "threads": torch.get_num_threads(), "commit": commit(), "processor": processor(),
                "versions": versions(),
            }  # fmt: skip
            shown = ", ".join(f"{key} {size / 2**20:.0f}" for key, size in plan.items())
            sizes = f"{sum(plan.values()) / 2**20:6.0f} planned {measured['peak'] / 2**20:6.0f} measured"
            print(f"{name:34} {sizes} MiB {error:+6.1%}  ({shown}; loaded {measured['load'] / 2**20:.0f})", flush=True)
            if not names or add:
                written({**former, **found})
    return int(any(abs(one["error"]) > WITHIN for one in found.values()))


def written(measured: dict[str, Any]) -> None:
    """The result file, after each arm: what was measured is not lost with what comes after it."""
    write_result("plan", command="python -m benchmarks.plan", sizes=SIZES,
                 grid={name: asdict(arm) for name, arm in ARMS.items()},
                 arms={name: measured[name] for name in ARMS if name in measured})  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--arm"]:
        one_arm(sys.argv[2], Path(sys.argv[3]))
    else:
        add = sys.argv[1:2] == ["--add"]
        sys.exit(main(sys.argv[1 + add :], add=add))
