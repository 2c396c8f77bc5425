"""A run over preferences as a person sees it: its lines, its table, its page; made by the verb itself."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from gemma_ft.recipe.load import load_recipe
from gemma_ft.ui.pages.comparison import write_comparison
from gemma_ft.ui.training import train_and_show
from tests.ui.test_report import Seen, seen

PAIRS = [
    {"prompt": f"Say number {n}.", "chosen": f"It is {n}, friend.", "rejected": f"no {n}" + " x" * (n % 3)}
    for n in range(12)
]
LABELLED = [
    {"prompt": one["prompt"], "completion": one[side], "label": side == "chosen"}
    for one in PAIRS
    for side in ("chosen", "rejected")
]
QUICK = [
    "strategy=lora", "train.max_steps=2", "train.global_batch_size=4", "train.micro_batch_size=2", "adapter.rank=2",
    "eval.generate_rows=1", "eval.max_new_tokens=4", "eval.samples=1", "eval.canary=null", "eval.every_steps=1",
    "~data.columns", "data.max_seq_len=64", "train.learning_rate=0.01",
]  # fmt: skip
MOVED, NONE = r"kl 0\.000  entropy \d\.\d{3}", r"(0\.000|–)"


def told(root: Path, objective: str, rows: list[dict[str, object]]) -> tuple[Path, str]:
    """The run, and all that it said."""
    for name, some in (("train", rows[:-4]), ("eval", rows[-4:])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    data = [f"data.{name}={root}/{name}.jsonl" for name in ("train", "eval")]
    loaded = load_recipe("sft_tiny", [f"objective={objective}", f"output_dir={root}/run", *data, *QUICK])
    with (root / "said.txt").open("w") as sink:
        assert train_and_show(loaded, console=Console(file=sink, width=140)) == 0
    return root / "run", (root / "said.txt").read_text()


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return told(tmp_path_factory.mktemp("dpo"), "dpo", PAIRS)


def row(said: str, name: str) -> list[str]:
    """The cells of a row of the table."""
    (line,) = [line for line in said.splitlines() if line.startswith(f"│ {name} ")]
    return [cell.strip() for cell in line.strip("│").split("│")][1:]


def test_what_is_minimized_is_told_and_pairs_are_counted(compared: tuple[Path, str]) -> None:
    _, said = compared
    for line in (
        "  objective  dpo, beta 0.1, label_smoothing 0, length_normalized false, sft_weight 0",
        "             compared with the same model, its adapter switched off; no dropout",
        "  batch      4 pairs = 2 (micro batch) x 2 (accumulation) x 1 device",
    ):
        assert line in said.splitlines()
    assert re.search(r"^  data       \S+train\.jsonl: 8 pairs -> 16 answers, \d+ tokens, \d+% trained$", said, re.M)
    assert re.search(r"^             \d+ of up to 64 tokens in an answer with its prompt$", said, re.M)
    assert re.search(r"^  held out   \S+eval\.jsonl: 4 pairs -> 8 answers, \d+ tokens, \d+% trained$", said, re.M)
    assert re.search(rf"^  step 1/2  loss 0\.6931  margin 0\.000  accuracy 50\.0%  {MOVED}  \S+ tok/s", said, re.M)
    assert "examples" not in said


def test_accuracy_and_margin_stand_for_exact_match(compared: tuple[Path, str]) -> None:
    run, said = compared
    after = json.loads((run / "summary.json").read_text())["eval_after"]
    interval = f"({after['rewards/accuracies_low']:.1%} to {after['rewards/accuracies_high']:.1%})"
    assert row(said, "accuracy") == ["50.0%", f"{after['rewards/accuracies']:.1%} {interval}"]
    assert row(said, "reward, chosen answers") == ["0.0000", f"{after['rewards/chosen']:.4f}"]
    assert row(said, "margin") == ["0.0000", f"{after['rewards/margins']:.4f}"]
    assert row(said, "loss per pair") == ["0.6931", f"{after['loss']:.4f}"]
    assert "exact match" not in said


def test_the_page_draws_rewards_margin_accuracy_lengths_and_kl(compared: tuple[Path, str], tmp_path: Path) -> None:
    page = seen(compared[0])
    names = [str(attributes["alt"]) for tag, attributes in page.tags if tag == "img"]
    assert names[:8] == [
        f"{name} by step"
        for name in (
            "Loss per pair", "Rewards", "Accuracy of rewards", "Margin", "Margin per token", "Length of answers",
            "Log-probability of answers", "KL to the reference",
        )
    ]  # fmt: skip
    for expected in ("accuracy ", "% to ", "before: 50.0%", "margin ", "before: 0.0000", "8 pairs -> 16 answers"):
        assert expected in page.text, expected
    assert "exact match" not in page.text
    other = shutil.copytree(compared[0], tmp_path / "other")
    both = Seen(write_comparison([compared[0], other], tmp_path / "both.html").read_text(encoding="utf-8"))
    assert "accuracy of rewards before 50.0% 50.0%" in both.text
    assert "Training loss per pair of each run by step" in [a.get("alt") for tag, a in both.tags if tag == "img"]


def test_labelled_answers_are_rows_with_a_reward_each(tmp_path: Path) -> None:
    run, said = told(tmp_path, "kto", LABELLED)
    assert "20 rows -> 20 answers" in said
    assert "  batch      4 rows = 2 (micro batch)" in said
    assert re.search(rf"^  step 1/2  loss \S+  good 0\.000  bad {NONE}  margin {NONE}  {MOVED}  \S+ tok/s", said, re.M)
    assert [row(said, f"reward, {side} answers")[0] for side in ("good", "bad")] == ["0.0000", "0.0000"]
    assert row(said, "loss per row")
    names = [str(attributes["alt"]) for tag, attributes in seen(run).tags if tag == "img"]
    assert names[:2] == ["Loss per row by step", "Rewards by step"]
    assert "Margin by step" in names  # of the mean rewards of both labels
    assert "Accuracy of rewards by step" not in names
