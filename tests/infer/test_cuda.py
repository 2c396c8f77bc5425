"""The engine on a GPU: what it says on the CPU, batched as alone, with every way of storing weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gemma_ft.build.pretrained import load_model
from gemma_ft.infer.engine import Engine, Request
from gemma_ft.infer.generate import generate_answers
from gemma_ft.infer.sampling import Sampling
from gemma_ft.system import environment
from tests.infer.lively import lively
from tests.parity.amplified import SECOND, relative, token_rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
LENGTHS = (12, 3, 9, 7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Gemma 2 with a small window, amplified."""
    environment.quiet_libraries()
    target = tmp_path_factory.mktemp("cuda") / "model"
    lively(SECOND).save_pretrained(str(target))
    return target


def prompts() -> list[list[int]]:
    return [row[:length].tolist() for row, length in zip(token_rows(4, 12), LENGTHS, strict=True)]


@torch.no_grad()
def test_logits_are_the_cpus(folder: Path) -> None:
    ids = token_rows()
    here, there = (load_model(folder, dtype=torch.float32, device=device) for device in ("cpu", "cuda"))
    assert relative(there(ids.cuda()).logits.cpu(), here(ids).logits) <= 1e-4  # TF32 is off unless it is asked for


@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_answers_stop_and_are_within_their_limit(folder: Path, quantize: str | None) -> None:
    model = load_model(folder, quantize=quantize, device="cuda")
    assert model.get_input_embeddings().weight.device.type == "cuda"
    answers = generate_answers(model, prompts(), stop_ids=[], max_new_tokens=20, batch_size=3)
    assert [len(answer.ids) for answer in answers] == [20] * len(LENGTHS)


def test_batched_is_single_and_the_cpus(folder: Path) -> None:
    model, there = (load_model(folder, dtype=torch.float32, device=device) for device in ("cuda", "cpu"))
    asked = {"stop_ids": [1], "max_new_tokens": 20}
    single = generate_answers(model, prompts(), batch_size=1, **asked)
    assert generate_answers(model, prompts(), batch_size=4, **asked) == single
    assert generate_answers(there, prompts(), batch_size=4, **asked) == single


def test_a_seed_gives_its_text(folder: Path) -> None:
    model = load_model(folder, dtype=torch.float32, device="cuda")

    def drawn(seed: int) -> list[int | None]:
        engine = Engine(model, stop_ids=[])
        engine.submit(Request(prompts()[0], 12, Sampling(temperature=3.0, seed=seed)))
        found = []
        while engine.active or engine.waiting:
            found += [emitted.token_id for emitted in engine.step()]
        return found

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)
