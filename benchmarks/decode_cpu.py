"""Answers of the Gemma 2 of 100M parameters on the CPU: our engine, and transformers' `generate` with its default and
with its static cache, in bf16 and nf4, one sequence and eight. Seconds to the first token after a prompt, tokens per
second from there on. Writes benchmarks/results/decode_cpu.json.

    .venv/bin/python -m benchmarks.decode_cpu               all lines
    .venv/bin/python -m benchmarks.decode_cpu NAME ...      some of them

Weights are random at a realistic scale, answers greedy and of equal length; how many of their tokens agree is written
beside the times. Arms take turns, and ratios are medians of pairs.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.shared.hundred_million import SHAPE, VOCABULARY, write_base
from benchmarks.shared.record import write_result
from benchmarks.shared.turns import QUICK, in_turns, paired

PROMPT, NEW, TURNS = 512, 64, 2
LINES = {"bf16_1": (None, 1), "nf4_1": ("nf4", 1), "bf16_8": (None, 8), "nf4_8": ("nf4", 8)}  # quantize, sequences


@dataclass(frozen=True)
class Answered:
    """One arm's run: seconds until every sequence has its first token and until the end, tokens made after the first
    of these, and all answers.
    """

    first: float
    whole: float
    after: int
    ids: list[list[int]]

    @property
    def rate(self) -> float:
        """Tokens per second once all speak."""
        return self.after / (self.whole - self.first)


def prompts(rows: int) -> list[list[int]]:
    """The same for every arm."""
    draw = torch.Generator().manual_seed(1)
    return torch.randint(4, VOCABULARY, (rows, PROMPT), generator=draw).tolist()


def engine_for(model: Any, asked: list[list[int]], new: int) -> Any:
    """Our engine with room for so many sequences and tokens."""
    from gemma_ft.infer.engine import Engine

    return Engine(model, stop_ids=(), max_batch=len(asked), max_seq_len=max(map(len, asked)) + new)


def by_engine(model: Any, asked: list[list[int]], new: int, engine: Any = None) -> Answered:
    """Our engine, to the end of all answers; one that was there before, or a new one."""
    from gemma_ft.infer.engine import Request

    engine = engine or engine_for(model, asked, new)
    begun = time.perf_counter()
    rows = {engine.submit(Request(one, new)): row for row, one in enumerate(asked)}
    ids: list[list[int]] = [[] for _ in asked]
    first, spoken = 0.0, 0
    while engine.active or engine.waiting:
        for emitted in engine.step():
            ids[rows[emitted.ticket]].append(emitted.token_id)  # type: ignore[arg-type]
        if not first and all(ids):
            first, spoken = time.perf_counter() - begun, sum(map(len, ids))
    return Answered(first, time.perf_counter() - begun, sum(map(len, ids)) - spoken, ids)


def by_generate(model: Any, asked: list[list[int]], new: int, **options: Any) -> Answered:
    """transformers' `generate`; a stopping criterion that never stops tells the time of each token."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    times: list[float] = []

    class Clock(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    ids = torch.tensor(asked, device=model.device)
    begun = time.perf_counter()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
                         eos_token_id=None, pad_token_id=0, stopping_criteria=StoppingCriteriaList([Clock()]),
                         **options)  # fmt: skip
    whole = time.perf_counter() - begun
    return Answered(times[0] - begun, whole, len(asked) * (new - 1), out[:, ids.shape[1] :].tolist())


def arms_of(folder: Path, quantize: str | None) -> dict[str, Callable[..., Answered]]:
    """Both models loaded, and how each is asked."""
    from functools import partial

    from transformers import AutoModelForCausalLM

    from gemma_ft.adapters.quantize import quantization_config
    from gemma_ft.build.pretrained import load_model

    more: dict[str, Any] = {}
    if quantize:
        more["quantization_config"] = quantization_config("nf4", double_quant=True, compute_dtype=torch.bfloat16)
    stock = AutoModelForCausalLM.from_pretrained(str(folder / "base"), dtype=torch.bfloat16, **more).eval()
    return {
        "ours": partial(by_engine, load_model(folder / "base", quantize=quantize)),
        "stock": partial(by_generate, stock),
        "stock_static": partial(by_generate, stock, cache_implementation="static"),
    }


@torch.no_grad()
def logit_errors(folder: Path, quantize: str | None, arms: dict[str, Any]) -> dict[str, float]:
    """How far the logits of a prompt are from those computed in float32 on the same stored weights, relative to their
    norm: answers part where two tokens are nearly as likely, and neither is to be less exact.
    """
    from gemma_ft.build.located import Source
    from gemma_ft.build.pretrained import load_base

    ids = torch.tensor(prompts(1))
    truth = load_base(Source(str(folder / "base"), None), dtype=torch.float32, quantize=quantize).eval()(ids).logits
    found = {name: run.args[0](ids).logits.float() for name, run in arms.items() if name != "stock_static"}
    return {name: round(float((one - truth).norm() / truth.norm()), 5) for name, one in found.items()}


def measured(arms: dict[str, Callable[..., Answered]], rows: int, new: int, turns: int) -> dict[str, Any]:
    """One line: each arm warmed up, then all in turns."""
    asked = prompts(rows)
    for run in arms.values():
        run(asked, min(new, 8))
    found = in_turns({name: lambda run=run: run(asked, new) for name, run in arms.items()}, turns)
    rates = {name: [one.rate for one in ones] for name, ones in found.items()}
    firsts = {name: [one.first for one in ones] for name, ones in found.items()}
    said = [token for row in found["ours"][0].ids for token in row]
    return {
        "tokens_per_second": {name: round(statistics.median(ones), 1) for name, ones in rates.items()},
        "first_token_seconds": {name: round(statistics.median(ones), 3) for name, ones in firsts.items()},
        "ours_over": {name: paired(rates["ours"], ones) for name, ones in rates.items() if name != "ours"},
        "first_token_ours_over": {
            name: paired(ones, firsts["ours"]) for name, ones in firsts.items() if name != "ours"
        },
        "tokens": len(said),
        "distinct_tokens": len(set(said)),
        "tokens_equal_to_ours": {name: equal_tokens(ones[0].ids, found["ours"][0].ids) for name, ones in found.items()},
    }  # fmt: skip


def equal_tokens(one: list[list[int]], other: list[list[int]]) -> int:
    """Tokens before the first that differs, summed over sequences: what comes after it continues another text."""
    count = 0
    for a, b in zip(one, other, strict=True):
        count += next((place for place, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1]), len(a))
    return count


def main(names: list[str], *, new: int = NEW, turns: int = TURNS) -> None:
    """Some lines or all, and the result file."""
    from gemma_ft.system import environment

    environment.quiet_libraries()
    chosen = [name for name in LINES if name in names] or list(LINES)
    lines: dict[str, Any] = {}
    errors: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        write_base(Path(place), lively=True)
        for quantize in dict.fromkeys(LINES[name][0] for name in chosen):
            arms = arms_of(Path(place), quantize)
            errors[quantize or "bf16"] = logit_errors(Path(place), quantize, arms)
            for name in (name for name in chosen if LINES[name][0] == quantize):
                lines[name] = measured(arms, LINES[name][1], new, turns)
                print(name, json.dumps(lines[name]), flush=True)
    write_result("decode_cpu", command=" ".join(["python -m benchmarks.decode_cpu", *names]), shape=SHAPE,
                 threads=torch.get_num_threads(), prompt=PROMPT, new_tokens=new, turns=turns, lines=lines,
                 logit_errors_against_float32=errors)  # fmt: skip


if __name__ == "__main__":
    if QUICK in sys.argv:
        main([name for name in sys.argv[1:] if name != QUICK], new=4, turns=1)
    else:
        main(sys.argv[1:])
