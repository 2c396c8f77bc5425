"""README.md quotes measured figures, names files that exist, and fits a page."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_figures_are_those_of_the_result_file() -> None:
    arms = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text(encoding="utf-8"))["arms"]
    demo = arms["qlora nf4 (make demo)"]
    before, after = demo["eval_before"], demo["eval_after"]
    assert f"| exact match | {before['exact_match']:.0%} | {after['exact_match']:.0%} |" in README
    assert f"| loss per token | {before['loss']:.2f} | {after['loss']:.4f} |" in README
    assert f"{demo['steps']} steps, {demo['tokens']:,} tokens in {demo['seconds']:.0f} s" in README
    for arm in arms.values():
        assert arm["eval_before"]["exact_match"] < 0.05
        assert arm["eval_after"]["exact_match"] >= 0.9


def test_it_names_what_is_there_and_fits_a_page() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
    for folder in re.findall(r"^\| `([\w/.]+)` \|", README, re.M):
        assert (ROOT / folder).exists(), folder
    assert len(README.splitlines()) <= 80
