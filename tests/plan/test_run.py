"""A recipe in numbers: attention as it is resolved, ranks as accelerate's configs have them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gemma_ft.errors import UserError
from gemma_ft.model.attention import resolve_attention
from gemma_ft.plan.run import Device, Ranks, attention_of, ranks_in, run_of
from gemma_ft.plan.shape import preset_shape
from gemma_ft.recipe.batch_plan import BatchPlan, batch_plan
from gemma_ft.recipe.load import load_recipe
from gemma_ft.system.shipped import shipped_launches, shipped_root


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("softcap", [None, 50.0])
@pytest.mark.parametrize("requested", ["auto", "blockwise", "eager", "sdpa"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_attention_is_what_the_resolver_chooses(
    requested: str, softcap: float | None, windows: bool, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if requested == "sdpa" and softcap:
        return  # refused
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    chosen = resolve_attention(requested, softcap, windows=windows).name
    blocks = {"cpu": "blocks", "cuda": "flex"}[device]
    here = {"blockwise": blocks, "eager": "scores", "sdpa": "sdpa"}[chosen]
    assert attention_of(requested, softcap=softcap is not None, windows=windows, device=device) == here


def test_every_shipped_launch_is_understood() -> None:
    found = {path.stem: ranks_in(path, None) for path in shipped_launches()}
    assert found == {
        "cpu_2ranks": Ranks(2, "fsdp2"),
        "ddp": Ranks(2, "ddp"),
        "fsdp2": Ranks(2, "fsdp2"),
        "fsdp2_offload": Ranks(2, "fsdp2", offload=True),
        "fsdp2_qlora": Ranks(2, "fsdp2"),
        "multi_node": Ranks(16, "fsdp2"),
        "one_device": Ranks(),
    }
    assert ranks_in(next(path for path in shipped_launches() if path.stem == "ddp"), 4) == Ranks(4, "ddp")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: [", "cannot be read as an accelerate config"),
        ("num_processes: many", "num_processes 'many' is no number of ranks"),
    ],
)
def test_another_file_is_refused(text: str, line: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as raised:
        ranks_in(path, None)
    assert str(raised.value) == f"{path}: {line}"


def test_ranks_share_the_rows_of_a_step() -> None:
    recipe = load_recipe("sft_2b", ["train.micro_batch_size=8"]).recipe
    assert (run_of(recipe).micro_batch_size, run_of(recipe).accumulation_steps) == (8, 4)
    shared = run_of(recipe, ranks=Ranks(8, "ddp"))
    assert (shared.micro_batch_size, shared.accumulation_steps) == (4, 1)


@pytest.mark.parametrize(
    ("rows", "micro", "ranks", "expected"),
    [(24, 8, 2, (6, 2)), (24, 8, 3, (8, 1)), (48, 16, 9, None), (32, 8, 3, None), (20, 10, 4, (5, 1))],
)  # fmt: skip
def test_rows_are_cut_as_training_cuts_them(
    rows: int, micro: int, ranks: int, expected: tuple[int, int] | None
) -> None:
    given = [f"train.global_batch_size={rows}", f"train.micro_batch_size={micro}"]
    recipe = load_recipe("sft_2b", given).recipe
    if expected is None:
        for refused in (lambda: run_of(recipe, ranks=Ranks(ranks, "ddp")), lambda: batch_plan(recipe, ranks)):
            with pytest.raises(UserError, match=f"{rows} rows cannot be dealt to {ranks} devices; use "):
                refused()
        return
    planned = run_of(recipe, ranks=Ranks(ranks, "ddp"))
    assert (planned.micro_batch_size, planned.accumulation_steps) == expected
    assert batch_plan(recipe, ranks) == BatchPlan(rows, *expected, ranks)
    known_better = run_of(recipe, batch=BatchPlan(rows, 1, rows // ranks, ranks), ranks=Ranks(ranks, "ddp"))
    assert (known_better.micro_batch_size, known_better.accumulation_steps) == (1, rows // ranks)


def test_the_vocabulary_is_that_of_the_weights() -> None:
    recipe = load_recipe("sft_tiny").recipe
    config = json.loads((shipped_root() / "data/gemma-tiny/config.json").read_text(encoding="utf-8"))
    assert run_of(recipe).shape.vocabulary == config["vocab_size"] != preset_shape("gemma-tiny").vocabulary


def test_a_gpu_is_given_whole_blocks_of_tokens() -> None:
    recipe = load_recipe("sft_2b", ["data.max_seq_len=1000"]).recipe
    assert run_of(recipe).tokens == 1024
    assert run_of(recipe, device="cpu").tokens == 1000
    assert run_of(recipe, tokens=65).tokens == 128
    unpacked = load_recipe("sft_2b", ["data.packing=false"]).recipe
    assert run_of(unpacked, tokens=60).tokens == 64


def test_rows_of_pairs_have_two_answers() -> None:
    """Of labelled rows one; a chat is one sequence, as ever."""
    pairs = run_of(load_recipe("dpo_gemma2_2b", ["train.micro_batch_size=4"]).recipe)
    assert (pairs.micro_batch_size, pairs.sequences, pairs.eval_sequences) == (4, 8, 8)
    labelled = run_of(load_recipe("dpo_gemma2_2b", ["objective.kind=kto", "train.micro_batch_size=4"]).recipe)
    assert (labelled.sequences, labelled.eval_sequences) == (4, 4)
    assert run_of(load_recipe("sft_2b", ["train.micro_batch_size=4"]).recipe).sequences == 4


@pytest.mark.parametrize(
    ("recipe", "given", "kind"),
    [
        ("dpo_gemma2_2b", [], "adapter_off"),
        ("dpo_gemma2_2b", ["adapter.start=runs/mine"], "start"),
        ("dpo_gemma2_2b", ["strategy=full"], "precomputed"),
        ("dpo_gemma2_2b", ["objective.reference=precomputed"], "precomputed"),
        ("dpo_gemma2_2b", ["objective.reference=runs/mine"], "runs/mine"),
        ("orpo_2b", [], "none"),
        ("sft_2b", [], "none"),
    ],
)
def test_what_answers_are_compared_with_is_known(recipe: str, given: list[str], kind: str) -> None:
    assert run_of(load_recipe(recipe, given).recipe).reference == kind
