"""Writes the tiny Gemma's synthetic data: the scheduling task's two splits and the preferences on it, the pretraining
corpus, the copying probe.

    python data/tiny_corpus.py task               # data/scheduling_train.jsonl and data/scheduling_eval.jsonl
    python data/tiny_corpus.py preferences        # data/preferences_train.jsonl and data/preferences_eval.jsonl
    python data/tiny_corpus.py orders OUT.jsonl   # the task's train rows, answers in both orders of their keys
    python data/tiny_corpus.py corpus OUT.jsonl   # the pretraining corpus (large: not kept in the repository)
    python data/tiny_corpus.py probe OUT.jsonl    # copying probe: rows whose answers can only be copied

The same arguments always write the same bytes.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tiny_kinds import KINDS, Row, extract, repeat
from tiny_preferences import both_orders, preference_rows
from tiny_tasks import scheduling_rows

HERE = Path(__file__).resolve().parent
TASK_SEED, CORPUS_SEED, PROBE_SEED, PREFERENCE_SEED, ORDER_SEED = 7, 11, 13, 17, 19
TRAIN_ROWS, EVAL_ROWS, CORPUS_ROWS, PROBE_ROWS = 2000, 200, 180_000, 400
TRAIN_PAIRS, EVAL_PAIRS = 600, 100
SPLITS = {"task": "scheduling", "preferences": "preferences"}  # commands that write two files of a name


def first_text(row: Row) -> str:
    """The user's first message: what makes a row this row and no other."""
    return row["messages"][0]["content"]


def task_rows() -> tuple[list[Row], list[Row]]:
    """The committed splits of the scheduling task: train and held-out."""
    return scheduling_rows(TASK_SEED, TRAIN_ROWS, EVAL_ROWS)


def pair_rows() -> tuple[list[Row], list[Row]]:
    """The committed splits of the preferences: train and held-out; no request of the task's splits occurs."""
    kept_out = {first_text(row) for split in task_rows() for row in split}
    return preference_rows(PREFERENCE_SEED, TRAIN_PAIRS, EVAL_PAIRS, kept_out)


def corpus_rows(rows: int, seed: int = CORPUS_SEED) -> Iterator[Row]:
    """That many corpus rows, kinds mixed by their shares; requests of the scheduling task's splits never occur."""
    rng = random.Random(seed)
    kept_out = {first_text(row) for split in task_rows() for row in split}
    makers, shares = [maker for maker, _ in KINDS], [share for _, share in KINDS]
    made = 0
    while made < rows:
        row = rng.choices(makers, shares)[0](rng)
        if first_text(row).split("\n")[0] not in kept_out:
            made += 1
            yield row


def probe_rows(rows: int = PROBE_ROWS) -> Iterator[Row]:
    """Rows that ask for a copy: half repeat a text, half give the value of a named field."""
    rng = random.Random(PROBE_SEED)
    for index in range(rows):
        yield (repeat if index % 2 else extract)(rng)


def write_jsonl(rows: Iterable[Row], path: Path) -> int:
    """Writes rows as JSON lines (UTF-8) and returns how many there were."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def main() -> None:
    """Command line: see the top of this file."""
    parser = argparse.ArgumentParser(description="Write the tiny Gemma's synthetic data.")
    parser.add_argument("what", choices=(*SPLITS, "orders", "corpus", "probe"))
    parser.add_argument("out", nargs="?", type=Path, help="file to write, or folder (task, preferences)")
    parser.add_argument("--rows", type=int, default=CORPUS_ROWS, help="corpus rows")
    options = parser.parse_args()
    if options.what in SPLITS:
        folder = options.out or HERE
        splits = task_rows() if options.what == "task" else pair_rows()
        for rows, side in zip(splits, ("train", "eval"), strict=True):
            path = folder / f"{SPLITS[options.what]}_{side}.jsonl"
            print(f"{path}: {write_jsonl(rows, path)} rows")
        return
    if options.out is None:
        parser.error(f"{options.what}: name the file to write")
    single: dict[str, Callable[[], Iterable[Row]]] = {
        "orders": lambda: both_orders(task_rows()[0], ORDER_SEED),
        "corpus": lambda: corpus_rows(options.rows),
        "probe": probe_rows,
    }
    print(f"{options.out}: {write_jsonl(single[options.what](), options.out)} rows")


if __name__ == "__main__":
    main()
