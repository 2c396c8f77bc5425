"""benchmarks/gpu.py works before it meets a GPU: every kind of part runs with tiny shapes on the CPU."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_models
from benchmarks.gpu_kernels import FLEX
from benchmarks.gpu_setup import MODELS, Setup
from benchmarks.gpu_train import ARMS, Spec, one_arm
from gemma_ft.system import environment

DRY = Setup(dry=True)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    environment.quiet_libraries()


def measured(name: str) -> dict[str, Any]:
    found = gpu.parts()[name][0](DRY)
    json.dumps(found)  # it is to be written
    return found


def test_without_cuda_it_says_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["gemm"]) == 2
    assert capsys.readouterr().err == (
        "benchmarks.gpu: there is no CUDA device here; --dry-run tries the code on the CPU\n"
    )


def test_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--dry-run", "gemm"]) == 0
    assert capsys.readouterr().out.startswith("gemm: ")
    for line in measured("attention").values():
        assert line["blockwise"]["from_eager"] < 0.01
        assert all(line[name].keys() == {"skipped"} for name in FLEX), "a CPU has no backward of it"
        assert "soft-cap" in line["sdpa"]["skipped"]
    for line in measured("head").values():
        losses = [arm["loss"] for arm in line.values()]
        assert max(losses) - min(losses) < 0.01 * max(losses)


@pytest.mark.parametrize("line", ["gemma-2-2b:lora:2048:packed", "gemma-2b:qlora:512:natural"])
def test_training_steps(line: str) -> None:
    arms = measured(f"train:{line}")["arms"]
    assert arms.keys() == ARMS.keys()
    ran = {name: arm for name, arm in arms.items() if "skipped" not in arm}
    assert ran.keys() >= {"ours", "ours_checkpointed", "stock", "stock_best"}
    for arm in ran.values():
        assert arm["tokens_per_second"] > 0
        assert len(arm["profile"]["slowest"]) == 10
        for loss, ours in zip(arm["losses"], ran["ours"]["losses"], strict=True):
            assert abs(loss - ours) < 2e-3 * ours


def test_the_longest_row() -> None:
    found = measured("longest:gemma-2-2b:qlora:24")
    assert found["ours_checkpointed"] == found["stock"] == {"tokens": 64, "tried_up_to": 64}


@pytest.mark.parametrize("line", ["gemma-2-2b:bf16", "gemma-2b:nf4"])
def test_decoding(line: str) -> None:
    arms = measured(f"decode:{line}")["arms"]
    assert arms["stock"]["tokens_per_second"] > 0
    assert arms["ours"]["tokens_equal_to_ours"] == 4


def test_a_peer_that_is_not_there_is_skipped() -> None:
    spec = Spec("liger", MODELS[1], False, 32, True, 1, 1, None, True)
    found = one_arm(spec)
    assert found == {"skipped": "liger_kernel is not importable here"} or found["losses"]


def test_parts_have_names_and_files() -> None:
    names = list(gpu.parts())
    assert len({gpu.file_of(name) for name in names}) == len(names) == 3 + 48 + 6 + 2
    assert gpu.chosen(["longest"], DRY) == ["longest:gemma-2-2b:qlora:24", "longest:gemma-2-2b:qlora:48"]
    assert gpu.chosen([], DRY) == list(gpu.DRY)
    assert {name.split(":")[0] for name in gpu.DRY} == {name.split(":")[0] for name in names}
    with pytest.raises(SystemExit, match="no such part"):
        gpu.chosen(["trian"], DRY)


def test_weights_are_drawn_by_name() -> None:
    config = gpu_models.config_of("gemma-2-2b", dry=True)
    options = {"device": torch.device("cpu"), "attention": None, "quantize": False}
    one, other = (gpu_models.base(config, native=native, **options) for native in (True, False))
    theirs = dict(other.named_parameters())
    for name, weight in one.named_parameters():
        assert torch.equal(weight, theirs[name]), name
