"""Two ranks are one: losses, adapters, checkpoints, under DDP and FSDP2, in every strategy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors import safe_open

from tests.ranks.conftest import STRATEGIES, Train, lines

RELATIVE = 1e-6
FULL = "model/model.safetensors"
RESULT = {"full": FULL, "full, tokens": FULL}


def tensors(path: Path) -> dict[str, Any]:
    """As numpy, so that this process never makes a tensor."""
    with safe_open(str(path), framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)


def assert_near(one: Path, other: Path, within: float) -> None:
    """Each tensor as a whole: Adam divides by the gradient's own size, so that a single weight whose gradient is next
    to nothing goes where rounding sends it.
    """
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert numpy.linalg.norm(value - second[name]) <= within * numpy.linalg.norm(value) + 1e-12, name


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_are_one(train: Train, strategy: str, layout: str) -> None:
    """Losses and what is saved; and a checkpoint of each is gone on with on the other number of ranks."""
    overrides = STRATEGIES[strategy]
    one, two = train("one", *overrides), train("two", *overrides, ranks=2, layout=layout)
    for mine, theirs in zip(lines(one), lines(two), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=RELATIVE)
        # of equal weights at first, then of weights that are 1e-6 apart: in bf16 an activation is rounded the other way
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=RELATIVE if mine["step"] == 1 else 1e-4)
        assert (mine["step"], mine["tokens"], mine["learning_rate"]) == (
            theirs["step"], theirs["tokens"], theirs["learning_rate"]
        )  # fmt: skip
    for mine, theirs in zip(lines(one, "evals.jsonl"), lines(two, "evals.jsonl"), strict=True):
        assert mine["eval_loss"] == pytest.approx(theirs["eval_loss"], rel=1e-5)
        assert mine["canary_loss"] == pytest.approx(theirs["canary_loss"], rel=1e-5)
    assert lines(one, "samples.jsonl") == lines(two, "samples.jsonl")
    result = RESULT.get(strategy, "adapter/adapter_model.safetensors")
    assert_near(one / result, two / result, 2e-5)
    for run, ranks, step in ((one, 2, 3), (two, 1, 6)):
        expected = lines(run)
        cut_back(run, step)
        train(run.name, *overrides, "--resume", ranks=ranks, layout=layout)
        for mine, theirs in zip(expected, lines(run), strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=RELATIVE)


def cut_back(run: Path, step: int) -> None:
    """As if the run had been killed after the checkpoint of `step`."""
    import shutil

    for folder in (run / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    (run / "summary.json").unlink()
    for name in ("adapter", "model"):
        shutil.rmtree(run / name, ignore_errors=True)


@pytest.mark.parametrize("strategy", ["qlora", "full"])
def test_a_checkpoint_does_not_depend_on_the_number_of_ranks(train: Train, strategy: str) -> None:
    """Whole tensors, by the same names: not one rank's slices."""
    one, two = (train(f"run{n}", *STRATEGIES[strategy], ranks=n, layout="fsdp2") for n in (1, 2))
    folders = [run / "checkpoints" / "step-00000006" for run in (one, two)]
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert names[0] == names[1]
    assert not any(name.endswith((".pt", ".bin", ".pkl")) for name in names[0])
    for name in names[0]:
        if name.endswith(".safetensors"):
            shapes = [{key: value.shape for key, value in tensors(folder / name).items()} for folder in folders]
            assert shapes[0] == shapes[1]
    state = json.loads((folders[1] / "state.json").read_text())
    assert state["step"] == 6


def test_resumed_on_two_ranks_is_bit_identical(train: Train) -> None:
    whole = train("whole", *STRATEGIES["qlora"], ranks=2, layout="fsdp2")
    expected, result = lines(whole), (whole / "adapter" / "adapter_model.safetensors").read_bytes()
    cut_back(whole, 3)
    train("whole", *STRATEGIES["qlora"], "--resume", ranks=2, layout="fsdp2")
    for mine, theirs in zip(expected, lines(whole), strict=True):
        assert (mine["loss"], mine["grad_norm"]) == (theirs["loss"], theirs["grad_norm"])
    assert (whole / "adapter" / "adapter_model.safetensors").read_bytes() == result


def test_moments_in_8_bits_are_those_of_one_rank_and_resumed_to_the_byte(train: Train) -> None:
    """Ranks under DDP. Gradients are summed in another order, and a code may be the one beside it."""
    overrides = [*STRATEGIES["full"], "train.optimizer=adamw8bit"]
    one, two = train("one", *overrides), train("two", *overrides, ranks=2)
    for mine, theirs in zip(lines(one), lines(two), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert_near(one / FULL, two / FULL, 1e-4)
    last = two / "checkpoints" / "step-00000008"
    saved = {path.name: path.read_bytes() for path in last.glob("*.safetensors")}
    assert saved
    cut_back(two, 3)
    train("two", *overrides, "--resume", ranks=2)
    assert saved == {path.name: path.read_bytes() for path in last.glob("*.safetensors")}


def test_a_batch_that_cannot_be_dealt_is_refused(train: Train, tmp_path: Path) -> None:
    train("odd", "train.global_batch_size=7", "train.micro_batch_size=1", ranks=2, code=2)
    said = [(tmp_path / "odd-said" / f"rank{rank}.txt").read_text() for rank in (0, 1)]
    assert said[0].splitlines()[-1] == (
        "train.global_batch_size: 7 rows cannot be dealt to 2 devices; use 1 device, or global_batch_size 6 or 8"
    )
    assert said[1] == ""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["quantize=int8"], "quantize.kind: int8 weights cannot be sharded; use nf4, or --launch ddp"),
        (
            ["adapter.dora=true"],
            "adapter.dora: magnitudes are made of whole weights, which no rank has under FSDP; use --launch ddp",
        ),
        (
            ["train.optimizer=adamw8bit"],
            "train.optimizer: adamw8bit: its blocks of moments would depend on the number of ranks of FSDP2; use "
            "adamw, or --launch ddp",
        ),
    ],
)
def test_what_cannot_be_sharded_is_refused(train: Train, tmp_path: Path, overrides: list[str], message: str) -> None:
    train("no", *overrides, ranks=2, layout="fsdp2", code=2)
    assert (tmp_path / "no-said" / "rank0.txt").read_text().splitlines()[-1] == message
