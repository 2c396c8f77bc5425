"""The real Gemma 3 270M, tuned for a few steps: merged and exported once more, it answers as the live adapter does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import gemma_ft
from gemma_ft.cli.app import main
from gemma_ft.data.conversation import Turn
from gemma_ft.infer.session import open_session
from gemma_ft.system.shipped import shipped_root
from tests.parity.amplified import relative
from tests.real.long_texts import SENTENCES

STEPS = 4
TOLERANCE = 1e-5
HELD_OUT = shipped_root() / "data" / "scheduling_eval.jsonl"
ASKED = (
    "photo shoot, 17:05, 35 minutes, Wednesday, with Yusuf",
    "Plan lunch on Friday at noon.",
    "Who was Ada Lovelace?",
)
ANSWER_TOKENS = 24


@pytest.fixture(scope="module")
def run(gemma3_270m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA over the real weights in float32: what is compared is arithmetic, and no rounding of a file."""
    out = tmp_path_factory.mktemp("real-270m") / "run"
    words = ["sft_tiny", "strategy=lora", "~quantize", "model.preset=gemma-3-270m", f"model.weights={gemma3_270m}",
             f"data.eval={HELD_OUT}", "eval.max_rows=1", "eval.generate_rows=0", "eval.samples=0",
             "data.max_seq_len=128", f"train.max_steps={STEPS}",
             "train.global_batch_size=2", "train.micro_batch_size=2", "train.precision=float32",
             "train.learning_rate=1.0e-3", "eval.canary=null", "checkpoint.every_steps=null",
             f"output_dir={out}"]  # fmt: skip
    assert main(["train", *words]) == 0
    return out


@pytest.fixture(scope="module")
def merged(run: Path) -> Path:
    """The run merged into a folder, and that one exported once more."""
    once, again = run.with_name("merged"), run.with_name("exported")
    assert main(["merge", str(run), "--out", str(once), "--dtype", "f32", "--prompts", "2"]) == 0
    assert json.loads((once / "merge.json").read_text())["certificate"]["passed"]
    assert main(["export", str(once), "--to", "hf", "--out", str(again), "--dtype", "f32"]) == 0
    return again


def test_it_learned(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.5


def test_the_logits_are_those_of_the_live_adapter(run: Path, merged: Path, gemma3_270m: Path) -> None:
    ids = torch.tensor([gemma_ft.load_tokenizer(merged)(SENTENCES).input_ids])
    with torch.no_grad():
        live, found, base = (logits(gemma_ft.load_model(one, dtype=torch.float32), ids)
                             for one in (run, merged, gemma3_270m))  # fmt: skip
        stock = logits(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32), ids)
    assert relative(found, live) <= TOLERANCE
    assert relative(stock, live) <= TOLERANCE
    assert relative(base, live) > 1000 * TOLERANCE, "nothing was trained"


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).logits


def test_the_answers_are_those_of_the_live_adapter(run: Path, merged: Path) -> None:
    live, found = (answers(one) for one in (run, merged))
    assert found == live
    assert len(set(live)) > 1


def answers(place: Path) -> list[str]:
    """Greedy ones, by the engine."""
    session = open_session(place, dtype=torch.float32)
    asked = [session.chat_ids([Turn("user", question)]) for question in ASKED]
    return ["".join(session.stream(ids, max_new_tokens=ANSWER_TOKENS)) for ids in asked]
