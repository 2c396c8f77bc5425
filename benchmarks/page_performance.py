"""The tables of docs/performance.md, out of result files; each lies between two marks that name it.

.venv/bin/python -m benchmarks.page_performance        write the page anew
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.preferences_cpu import RATIOS, TIMES
from benchmarks.shared.record import PUBLISHED, ROOT

PAGE = ROOT / "docs" / "performance.md"
MARKED = re.compile(r"<!-- table: (\w+) -->\n.*?<!-- end of table -->", re.DOTALL)
Rows = list[list[str]]  # the first is the head


def train_cpu(result: dict[str, Any]) -> Rows:
    rows = [["", "ours tok/s", "stock tok/s", "stock_best tok/s", "over stock", "over stock_best",
             "memory above the model, to stock_best", "of the limit: bf16, float32"]]  # fmt: skip
    for name, arm in result["arms"].items():
        over, memory = arm["ours_over"], arm["above_the_model_mib"]
        rows.append([
            f"`{name}`",
            *(f"{arm['tokens_per_second'][one]:,.0f}" for one in ("ours", "stock", "stock_best")),
            *(f"{over[one]:.1f}x" for one in ("stock", "stock_best")),
            f"{memory['ours'] / memory['stock_best']:.2f}",
            ", ".join(f"{one:.0%}" for one in arm["of_the_limit"].values()),
        ])  # fmt: skip
    return rows


def preferences_cpu(result: dict[str, Any]) -> Rows:
    rows = [["a step of one pair", "s", "beside", "s", "is", "MiB above the model, of both"]]
    seconds = {name: min(min(turn) for turn in turns) for name, turns in result["seconds"].items()}
    memory = result["above_the_model_mib"]
    for of_result, arms, how in (("ours_over", RATIOS, "as fast"), ("times_as_long", TIMES, "as long")):
        for name, (one, other) in arms.items():
            told = f"{result[of_result][name]:.2f}x {how}"
            sizes = f"{memory[one]:,}, {memory[other]:,}"
            rows.append([one, f"{seconds[one]:.2f}", other, f"{seconds[other]:.2f}", told, sizes])
    return rows


def decode_cpu(result: dict[str, Any]) -> Rows:
    rows = [["", "ours tok/s", "stock tok/s", "stock_static tok/s", "over stock", "over stock_static",
             "first token, ours s", "stock s", "equal tokens"]]  # fmt: skip
    for name, line in result["lines"].items():
        first, same = line["first_token_seconds"], line["tokens_equal_to_ours"]
        rows.append([
            f"`{name}`",
            *(f"{line['tokens_per_second'][one]:,.1f}" for one in ("ours", "stock", "stock_static")),
            *(f"{line['ours_over'][one]['median']:.2f}x" for one in ("stock", "stock_static")),
            f"{first['ours']:.2f}",
            f"{first['stock']:.2f}",
            f"{same['stock']} of {line['tokens']}",
        ])  # fmt: skip
    return rows


def gemma3_270m(result: dict[str, Any]) -> Rows:
    rows = [["the real Gemma 3 270M, bf16", "ours tok/s", "others tok/s", "ours over", "memory, to theirs"]]
    training, answering = result["training"], result["answering"]
    memory = training["above_the_model_mib"]
    for what, part in (("LoRA, T = 1,024", training), ("one answer", answering)):
        for other, over in part["ours_over"].items():
            speed = part["tokens_per_second"]
            share = f"{memory['ours'] / memory[other]:.2f}" if part is training else ""
            rates = [f"{speed[arm]:,.1f}" for arm in ("ours", other)]
            rows.append([f"{what}: {other}", *rates, f"{over['median']:.2f}x", share])
    return rows


def startup(result: dict[str, Any]) -> Rows:
    return [["until it ends, or the first step is made", "s"],
            *([name, f"{seconds:.2f}"] for name, seconds in result["seconds"].items())]  # fmt: skip


def starts(result: dict[str, Any]) -> Rows:
    seconds = result["cpu_seconds"]
    rows = [["CPU seconds until", "now", "before", "now, of before"]]
    for what, ratio in result["ratios"].items():
        if f"{what}: now" in seconds:
            now, before = (f"{seconds[f'{what}: {arm}']:.1f}" for arm in ("now", "before"))
            rows.append([what, now, before, f"{ratio['median']:.2f}x"])
    return rows


def merge_speed(result: dict[str, Any]) -> Rows:
    speed = result["megabytes_per_second"]
    return [["", "ours MB/s", "PEFT MB/s", "over PEFT", "largest difference, of the largest change"],
            ["100M, bf16", f"{speed['ours']:.0f}", f"{speed['peft']:.0f}", f"{result['ours_over']['median']:.1f}x",
             f"{result['largest_difference_over_largest_change']:.1%}"]]  # fmt: skip


def tiny(result: dict[str, Any]) -> Rows:
    return [["recipes/sft_tiny.yaml", "end to end s", "of it training s", "tok/s", "loss", "exact match"],
            *([name, f"{arm['seconds_end_to_end']:.0f}", f"{arm['seconds']:.0f}", f"{arm['tokens_per_second']:,.0f}",
               f"{arm['eval_after']['loss']:.4f}", f"{arm['eval_after']['exact_match']:.0%}"]
              for name, arm in result["arms"].items())]  # fmt: skip


def profile_cpu(result: dict[str, Any]) -> Rows:
    rows = [["", "stock_best", "ours, before", "ours, now"]]
    for line, now in result["after"]["lines"].items():
        arms = (now["stock_best"], result["before"]["lines"][line]["ours"], now["ours"])
        rows.append([f"`{line}`: a step, ms", *(f"{arm['step_ms']:,}" for arm in arms)])
        for place, operations in enumerate(zip(*(arm["slowest"] for arm in arms), strict=True), 1):
            rows.append([str(place), *(f"`{one['operation']}` {one['share']:.0%}" for one in operations)])
    return rows


def curves(result: dict[str, Any]) -> Rows:
    rows = [["", "loss, first and last", "bf16 plain, mean distance", "bf16 fast", "float32 fast"]]
    for strategy, found in result["strategies"].items():
        first, last = found["first_and_last_loss"]
        apart = (found[f"{arm}, from float32 plain"]["mean"] for arm in ("bf16, plain", "bf16, fast", "float32, fast"))
        rows.append([strategy, f"{first:.3f}, {last:.3f}", *(f"{one:.1e}" for one in apart)])
    return rows


def before(result: dict[str, Any]) -> Rows:
    rows = [["recipes/sft_tiny.yaml", "s, before", "s, now", "times as fast", "tok/s, before", "tok/s, now",
             "loss, before", "loss, now"]]  # fmt: skip
    for name, found in result["strategies"].items():
        seconds, speed, loss = (found[key] for key in ("seconds", "tokens_per_second", "loss"))
        times = f"{found['times_as_fast']['median']:.2f}x"
        rows.append([name, f"{seconds['before']:.0f}", f"{seconds['now']:.0f}", times,
                     f"{speed['before']:,.0f}", f"{speed['now']:,.0f}", f"{loss['before']:.4f}",
                     f"{loss['now']:.4f}"])  # fmt: skip
    return rows


def launches(result: dict[str, Any]) -> Rows:
    rows = [["a layer's step", "stock: forwards, backwards", "ours", "of stock", "stock, checkpointed",
             "ours, checkpointed", "of stock"]]  # fmt: skip
    for line, arms in result["per_layer"].items():
        cells = [f"`{line}`"]
        for kind in ("", "_checkpointed"):
            stock, ours = (arms[f"{arm}{kind}"] for arm in ("stock", "ours"))
            cells += [f"{one['forward']} + {one['backward']}" for one in (stock, ours)]
            cells.append(f"{ours['total'] / stock['total']:.0%}")
        rows.append(cells)
    return rows


def compiled(result: dict[str, Any]) -> Rows:
    cards = list(next(iter(result["kernels"].values())))
    rows = [["in bf16: registers of a thread, KiB of shared memory of a block", *cards, "spilled bytes"]]
    for name, found in result["kernels"].items():
        kernel, numbers = name.rsplit(", ", 1)
        if numbers == "bf16":
            taken = [f"{one['registers']}, {one['shared'] / 1024:.0f}" for one in found.values()]
            rows.append([kernel, *taken, str(max(one["spills"] for one in found.values()))])
    return rows


TABLES: dict[str, Callable[[dict[str, Any]], Rows]] = {
    "train_cpu": train_cpu,
    "preferences_cpu": preferences_cpu,
    "decode_cpu": decode_cpu,
    "gemma3_270m": gemma3_270m,
    "merge_speed": merge_speed,
    "startup": startup,
    "starts": starts,
    "tiny": tiny,
    "profile_cpu": profile_cpu,
    "curves": curves,
    "before": before,
    "launches": launches,
    "compiled": compiled,
}


def rows_of(name: str, folder: Path = PUBLISHED) -> Rows:
    """The table of a result file."""
    return TABLES[name](json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))


def markdown(rows: Rows) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def columns(rows: Rows) -> str:
    """The same for a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)


def made(page: str) -> str:
    """The page with every table as the result files have it."""
    return MARKED.sub(
        lambda found: f"<!-- table: {found[1]} -->\n{markdown(rows_of(found[1]))}\n<!-- end of table -->", page
    )


if __name__ == "__main__":
    PAGE.write_text(made(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
