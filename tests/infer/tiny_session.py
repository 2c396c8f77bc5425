"""Sessions that need no model, or the tiny one that ships, and an adapter on it that says something else."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model

from gemma_ft.build.located import Source
from gemma_ft.build.pretrained import load_model, load_tokenizer
from gemma_ft.data.conversation import Turn
from gemma_ft.data.encode.tokenizer_files import save_tokenizer
from gemma_ft.infer.sampling import Sampling
from gemma_ft.infer.session import Session, open_session

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "data" / "gemma-tiny"


@cache
def tiny_session() -> Session:
    """The tiny Gemma in float32, three answers at once."""
    return open_session(TINY, dtype=torch.float32, max_batch=3)


def save_loud_adapter(folder: Path) -> Path:
    """A LoRA adapter for the tiny Gemma, random and loud enough to change every answer."""
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(load_model(TINY, dtype=torch.float32), config).save_pretrained(str(folder))
    save_tokenizer(load_tokenizer(TINY), folder, system_policy="fold")
    return folder


class ScriptedSession:
    """Answers what it was told to, one piece after another; remembers what it was asked."""

    def __init__(self, *answers: Sequence[str], finish: Literal["stop", "length"] = "stop", max_seq_len: int = 100):
        self.answers = list(answers)
        self.finish = finish
        self.asked: list[list[Turn]] = []
        self.budgets: list[int] = []
        self.closed = 0
        self.name = "scripted"
        self.place = SimpleNamespace(adapter=None, contract=None, base=Source("scripted", None))
        self.encoder = SimpleNamespace(system_policy="fold")
        self.engine = SimpleNamespace(max_seq_len=max_seq_len)

    def chat_ids(self, turns: Sequence[Turn]) -> list[int]:
        """One id for each word."""
        self.asked.append(list(turns))
        return [1 for turn in turns for _ in turn.content.split()]

    def stream(
        self, prompt_ids: Sequence[int], *, max_new_tokens: int, sampling: Sampling, stop: Sequence[str] = ()
    ) -> Generator[str, None, Any]:
        """The next scripted answer."""
        self.budgets.append(max_new_tokens)
        try:
            yield from self.answers.pop(0)
            return self.finish
        finally:
            self.closed += 1
