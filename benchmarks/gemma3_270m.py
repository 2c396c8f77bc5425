"""The real Gemma 3 270M on the CPU, in bf16, arms in turns in one run: training LoRA of rank 16 on packed rows of 1,024
tokens, against transformers + PEFT + TRL; answering one sequence, against transformers' `generate` and llama.cpp on the
BF16 file that we export. Writes benchmarks/results/gemma3_270m.json.

    .venv/bin/python -m benchmarks.gemma3_270m [--model DIR]       all of it, on the machine's threads
    .venv/bin/python -m benchmarks.gemma3_270m --gguf FILE ...     a BF16 file that is there already
    .venv/bin/python -m benchmarks.gemma3_270m --answers           answers anew, beside the steps of an earlier run

Every arm is a process of its own. llama.cpp is the one of the package xllamacpp, as it was built: for SSE3 to
AVX2, without AVX-512.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import train_cpu
from benchmarks.decode_cpu import by_engine, by_generate
from benchmarks.shared.hundred_million import RANK
from benchmarks.shared.limits import read_rate
from benchmarks.shared.record import RESULTS, write_result
from benchmarks.shared.turns import QUICK, in_turns, paired
from gemma_ft.system import environment

TRAINED = ("ours", "stock", "stock_best", "stock_best_sdpa")
ANSWERING = ("ours", "generate", "llama.cpp")
LINE = train_cpu.Line(tokens=1024, rows=2, vocabulary=262_144)
PROMPT, NEW = 512, 64


def write_start(folder: Path, model: Path) -> None:
    """folder/base, the model, and folder/adapter, a LoRA start on it that all arms share."""
    from peft import LoraConfig, get_peft_model

    from gemma_ft.build.pretrained import load_model

    (folder / "base").symlink_to(model.resolve())
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    wrapped: Any = get_peft_model(load_model(model, dtype=torch.bfloat16), config)
    wrapped.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)


def train(arm: str, folder: Path, steps: int) -> None:
    """One arm's steps, told on the last line."""
    if arm == "ours":
        trainer = train_cpu.our_trainer(folder, LINE)
    else:
        attention = "sdpa" if arm.endswith("sdpa") else "eager"
        trainer = train_cpu.stock_trainer(folder, LINE, best=arm != "stock", attention=attention)
    train_cpu.run_steps(trainer, LINE, steps)


@torch.no_grad()
def answer(arm: str, model: Path, new: int) -> None:
    """One arm's tokens per second, told on the last line, after a first answer to warm up."""
    draw = torch.Generator().manual_seed(1)
    asked = torch.randint(1000, 200_000, (1, PROMPT), generator=draw).tolist()
    if arm == "llama.cpp":
        print(json.dumps(llama_rate(model, asked[0], new)))
        return
    from transformers import AutoModelForCausalLM

    from gemma_ft.build.pretrained import load_model

    if arm == "ours":
        run = partial(by_engine, load_model(model, dtype=torch.bfloat16))
    else:
        run = partial(by_generate, AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.bfloat16).eval())
    run(asked, 8)
    found = run(asked, new)
    print(json.dumps({"tokens_per_second": found.rate, "first_token_seconds": found.first}))


def llama_rate(file: Path, ids: list[int], new: int) -> dict[str, Any]:
    """The same of llama.cpp, by its own clock."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup = str(file), PROMPT + NEW + 8, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(params)
    told = server.handle_completions(
        {"prompt": ids, "n_predict": new, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    )
    timings = told["timings"]
    return {
        "tokens_per_second": timings["predicted_per_second"],
        "first_token_seconds": timings["prompt_ms"] / 1e3,
    }


def child(*arguments: Any, path: str | None = None) -> dict[str, Any]:
    """What an arm's process tells; `path`: where a package lies that is not installed."""
    more = [os.environ.get("PYTHONPATH"), path]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(one for one in more if one)}
    if arguments[:2] == ("--answer", "ours"):  # as the verbs that answer do, before torch is imported
        variables |= {environment.HUGE_PAGES: "1"}
    command = [sys.executable, "-m", "benchmarks.gemma3_270m", *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=variables)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def trained(model: Path, turns: int, steps: int) -> dict[str, Any]:
    """Training, all arms in turns."""
    with tempfile.TemporaryDirectory() as place:
        write_start(Path(place), model)
        arms = {one: partial(child, "--train", one, "--model", place, "--count", steps) for one in TRAINED}
        found = in_turns(arms, turns)
    speed = {arm: [one["tokens"] / sum(one["seconds"]) for one in ones] for arm, ones in found.items()}
    memory = {arm: min(one["above_the_model"] for one in ones) for arm, ones in found.items()}
    return {
        "tokens_per_second": {arm: round(statistics.median(ones), 1) for arm, ones in speed.items()},
        "ours_over": {arm: paired(speed["ours"], speed[arm]) for arm in TRAINED[1:]},
        "above_the_model_mib": {arm: round(one / 2**20) for arm, one in memory.items()},
        "losses": {arm: ones[0]["losses"] for arm, ones in found.items()},
    }


def answered(model: Path, gguf: Path, package: str, turns: int, new: int) -> dict[str, Any]:
    """Answering, all arms in turns."""
    files = {"ours": model, "generate": model, "llama.cpp": gguf}
    found = in_turns(
        {one: partial(child, "--answer", one, "--model", files[one], "--count", new, path=package)
         for one in ANSWERING}, turns,
    )  # fmt: skip
    rates = {arm: [one["tokens_per_second"] for one in ones] for arm, ones in found.items()}
    return {
        "tokens_per_second": {arm: round(statistics.median(ones), 1) for arm, ones in rates.items()},
        "first_token_seconds": {
            arm: round(statistics.median(one["first_token_seconds"] for one in ones), 3) for arm, ones in found.items()
        },
        "ours_over": {arm: paired(rates["ours"], rates[arm]) for arm in ANSWERING[1:]},
    }


def main() -> None:
    """Measure all arms, or be one of them."""
    from tests.real.fetch import gemma3_270m_folder

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=gemma3_270m_folder())
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument(QUICK, action="store_true")
    parser.add_argument("--answers", action="store_true", help="answers alone, beside the steps of an earlier run")
    for name, arms in (("--train", TRAINED), ("--answer", ANSWERING)):  # one arm, in its own process
        parser.add_argument(name, choices=arms, help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, default=NEW, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.train:
        train(asked.train, asked.model, asked.count)
    elif asked.answer:
        answer(asked.answer, asked.model, asked.count)
    else:
        measure(asked)


def measure(asked: argparse.Namespace) -> None:
    """Both parts, and the result file."""
    from tests.real.fetch import packages

    turns, new = (1, 8) if asked.quick else (asked.turns, NEW)
    with tempfile.TemporaryDirectory() as place:
        gguf = asked.gguf or Path(place) / "bf16.gguf"
        if asked.gguf is None:
            export = ["export", str(asked.model), "--to", "gguf", "--gguf-type", "bf16", "--out", str(gguf)]
            subprocess.run([sys.executable, "-m", "gemma_ft", *export], check=True)
        answers = answered(asked.model, gguf, str(packages()["xllamacpp"].folder), turns, new)
    print(json.dumps(answers), flush=True)
    command = "python -m benchmarks.gemma3_270m"
    if asked.answers:  # beside the steps of an earlier run, which keep the commit that they are of
        before = json.loads((RESULTS / "gemma3_270m.json").read_text(encoding="utf-8"))
        steps = {"commit": before["commit"], **before["training"]}
        command += " --answers"
    else:
        steps = trained(asked.model, turns, train_cpu.STEPS - 1 if asked.quick else train_cpu.STEPS)
        print(json.dumps(steps), flush=True)
    write_result("gemma3_270m", command=command, threads=torch.get_num_threads(),
                 turns=turns, read_gigabytes_per_second=round(read_rate() / 1e9, 1), tokens=LINE.tokens,
                 rows=LINE.rows, rank=RANK, labelled=train_cpu.LABELLED, prompt=PROMPT, new_tokens=new,
                 training=steps, answering=answers)  # fmt: skip


if __name__ == "__main__":
    main()
