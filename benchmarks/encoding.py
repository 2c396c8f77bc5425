"""Rows encoded by us and by `datasets.map` with the same tokenizer, side by side: rows per second, and peak memory.

.venv/bin/python -m benchmarks.encoding            writes benchmarks/results/encoding.json
.venv/bin/python -m benchmarks.encoding large      ours alone on a million rows: encoding_large.json
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.shared.record import write_result
from gemma_ft.system import hardware

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "data" / "gemma-tiny"
WORDS = [
    "the",
    "a",
    "of",
    "to",
    "and",
    "in",
    "is",
    "it",
    "you",
    "that",
    "he",
    "was",
    "for",
    "on",
    "are",
    "with",
    "as",
    "I",
    "his",
    "they",
    "be",
    "at",
    "one",
    "have",
    "this",
    "from",
]
ROWS, LARGE = 100_000, 1_000_000
ROUNDS = 3  # of each, in turn; the best counts
ASKED, ANSWERED = "question", "answer"


def write_rows(path: Path, rows: int) -> None:
    """Questions of 8 to 40 words with answers of 10 to 80."""
    chance = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            asked = " ".join(chance.choices(WORDS, k=chance.randint(8, 40)))
            answered = " ".join(chance.choices(WORDS, k=chance.randint(10, 80)))
            file.write(json.dumps({ASKED: f"{number} {asked}", ANSWERED: answered}) + "\n")


def ours(rows: Path, folder: Path) -> int:
    """All rows through the cache, which is empty: checked, encoded, labelled, written. Returns the tokens."""
    from gemma_ft.data.encode.cache import Cache
    from gemma_ft.data.encode.chat import ChatEncoder
    from gemma_ft.data.encode.encode_rows import Reading
    from gemma_ft.data.encode.tokenizer import load_tokenizer
    from gemma_ft.data.read.bad_rows import BadRows
    from gemma_ft.data.read.sources import read_chunks

    reading = Reading("prompt_completion", {}, ChatEncoder(load_tokenizer(str(TINY))))
    found = Cache(folder, hardware.processors()).documents(read_chunks(str(rows)), reading, BadRows())
    return int(found.column("tokens").sum())


def theirs(rows: Path, folder: Path) -> int:
    """The same rows through `datasets`: rendered as text, encoded, labelled by the length of the prompt, written.

    What is left out: control tokens that stand in the text become control tokens, and rows are not checked.
    """
    import datasets

    from gemma_ft.data.encode.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(TINY))

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        prompts = [f"<start_of_turn>user\n{one}<end_of_turn>\n<start_of_turn>model\n" for one in batch[ASKED]]
        whole = [f"{one}{two}<end_of_turn>\n" for one, two in zip(prompts, batch[ANSWERED], strict=True)]
        heads, ids = tokenizer(prompts)["input_ids"], tokenizer(whole)["input_ids"]
        labels = [[-100] * len(head) + one[len(head) :] for head, one in zip(heads, ids, strict=True)]
        return {"input_ids": ids, "labels": labels}

    data = datasets.load_dataset("json", data_files=str(rows), split="train", cache_dir=str(folder))
    found = data.map(encode, batched=True, num_proc=hardware.processors(), remove_columns=[ASKED, ANSWERED])
    return sum(len(part) for batch in found.iter(10_000) for part in batch["input_ids"])


def timed(side: str, rows: Path) -> dict[str, float]:
    """One side in a process of its own, from imports done to the last row written."""
    folder = Path(tempfile.mkdtemp(prefix="encoding-"))
    told = subprocess.run(
        [sys.executable, "-m", "benchmarks.encoding", side, str(rows), str(folder)],
        check=True, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    shutil.rmtree(folder)
    return dict(json.loads(told.stdout.splitlines()[-1]))


def one_side(side: str, rows: Path, folder: Path) -> None:
    import datasets  # noqa: F401  both sides begin with everything imported
    import transformers  # noqa: F401

    begun = time.perf_counter()
    tokens = {"ours": ours, "datasets.map": theirs}[side](rows, folder)
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"tokens": tokens, "seconds": seconds, "peak_bytes": peak}))


def large() -> None:
    """A million rows: how long they take, and that memory does not grow with them."""
    with tempfile.TemporaryDirectory() as place:
        rows = Path(place) / "rows.jsonl"
        write_rows(rows, LARGE)
        size, found = rows.stat().st_size, timed("ours", rows)
    figures = {**found, "rows_per_second": LARGE / found["seconds"]}
    write_result("encoding_large", command="python -m benchmarks.encoding large", rows=LARGE, file_bytes=size,
                 figures=figures)  # fmt: skip
    print(json.dumps(figures, indent=2))


def main() -> None:
    """Both sides in turn, the best round of each."""
    count = ROWS
    with tempfile.TemporaryDirectory() as place:
        rows = Path(place) / "rows.jsonl"
        write_rows(rows, count)
        rounds = [{side: timed(side, rows) for side in ("ours", "datasets.map")} for _ in range(ROUNDS)]
    best = {side: min((one[side] for one in rounds), key=lambda one: one["seconds"]) for side in rounds[0]}
    figures = {side: {**one, "rows_per_second": count / one["seconds"]} for side, one in best.items()}
    ratio = best["datasets.map"]["seconds"] / best["ours"]["seconds"]
    write_result("encoding", command="python -m benchmarks.encoding", rows=count, rounds=ROUNDS, figures=figures,
                 times_as_fast=ratio)  # fmt: skip
    print(json.dumps(figures, indent=2), f"{ratio:.2f} times as fast")


if __name__ == "__main__":
    if len(sys.argv) == 4:
        one_side(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    elif sys.argv[1:] == ["large"]:
        large()
    else:
        main()
