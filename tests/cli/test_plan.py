"""`gemma-ft plan`: tables that add up, exit codes, one line for every misuse."""

from __future__ import annotations

import pytest

from gemma_ft.cli.app import main
from gemma_ft.families.records import PUBLISHED
from gemma_ft.plan.gpus import GIB, GPUS, gpu_bytes, smallest_gpu

PRESETS = "gemma-2b, gemma-7b, gemma-2-2b, gemma-2-9b, gemma-2-27b, gemma-tiny"
RECIPES = "sft_2b, sft_7b, sft_gemma2_27b, sft_gemma2_2b, sft_gemma2_9b, sft_tiny, tiny_base"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["gemma-3"], f"gemma-3: no recipe and no preset; presets: {PRESETS}; recipes: {RECIPES}"),
        (["sft_2b", "--gpu", "24TB"], "--gpu: '24TB' is no size of a GPU; give it as 24GiB"),
        (["sft_2b", "--gpu", "4090"], "--gpu: '4090' is no size of a GPU; the RTX 4090 has 24GiB"),
        (["sft_2b", "--gpu", "rtx3060"], "--gpu: 'rtx3060' is no size of a GPU; the RTX 3060 has 12GiB"),
        (["sft_2b", "--gpu", "A100"], "--gpu: 'A100' is no size of a GPU; the A100 has 40GiB or 80GiB"),
        (["sft_2b", "--gpu", "24576"], "--gpu: '24576' is no size of a GPU; give it as 24GiB"),
        (["sft_2b", "--gpu", "0"], "--gpu: '0' is no size of a GPU; give it as 24GiB"),
        (["--gpu", "24"], "--gpu: name a recipe or a preset that is to fit"),
        (["gemma-2b", "strategy=lora"], "plan: settings and --launch belong to a recipe; name one"),
        (["sft_2b", "--nproc", "2"], "--nproc: says how many ranks --launch starts; add --launch NAME"),
        (["sft_2b", "--launch", "dpd"], "--launch: dpd: no such file, and no shipped config; did you mean ddp?"),
        (["sft_2b", "train.epoch=1"], "command line: train.epoch: unknown key; did you mean 'epochs'?"),
    ],
)
def test_misuse_is_one_line(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", line + "\n")


def test_a_size_is_in_gib_however_it_is_written() -> None:
    assert {gpu_bytes(text) for text in ("24", "24GiB", "24 GB", "24g", "24gib")} == {24 * GIB}
    assert [gpu_bytes(text) for text in ("141", "288", "512", "640GiB")] == [141 * GIB, 288 * GIB, 512 * GIB, 640 * GIB]
    assert [smallest_gpu(int(size * 0.9 * GIB)) for size in (8, 8.1, 141, 142)] == [8, 12, 141, None]


def test_without_a_name_all_published_sizes_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[0] == "GiB to answer"
    assert [line.split()[0] for line in lines[1:16:3]] == list(PUBLISHED)
    assert [line[15:19].strip() for line in lines[1:16]] == ["bf16", "int8", "nf4"] * 5
    assert [line.split()[0] for line in lines[18:28]] == [str(size) for size in GPUS]


def test_a_preset_is_planned_in_every_strategy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "gemma-2-9b", "--gpu", "24GiB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[6:10]] == ["full", "lora", "qlora, int8", "qlora, nf4"]
    assert "24.0 GiB GPU" in lines[5]
    assert "fits: " in lines[9]


def test_a_recipe_is_planned_by_phase_and_its_parts_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "sft_gemma2_9b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == ("gemma-2-9b, qlora over nf4, rank 16, bf16: 2 sequences of 2,048 tokens at a time on 1 device")
    names = [line.split()[0] for line in lines[3:9]]
    assert names == ["load", "quantize", "train", "evaluate", "generate", "merge"]
    for line in lines[3:9]:
        *parts, device, _ = [float(cell) for cell in line.split()[1:]]
        assert sum(parts) == pytest.approx(device, abs=0.05 * len(parts) + 0.05), line


@pytest.mark.parametrize(("size", "code"), [("4GiB", 2), ("80GiB", 0)])
def test_the_exit_code_says_whether_it_fits(size: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "sft_gemma2_2b", "--gpu", size]) == code
    last = capsys.readouterr().out.splitlines()[-1]
    fits = f"{size.removesuffix('GiB')}.0 GiB GPU: fits: "
    assert last.startswith(fits) == (code == 0)


def test_the_change_that_is_named_is_one_to_paste(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ["plan", "sft_gemma2_9b", "train.micro_batch_size=8"]
    assert main([*recipe, "--gpu", "12"]) == 2
    last = capsys.readouterr().out.splitlines()[-1]
    named = last.partition(": with ")[2].partition(": ")[0].split()
    assert named
    assert main([*recipe, *named, "--gpu", "12"]) == 0


def test_ranks_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "sft_gemma2_27b", "--launch", "fsdp2_qlora", "--nproc", "4"]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("at a time on 4 devices (fsdp2)")
