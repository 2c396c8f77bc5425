"""Answers 50 prompts on the tiny Gemma in three ways, in turns: through the engine, through transformers' `generate` on
the native model, and through `generate` on transformers' own model (left-padded batches, its own cache, the same
weights). Each with 64 tokens for every prompt; with answers that end where the model ends them, 64 tokens at the most;
and with 64 tokens after four prompts of 1500. Writes benchmarks/results/decode.json with machine, versions, commit and
ratios.

    .venv/bin/python -m benchmarks.decode
"""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.shared.record import ROOT, write_result
from gemma_ft.build.pretrained import load_model, load_tokenizer
from gemma_ft.data.conversation import Turn
from gemma_ft.data.encode.chat import ChatEncoder
from gemma_ft.infer.generate import generate_answers
from gemma_ft.system import environment

TINY = ROOT / "data" / "gemma-tiny"
PROMPTS, TOKENS, BATCH, ROUNDS = 50, 64, 16, 5


def prompts(encoder: ChatEncoder) -> list[list[int]]:
    """Questions of the shipped held-out set, of unequal length."""
    lines = (ROOT / "data" / "scheduling_eval.jsonl").read_text(encoding="utf-8").splitlines()[:PROMPTS]
    questions = [json.loads(line)["messages"][0]["content"] for line in lines]
    return [encoder.encode_prompt([Turn("user", text)]) for text in questions]


def by_generate(model: Any, asked: list[list[int]], stop_ids: list[int]) -> list[list[int]]:
    """Greedy answers through transformers' `generate`, prompts sorted by length and padded on the left."""
    answers: dict[int, list[int]] = {}
    order = sorted(range(len(asked)), key=lambda i: len(asked[i]))
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        longest = max(len(asked[i]) for i in rows)
        ids = torch.tensor([[0] * (longest - len(asked[i])) + asked[i] for i in rows])
        mask = torch.tensor([[0] * (longest - len(asked[i])) + [1] * len(asked[i]) for i in rows])
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=stop_ids or None,
            pad_token_id=0,
        )[:, longest:].tolist()
        for i, row in zip(rows, out, strict=True):
            end = next((place for place, token in enumerate(row) if token in stop_ids), None)
            answers[i] = row[:end]
    return [answers[i] for i in range(len(asked))]


def by_engine(model: Any, asked: list[list[int]], stop_ids: list[int]) -> list[list[int]]:
    """The same answers through the engine."""
    found = generate_answers(model, asked, stop_ids=stop_ids, max_new_tokens=TOKENS, batch_size=BATCH)
    return [answer.ids for answer in found]


def seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def measure(dtype: torch.dtype, asked: list[list[int]], stop_ids: list[int]) -> dict[str, Any]:
    """All arms in turns A B C C B A; median seconds, and the median of each arm's ratio to the engine in its turn."""
    native = load_model(TINY, dtype=dtype)
    stock = AutoModelForCausalLM.from_pretrained(TINY, dtype=dtype).eval()
    arms: dict[str, Callable[[], list[list[int]]]] = {
        "engine": lambda: by_engine(native, asked, stop_ids),
        "generate, native model": lambda: by_generate(native, asked, stop_ids),
        "generate, transformers' model": lambda: by_generate(stock, asked, stop_ids),
    }
    answers = {name: run() for name, run in arms.items()}  # warm-up
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(ROUNDS):
        for name in list(arms) if turn % 2 == 0 else list(reversed(arms)):
            times[name].append(seconds(arms[name]))
    made = sum(map(len, answers["engine"]))

    def figures(name: str) -> dict[str, Any]:
        ratios = [other / own for other, own in zip(times[name], times["engine"], strict=True)]
        equal = sum(a == b for a, b in zip(answers[name], answers["engine"], strict=True))
        return {
            "seconds": round(statistics.median(times[name]), 3),
            "tokens_per_second": round(made / statistics.median(times[name]), 1),
            "times_the_engine's_seconds": round(statistics.median(ratios), 2),
            "answers_equal_to_the_engine's": f"{equal} of {len(asked)}",
        }

    return {"tokens": made, **{name: figures(name) for name in arms}}


def main() -> None:
    """Measure in float32 and bf16, and write the result file."""
    environment.quiet_libraries()
    encoder = ChatEncoder(load_tokenizer(TINY))
    asked = prompts(encoder)
    long = torch.randint(100, 2000, (4, 1500), generator=torch.Generator().manual_seed(0)).tolist()
    kinds = {
        "64 tokens each": (asked, []),
        "until a stop token": (asked, encoder.stop_ids),
        "64 tokens after 1500": (long, []),
    }
    workloads = {
        f"{kind}, {name}": measure(dtype, *work)
        for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16))
        for kind, work in kinds.items()
    }
    print(json.dumps(workloads, indent=2))
    write_result(
        "decode",
        command=".venv/bin/python -m benchmarks.decode",
        threads=torch.get_num_threads(),
        prompts={kind: len(work[0]) for kind, work in kinds.items()},
        new_tokens=TOKENS,
        batch_size=BATCH,
        workloads=workloads,
    )


if __name__ == "__main__":
    main()
