"""Tunes the real Gemma 3 270M on the scheduling set, before, after and in llama.cpp: `make demo-real`.

    .venv/bin/python -m benchmarks.demo_real FOLDER [--gsm8k FILE] [--steps N]

FOLDER: what `make real` made. Exact match of held-out rows: of the base as raw text (alone, and behind three training
rows) and in turns, of the tuned model in turns; then the merge, a GGUF file, and three answers of llama.cpp. With a
file of GSM8K a second, short run: perplexity of held-out answers before and after, and how many end in the right
number. Everything lies in runs/demo_real* afterwards; the figures go to benchmarks/results/demo_real.json. --steps N:
few rows are scored, to see that all of it runs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.shared.record import RESULTS, ROOT, write_result
from tests.real.fetch import packages

RECIPE = "sft_gemma3_270m"
RUN = Path("runs/demo_real")
MERGED, GGUF = RUN.with_name("demo_real_merged"), RUN.with_name("demo_real_gguf") / "demo_real.gguf"
GSM8K_RUN = RUN.with_name("demo_real_gsm8k")
TEXT_TASKS = {"scheduling_text": "as text", "scheduling_text_shown": "as text, three examples before"}
HELD_OUT = ROOT / "data" / "scheduling_eval.jsonl"
ROWS, FEW_ROWS, ANSWERS = 100, 8, 3
STEPS = 75  # of two sequences of 512 tokens
GSM8K_STEPS, GSM8K_ROWS, GSM8K_ANSWERS = 40, 50, 20
GSM8K_READ, GSM8K_HELD_OUT = 1000, 0.1  # rows of the file, and the share of them that is held out
# Many steps of few tokens: all that this asks for is learned within a fraction of an epoch at this learning rate.
TRAINING = ("strategy=lora", "adapter.rank=16", "adapter.alpha=32", "data.max_seq_len=512", "data.packing=true",
            "train.precision=bf16", "train.global_batch_size=2", "train.micro_batch_size=2",
            "train.learning_rate=1.0e-3", "checkpoint.every_steps=null")  # fmt: skip
KEPT = ("steps", "tokens", "seconds", "tokens_per_second", "peak_bytes", "train_loss", "eval_before", "eval_after",
        "gain", "forgetting")  # fmt: skip


class Parts:
    """Seconds of each part of the demo."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Times what is done within."""
        print(f"== {name}", file=sys.stderr, flush=True)
        begun = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - begun, 1)


def gemma_ft(*arguments: str | Path) -> None:
    """One verb of the command line."""
    subprocess.run([sys.executable, "-m", "gemma_ft", *map(str, arguments)], cwd=ROOT, check=True, stdout=sys.stderr)


def read(path: Path) -> Any:
    """A JSON file under the checkout."""
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def base_as_text(model: str, recipe: str, rows: int) -> dict[str, float]:
    """Exact match of the base that reads requests as text, one BOS before them, by the name of the form."""
    out = RUN.with_name("demo_real_text.json")
    gemma_ft("eval", recipe, model, *TRAINING, f"output_dir={RUN}", "data.train=data/scheduling_train.jsonl",
             "data.eval=null", "data.eval_fraction=0.0", "--models", "base", "--tasks", ",".join(TEXT_TASKS),
             "--task-path", ROOT / "benchmarks" / "tasks", "--task-limit", str(rows), "--batch-size", "25",
             "--out", out)  # fmt: skip
    found = read(out)["tasks"]["base"]
    (ROOT / out).unlink()
    return {said: found[task]["exact_match"]["value"] for task, said in TEXT_TASKS.items()}


def trained(model: str, recipe: str, rows: int, steps: int) -> dict[str, Any]:
    """The figures of the run, which scores the held-out rows in turns before and after."""
    gemma_ft("train", recipe, "--overwrite", model, *TRAINING, f"output_dir={RUN}",
             "data.train=data/scheduling_train.jsonl", f"data.eval={HELD_OUT.relative_to(ROOT)}",
             "data.eval_fraction=0.0", f"train.max_steps={steps}", "eval.every_steps=null", f"eval.max_rows={rows}",
             f"eval.generate_rows={rows}", "eval.max_new_tokens=64", "eval.batch_size=25")  # fmt: skip
    summary = read(RUN / "summary.json")
    return {key: summary[key] for key in KEPT}


def llama_answers(rows: int) -> list[dict[str, str]]:
    """What llama.cpp answers to held-out rows behind those that were scored, in the turns that its file writes."""
    messages = [json.loads(line)["messages"] for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]
    asked = [(question["content"], answer["content"]) for question, answer in messages[rows : rows + ANSWERS]]
    child = [sys.executable, ROOT / "benchmarks" / "shared" / "llama_chat.py", ROOT / GGUF,
             packages()["xllamacpp"].folder]  # fmt: skip
    said = subprocess.run(list(map(str, child)), input=json.dumps([question for question, _ in asked]), check=True,
                          stdout=subprocess.PIPE, text=True).stdout  # fmt: skip
    pairs = zip(asked, json.loads(said), strict=True)
    return [{"asked": question, "expected": answer, "said": found} for (question, answer), found in pairs]


def gsm8k(model: str, recipe: str, file: Path, *, steps: int, rows: int) -> dict[str, Any]:
    """A short run on GSM8K: base and adapter on rows that were held out."""
    gemma_ft("train", recipe, "--overwrite", model, *TRAINING, f"output_dir={GSM8K_RUN}",
             f"data.train={{path: {json.dumps(str(file))}, max_rows: {GSM8K_READ}}}", "data.eval=null",
             f"data.eval_fraction={GSM8K_HELD_OUT}", f"train.max_steps={steps}",
             "eval.every_steps=null", "eval.max_rows=1", "eval.generate_rows=0", "eval.samples=0",
             "eval.canary=null")  # fmt: skip
    # scored here alone, and not before and after as well
    out = GSM8K_RUN / "scores.json"
    answers = min(rows, GSM8K_ANSWERS)
    gemma_ft("eval", GSM8K_RUN, f"eval.max_rows={rows}", f"eval.generate_rows={answers}", "eval.max_new_tokens=256",
             "--models", "base,adapter", "--batch-size", "10", "--metrics", "exact_match,numeric_match",
             "--out", out)  # fmt: skip
    summary, models = read(GSM8K_RUN / "summary.json"), read(out)["models"]
    return {"steps": steps, "tokens": summary["tokens"], "rows": rows, "answers": answers,
            "before": models["base"], "after": models["adapter"]}  # fmt: skip


def main() -> None:
    """Command line: see the top of this file."""
    parser = argparse.ArgumentParser(description="Tune the real Gemma 3 270M, merge and export it, and ask llama.cpp.")
    parser.add_argument("folder", type=Path, help="The model folder that `make real` made.")
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--gsm8k", type=Path, metavar="FILE", help="Rows with question and answer.")
    parser.add_argument("--steps", type=int, metavar="N", help="So many steps and few rows, to see that it runs.")
    given = parser.parse_args()
    if not (given.folder / "config.json").is_file():
        parser.error(f"{given.folder}: no model folder; `make real` makes one")
    if given.gsm8k is not None and not given.gsm8k.is_file():
        parser.error(f"--gsm8k {given.gsm8k}: no such file")
    model, rows = f"model.weights={given.folder.resolve()}", FEW_ROWS if given.steps else ROWS
    found: dict[str, Any] = {}
    parts = Parts()
    for place in (RUN, MERGED, GGUF.parent, GSM8K_RUN):
        shutil.rmtree(ROOT / place, ignore_errors=True)
    (ROOT / RUN).parent.mkdir(exist_ok=True)
    with parts.part("base as text"):
        as_text = base_as_text(model, given.recipe, rows)
    with parts.part("train, in turns before and after"):
        found["scheduling"] = {"before": as_text, **trained(model, given.recipe, rows, given.steps or STEPS)}
    with parts.part("merge and export"):
        gemma_ft("merge", RUN, "--out", MERGED)
        gemma_ft("export", MERGED, "--to", "gguf", "--out", GGUF)
        found["merge"] = read(MERGED / "merge.json")["certificate"]["merged"]
    with parts.part("llama.cpp"):
        found["llama.cpp"] = llama_answers(rows)
    if given.gsm8k is not None:
        with parts.part("GSM8K"):
            few = {"steps": given.steps or GSM8K_STEPS, "rows": FEW_ROWS if given.steps else GSM8K_ROWS}
            found["gsm8k"] = gsm8k(model, given.recipe, given.gsm8k.resolve(), **few)
    found |= {"rows": rows, "seconds": parts.seconds, "seconds_end_to_end": round(sum(parts.seconds.values()), 1)}
    write_result("demo_real", also=("lm_eval", "gguf"), **found)
    for answer in found["llama.cpp"]:
        print(f"llama.cpp: {answer['asked']}\n        -> {answer['said']}")
    print(in_words(read(RESULTS / "demo_real.json")))


def in_words(result: dict[str, Any]) -> str:
    """The paragraph that README.md has of a result file, without its line breaks."""
    job, rows, cores = result["scheduling"], result["rows"], result["machine"]["cores"]
    alone, shown = job["before"].values()
    right = sum(answer["said"] == answer["expected"] for answer in result["llama.cpp"])
    text = (
        f"With Google's own weights, fetched as a package: LoRA of Gemma 3 270M takes exact match on {rows} held-out "
        f"scheduling requests from {alone:.0%} as raw text ({shown:.0%} behind three examples, "
        f"{job['eval_before']['exact_match']:.0%} in turns) to {job['eval_after']['exact_match']:.0%}, in "
        f"{job['steps']} steps, {job['tokens']:,} tokens, {job['seconds']:.0f} s on {cores} CPU cores; merged and "
        f"exported as GGUF, {right} of {len(result['llama.cpp'])} answers of llama.cpp are right."
    )
    if "gsm8k" in result:
        one = result["gsm8k"]
        (low, few), (high, more) = (
            (one[name]["perplexity"]["value"], one[name]["numeric_match"]["value"]) for name in ("after", "before")
        )
        text += (
            f" On GSM8K {one['steps']} steps take perplexity of held-out answers from {high:.2f} to {low:.2f}; "
            f"{more:.0%} of {one['answers']} answers end in the right number before, {few:.0%} after."
        )
    return text


if __name__ == "__main__":
    main()
