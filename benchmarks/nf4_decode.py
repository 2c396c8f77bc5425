"""Decode steps of a random Gemma 2 of four layers, 2048 wide, on the CPU: bf16, nf4 as trained, and nf4 packed by
bitsandbytes for AVX512-BF16, in turns; and how far the logits of each are from nf4's float32 truth. Writes
benchmarks/results/nf4_decode.json with machine, versions and commit.

    .venv/bin/python -m benchmarks.nf4_decode
"""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.shared.record import write_result
from gemma_ft.build.located import Source
from gemma_ft.build.pretrained import load_base
from gemma_ft.families.records import PRESETS
from gemma_ft.infer.engine import Engine, Request
from gemma_ft.model.gemma import GemmaForCausalLM
from gemma_ft.system import environment

STEPS, ROUNDS, BATCHES = 8, 5, (1, 8)
SHAPE = {"num_hidden_layers": 4, "hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 2048}


def random_model(folder: Path) -> Source:
    """Weights at a realistic scale, saved in bf16."""
    torch.manual_seed(0)
    model = GemmaForCausalLM(PRESETS["gemma-2-2b"].config(**SHAPE))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(0, 0.3 if "norm" in name else 1.2 / weight.shape[-1] ** 0.5)
    model.to(torch.bfloat16).save_pretrained(str(folder))
    return Source(str(folder), None)


def seconds_per_step(model: Any, batch: int) -> float:
    """Mean time of a decode step with `batch` short sequences."""
    engine = Engine(model, stop_ids=(), max_batch=batch)
    for _ in range(batch):
        engine.submit(Request(list(range(4, 20)), STEPS + 3))
    engine.step()
    engine.step()
    started = time.perf_counter()
    for _ in range(STEPS):
        engine.step()
    return (time.perf_counter() - started) / STEPS


@torch.no_grad()
def measure(source: Source) -> dict[str, Any]:
    """Milliseconds of each arm, and its logits' distance from nf4 computed in float32."""
    arms = {
        "bf16": load_base(source, dtype=torch.bfloat16, trainable=False),
        "nf4 as trained": load_base(source, dtype=torch.bfloat16, quantize="nf4", trainable=True),
        "nf4 packed": load_base(source, dtype=torch.bfloat16, quantize="nf4", trainable=False),
    }
    arms = {name: model.eval() for name, model in arms.items()}
    ids = torch.randint(4, 2048, (1, 64))
    truth = load_base(source, dtype=torch.float32, quantize="nf4").eval()(ids).logits
    errors = {name: float((model(ids).logits - truth).norm() / truth.norm()) for name, model in arms.items()}
    times: dict[str, list[list[float]]] = {name: [] for name in arms}
    for turn in range(ROUNDS):
        for name in list(arms) if turn % 2 == 0 else list(reversed(arms)):
            times[name].append([seconds_per_step(arms[name], batch) for batch in BATCHES])
    return {
        name: {
            "ms_per_step": {
                f"batch {batch}": round(1000 * statistics.median(run[i] for run in times[name]), 1)
                for i, batch in enumerate(BATCHES)
            },
            "logit_error_against_nf4_in_float32": round(errors[name], 5),
        }
        for name in arms
    }


def main() -> None:
    """Measure, and write the result file."""
    environment.quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        arms = measure(random_model(Path(folder)))
    print(json.dumps(arms, indent=2))
    write_result(
        "nf4_decode",
        command=".venv/bin/python -m benchmarks.nf4_decode",
        threads=torch.get_num_threads(),
        shape=SHAPE,
        arms=arms,
    )


if __name__ == "__main__":
    main()
