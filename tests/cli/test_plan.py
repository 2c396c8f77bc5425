"""`gemma-ft plan`: tables that add up, exit codes, one line for every misuse."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from gemma_ft.cli.app import main
from gemma_ft.families.records import PUBLISHED
from gemma_ft.plan.gpus import GIB, GPUS, gpu_bytes, smallest_gpu

PRESETS = (
    "gemma-2b, gemma-7b, gemma-2-2b, gemma-2-9b, gemma-2-27b, gemma-tiny, gemma-3-270m, gemma-3-1b, gemma-3-4b, "
    "gemma-3-12b, gemma-3-27b, vaultgemma-1b"
)
RECIPES = (
    "dpo_gemma2_2b, dpo_gemma3_270m, dpo_tiny, orpo_2b, reward_gemma2_2b, reward_tiny, "
    "sft_2b, sft_7b, sft_gemma2_27b, sft_gemma2_2b, sft_gemma2_9b, sft_gemma3_12b, sft_gemma3_1b, sft_gemma3_270m, "
    "sft_gemma3_27b, sft_gemma3_4b, sft_tiny, tiny_base"
)


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
        (["sft_2b", "--cpu", "4090"], "--cpu: '4090' is no size of memory; give it as 8GiB"),
        (["sft_2b", "--cpu", "8", "--gpu", "8"], "--cpu: plans a machine without a GPU; leave --gpu and --launch out"),
        (["gemma-2b", "--cpu", "8"], "--cpu: name a recipe that is to fit"),
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
    table, rest = lines[1 : 1 + 3 * len(PUBLISHED)], lines[3 + 3 * len(PUBLISHED) :]
    assert [line.split()[0] for line in table[::3]] == list(PUBLISHED)
    assert [line[15:19].strip() for line in table] == ["bf16", "int8", "nf4"] * len(PUBLISHED)
    assert [line.split()[0] for line in rest[: len(GPUS)]] == [str(size) for size in GPUS]
    assert rest[len(GPUS) + 1] == (
        "Of gemma-3-4b, gemma-3-12b, gemma-3-27b the text model is counted: what lies beside it is never read."
    )


def test_what_a_model_cannot_reach_is_not_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "vaultgemma-1b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["vaultgemma-1b", "bf16", "1.9", "2.9", "8", "GiB"]
    assert "(one sequence of 1,024 tokens at a time; LoRA of rank 16 on all linear layers)" in lines


NEW = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
       "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0}}  # fmt: skip
SPELLINGS = {"old": {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "new": {"rope_parameters": NEW}}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_folder_with_a_vision_tower_is_planned_as_its_text_model(
    spelling: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
            "sliding_window": 1024, **SPELLINGS[spelling]}  # fmt: skip
    folder = tmp_path / "gemma-3-4b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text, "vision_config": {}}))
    assert main(["plan", "gemma-3-4b"]) == 0
    of_preset = capsys.readouterr().out.splitlines()
    assert main(["plan", str(folder)]) == 0
    of_folder = capsys.readouterr().out.splitlines()
    assert "Of gemma-3-4b the text model alone is read: what lies beside it, 0.8 GiB, stays on the disk." in of_preset
    assert "Of gemma-3-4b the text model alone is read: what lies beside it stays on the disk." in of_folder
    assert "layers: 29 of 34 see 1,024 tokens, 5 see all" in of_folder
    assert main(["plan", str(folder / "config.json")]) == 0
    assert capsys.readouterr().out.splitlines() == of_folder
    assert len(of_preset) == len(of_folder)
    assert sum(one != other for one, other in zip(of_preset, of_folder, strict=True)) == 1
    assert main(["plan", "sft_gemma3_4b", f"model.weights={folder}"]) == 0
    assert "Of gemma-3-4b the text model alone is read" in capsys.readouterr().out


@pytest.mark.parametrize(("more", "code"), [([], 0), (["strategy=full"], 2)], ids=["lora", "full"])
def test_a_laptop_of_8_gib_trains_the_270m_with_adapters_and_not_in_full(
    more: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "sft_gemma3_270m", *more, "--cpu", "8GiB"]) == code
    lines = capsys.readouterr().out.splitlines()
    assert "layers: 15 of 18 see 512 tokens, 3 see all" in lines
    assert lines[bool(more)].endswith("1 sequence of 1,024 tokens at a time on the CPU")
    fits = r"fits: (1\.9|2\.0) GiB, no layer recomputes its activations"
    verdict = "not with any setting; strategy=lora, or more memory" if code else fits
    assert re.fullmatch(rf"8\.0 GiB of memory, 30% of it left to the system: {verdict}", lines[-1])


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


@pytest.mark.parametrize(
    ("recipe", "more", "rows"),
    [
        ("dpo_gemma2_2b", ["train.micro_batch_size=4", "data.max_seq_len=512"],
         "gemma-2-2b, qlora over nf4, rank 16, bf16, dpo: 4 pairs (8 answers of 512 tokens) at a time on 1 device"),
        ("dpo_gemma3_270m", [],
         "gemma-3-270m, lora, rank 16, bf16, dpo: 1 pair (2 answers of 1,024 tokens) at a time on 1 device"),
        ("dpo_gemma2_2b", ["objective.kind=kto"],
         "gemma-2-2b, qlora over nf4, rank 16, bf16, kto: 2 answers of 2,048 tokens at a time on 1 device"),
        ("reward_gemma2_2b", [],
         "gemma-2-2b, qlora over nf4, rank 16, bf16, reward: "
         "2 pairs (4 answers of 2,048 tokens) at a time on 1 device"),
    ],
)  # fmt: skip
def test_pairs_are_counted_with_their_answers(
    recipe: str, more: list[str], rows: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", recipe, *more]) == 0
    assert rows in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([], "the model without its adapter: no second model in memory"),
        (["adapter.start=runs/mine"], "a frozen copy of adapter.start: no second model in memory"),
        (["strategy=full"], "log-probabilities of the model as it begins, computed once before training"),
        (["objective.reference=runs/mine"],
         "log-probabilities of runs/mine, computed once before training, and taken to be of the same size"),
    ],
)  # fmt: skip
def test_what_answers_are_compared_with_is_said(
    given: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "dpo_gemma2_2b", *given]) == 0
    assert f"reference: {told}" in capsys.readouterr().out.splitlines()


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
