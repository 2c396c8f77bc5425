"""A recorded step says what a step made operation by operation says: wherever the rows stand, whoever joins or leaves,
as rings fill, wrap and grow. Recorded on a GPU as a CUDA graph, elsewhere by what stands in for one.
"""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemma_ft.adapters.lora import add_adapter
from gemma_ft.infer import decode_step, engine
from gemma_ft.infer.engine import Engine, Request
from gemma_ft.infer.sampling import Sampling
from gemma_ft.kernels.triton.cuda_graph import Recorder
from gemma_ft.model import kv_cache
from tests.infer.lively import lively
from tests.infer.recording import Emulated
from tests.parity.amplified import FIRST, SECOND, token_rows

OPTIONS = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": "all-linear", "rslora": False, "dora": False}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def adapted(shape: str) -> Any:
    """With LoRA on all linear layers, of which none is zero."""
    torch.manual_seed(0)  # of lora_A
    model = add_adapter(lively(shape), **OPTIONS, init="default", base="x/y", revision=None)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 1.0, generator=torch.Generator().manual_seed(len(name)))
    return model.eval().to(DEVICE)


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the engine records with; rings begin so small that they grow."""
    monkeypatch.setattr(kv_cache, "FIRST_PLACES", 8)
    made = Recorder(DEVICE) if DEVICE.type == "cuda" else Emulated()
    monkeypatch.setattr(engine, "recorder", lambda *_, **__: made)
    monkeypatch.setattr(decode_step, "PATIENCE", 1)
    return made


def said(model: Any, requests: list[Request], *, rows: int, plain: bool, log: list[Any] | None = None) -> list[Any]:
    """All tokens of all requests, those of the later ones submitted while others speak."""
    speaking = Engine(model, stop_ids=[], max_batch=rows)
    if plain:
        speaking._decode_step._record = None
    waiting, found = list(requests), {}
    while waiting or speaking.waiting or speaking.active:
        if waiting:
            found[speaking.submit(waiting.pop(0))] = []
        for emitted in speaking.step():
            found[emitted.ticket].append(emitted.token_id)
    if log is not None:
        log.append(speaking.unrecorded)
    return list(found.values())


def asked(count: int, new: tuple[int, ...] = (24, 6, 12, 3, 14)) -> list[Request]:
    ids = token_rows(count, 7)
    return [Request(ids[row, : 3 + row % 4].tolist(), new[row % len(new)]) for row in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [FIRST, SECOND])
def test_recorded_is_step_by_step(shape: str, dtype: torch.dtype, record: Any) -> None:
    model = lively(shape, dtype=dtype).eval().to(DEVICE)
    expected = said(model, asked(5), rows=3, plain=True)
    log: list[Any] = []
    found = said(model, asked(5), rows=3, plain=False, log=log)
    assert log == [None]
    if dtype == torch.float32:
        assert found == expected
    else:  # what is hidden is added as well, in another order
        pairs = [pair for rows in zip(found, expected, strict=True) for pair in zip(*rows, strict=True)]
        assert sum(one == other for one, other in pairs) > 0.5 * len(pairs)
    if isinstance(record, Emulated):
        assert record.recorded >= 4
        assert record.repeated > 15


def test_draws_and_an_adapter_are_the_same(record: Any) -> None:
    model = adapted(SECOND)
    sampling = Sampling(temperature=0.8, top_k=20, repetition_penalty=1.3, seed=5)
    requests = [Request(one.prompt_ids, one.max_new_tokens, sampling) for one in asked(3)]
    assert said(model, requests, rows=2, plain=False) == said(model, requests, rows=2, plain=True)


def test_an_adapter_that_is_switched_off_is_another_recording(record: Any) -> None:
    model = adapted(SECOND)

    def answer(*, plain: bool, off: range) -> list[int | None]:
        speaking = Engine(model, stop_ids=[], max_batch=1)
        if plain:
            speaking._decode_step._record = None
        speaking.submit(asked(1)[0])
        found: list[int | None] = []
        while speaking.waiting or speaking.active:
            with model.disable_adapter() if len(found) in off else nullcontext():
                found += [emitted.token_id for emitted in speaking.step()]
        return found

    recorded, expected, never = (
        answer(plain=plain, off=off) for plain, off in ((False, range(12, 18)), (True, range(12, 18)), (True, range(0)))
    )
    assert recorded == expected
    assert expected != never


def test_what_cannot_be_recorded_is_made_step_by_step_and_says_why(
    record: Any, caplog: pytest.LogCaptureFixture
) -> None:
    decode_step._tell.cache_clear()
    model = lively(SECOND).eval().to(DEVICE)
    norm = model.model.norm
    norm.register_forward_hook(lambda _module, _args, out: out + 0.0 * float(out.sum()))
    log: list[Any] = []
    found = said(model, asked(2), rows=2, plain=False, log=log)
    assert log[0] == "called a synchronizing CUDA operation"
    assert "operation by operation, which is slower: called a" in caplog.text
    assert found == said(model, asked(2), rows=2, plain=True)


def test_a_cpu_and_several_processes_record_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda, model = torch.device("cpu"), torch.device("cuda"), SimpleNamespace()
    assert decode_step.recorder(model, cpu, alone=True) is None
    assert decode_step.recorder(model, cuda, alone=False) is None
    assert decode_step.recorder(SimpleNamespace(is_loaded_in_8bit=True), cuda, alone=True) is None
    assert isinstance(decode_step.recorder(model, cuda, alone=True), Recorder)
    monkeypatch.setenv("GEMMA_FT_KERNELS", "off")
    assert decode_step.recorder(model, cuda, alone=True) is None


def test_recordings_are_few(record: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that were made at most two are held; each holds memory."""
    monkeypatch.setattr(decode_step, "MOST", 2)
    monkeypatch.setattr(kv_cache, "FIRST_PLACES", 64)  # rings do not grow, so that no recording goes with them
    held: weakref.WeakSet[Any] = weakref.WeakSet()
    made = 0

    def counted(run: Any) -> Any:
        nonlocal made
        made += 1
        repeat, logits = record(run)

        def again() -> None:
            repeat()

        held.add(again)
        return again, logits

    monkeypatch.setattr(engine, "recorder", lambda *_, **__: counted)
    model = lively(SECOND).eval().to(DEVICE)
    speaking = Engine(model, stop_ids=[], max_batch=4)
    for one in asked(4, (20, 16, 12, 8)):
        speaking.submit(one)
    while speaking.waiting or speaking.active:
        speaking.step()
        if len(held) > 2:
            gc.collect()  # what only a circle still holds
        assert len(held) <= 2
    assert made == 4
    assert speaking.unrecorded is None
