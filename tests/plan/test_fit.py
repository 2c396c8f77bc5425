"""Laws of a plan: more is never less, the fewest layers are the fewest, and a change that is said to fit does."""

from __future__ import annotations

import re
from typing import Any

import pytest

from gemma_ft.plan.fit import fitted, layers_to_checkpoint, peak, smallest_change
from gemma_ft.plan.gpus import GIB, smallest_gpu
from gemma_ft.plan.phases import disk, phases, train_phase
from gemma_ft.plan.run import Ranks, Run, attention_of, ranks_in, run_of
from gemma_ft.plan.shape import preset_shape
from gemma_ft.recipe.load import load_recipe
from gemma_ft.system.shipped import shipped_launches
from gemma_ft.system.units import byte_size

RECIPES = ["sft_2b", "sft_7b", "sft_gemma2_2b", "sft_gemma2_9b", "sft_gemma2_27b", "sft_tiny", "sft_gemma3_270m",
           "sft_gemma3_4b", "sft_gemma3_27b"]  # fmt: skip
STRATEGIES: list[dict[str, Any]] = [
    {"strategy": "full", "rank": 0},
    {"strategy": "lora"},
    {"strategy": "qlora", "quantize": "nf4"},
    {"strategy": "qlora", "quantize": "int8"},
]


def run(**fields: Any) -> Run:
    given = {"shape": preset_shape("gemma-2-2b"), "strategy": "lora", "micro_batch_size": 2, "tokens": 2048, **fields}
    return Run(**given)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda one: one.get("quantize", one["strategy"]))
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_more_of_anything_takes_no_less(strategy: dict[str, Any], device: str) -> None:
    attention = attention_of("auto", softcap=True, device=device)
    plain = run(**strategy, device=device, attention=attention)
    for name, more in (("micro_batch_size", 4), ("tokens", 4096), ("eval_rows", 16), ("new_tokens", 2048), ("rank", 64),
                       ("accumulation_steps", 4)):  # fmt: skip
        if name == "rank" and plain.full:
            continue
        larger = plain.changed(**{name: more})
        assert peak(larger) >= peak(plain), name
        assert train_phase(larger).total >= train_phase(plain).total, name
    totals = [train_phase(plain.changed(checkpointed=count)).total for count in range(plain.shape.layers + 1)]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] > totals[-1]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda one: one.get("quantize", one["strategy"]))
def test_slices_are_smaller_than_the_whole(strategy: dict[str, Any]) -> None:
    plain = run(**strategy)
    two, eight = (train_phase(plain.changed(ranks=Ranks(size, "fsdp2"))).total for size in (2, 8))
    offloaded = train_phase(plain.changed(ranks=Ranks(8, "fsdp2", offload=True)))
    assert offloaded.total < eight < two
    assert offloaded.host > train_phase(plain.changed(ranks=Ranks(8, "fsdp2"))).host
    assert train_phase(plain.changed(ranks=Ranks(2, "ddp"))).total >= train_phase(plain).total
    if plain.full:
        assert two < train_phase(plain).total


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda one: one.get("quantize", one["strategy"]))
def test_as_few_layers_are_checkpointed_as_memory_asks_for(strategy: dict[str, Any]) -> None:
    plain = run(**strategy)
    least = train_phase(plain.changed(checkpointed=plain.shape.layers)).total
    most = train_phase(plain).total
    assert layers_to_checkpoint(plain, most) == 0
    assert layers_to_checkpoint(plain, least - 1) == plain.shape.layers
    for room in range(least, most, (most - least) // 7):
        count = layers_to_checkpoint(plain, room)
        assert train_phase(plain.changed(checkpointed=count)).total <= room
        assert count == 0 or train_phase(plain.changed(checkpointed=count - 1)).total > room


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("more", [[], ["strategy=lora"], ["train.gradient_checkpointing=false"], ["quantize=int8"]],
                         ids=lambda more: " ".join(more) or "as it ships")  # fmt: skip
def test_the_smallest_change_fits_and_no_part_of_it_can_be_left_out(name: str, more: list[str]) -> None:
    def planned(overrides: list[str], room: int) -> int:
        recipe = load_recipe(name, overrides).recipe
        return peak(fitted(run_of(recipe), room, auto=recipe.train.gradient_checkpointing == "auto"))

    recipe = load_recipe(name, more).recipe
    changed = 0
    for gib in (1, 4, 5, 7, 9, 11, 15, 16, 17, 18, 19, 20, 36, 72):
        change = smallest_change(run_of(recipe), gib * GIB, auto=recipe.train.gradient_checkpointing == "auto")
        if change is None:
            continue
        overrides = list(change.overrides)
        changed += bool(overrides)
        assert planned([*more, *overrides], gib * GIB) == peak(change.run) <= gib * GIB
        for one in overrides:
            assert planned([*more, *(other for other in overrides if other != one)], gib * GIB) > gib * GIB
    assert changed or name in ("sft_tiny", "sft_gemma3_270m")  # which fit everywhere


def test_what_leaves_the_result_alone_comes_first() -> None:
    """A micro-batch and an evaluation are cut before a sequence is."""
    large = run(shape=preset_shape("gemma-2-9b"), micro_batch_size=4, eval_rows=8, strategy="qlora", quantize="nf4")
    change = smallest_change(large, int(10.9 * GIB), auto=True)
    assert change is not None
    assert [one.partition("=")[0] for one in change.overrides] == ["train.micro_batch_size", "eval.batch_size"]


def test_the_disk_holds_what_a_run_writes() -> None:
    recipe = load_recipe("sft_gemma2_2b").recipe
    found, plan = disk(run_of(recipe)), run_of(recipe)
    adapter = preset_shape("gemma-2-2b").adapter(16)
    assert found.checkpoints == (recipe.checkpoint.keep + 1) * 12 * adapter
    assert (found.result, found.merged, found.download) == (4 * adapter, found.download, 2 * plan.shape.parameters)
    full = disk(run_of(load_recipe("sft_gemma2_2b", ["strategy=full"]).recipe))
    assert (full.result, full.merged, full.checkpoints) == (found.download, 0, 3 * 12 * plan.shape.parameters)


def test_every_phase_is_planned_in_order() -> None:
    assert [phase.name for phase in phases(run(strategy="qlora", quantize="nf4"))] == [
        "load", "quantize", "train", "evaluate", "generate", "merge"]  # fmt: skip
    assert [phase.name for phase in phases(run(strategy="full", answers=False))] == ["load", "train", "evaluate"]


SAID = re.compile(r"^# Needs a GPU of (?P<one>\d+) GiB by `gemma-ft plan`(?:; (?P<ranks>\d+) of (?P<each>\d+) GiB with "
                  r"--launch fsdp2_qlora --nproc (?P=ranks))?\.$", re.MULTILINE)  # fmt: skip


@pytest.mark.parametrize("name", ["sft_gemma3_1b", "sft_gemma3_4b", "sft_gemma3_12b", "sft_gemma3_27b",
                                  "dpo_gemma2_2b", "orpo_2b", "reward_gemma2_2b"])  # fmt: skip
def test_a_recipe_says_what_it_needs(name: str) -> None:
    """The smallest GPU that it fits as it ships, alone and cut into slices."""
    loaded = load_recipe(name)
    said = SAID.search(loaded.path.read_text(encoding="utf-8"))
    assert said is not None
    launch = next(path for path in shipped_launches() if path.stem == "fsdp2_qlora")

    def needed(ranks: Ranks) -> int | None:
        run = run_of(loaded.recipe, ranks=ranks)
        return smallest_gpu(peak(run.changed(checkpointed=run.shape.layers)))

    assert needed(Ranks()) == int(said["one"])
    if said["ranks"]:
        assert needed(ranks_in(launch, int(said["ranks"]))) == int(said["each"]) < int(said["one"])


def test_the_recipe_of_a_laptop_for_pairs_says_what_it_needs() -> None:
    loaded = load_recipe("dpo_gemma3_270m")
    needed = byte_size(peak(run_of(loaded.recipe, device="cpu").changed(own_kernels=True, fused=True)), digits=".1f")
    said = f"# Needs {needed} of memory by `gemma-ft plan dpo_gemma3_270m --cpu 8GiB`."
    assert said in loaded.path.read_text(encoding="utf-8")


def test_the_recipe_of_a_laptop_says_what_it_needs() -> None:
    text = load_recipe("sft_gemma3_270m").path.read_text(encoding="utf-8")
    lora, full = (
        peak(run_of(load_recipe("sft_gemma3_270m", more).recipe, device="cpu").changed(own_kernels=True, fused=True))
        for more in ([], ["strategy=full"])
    )
    assert (
        f"# Needs {byte_size(lora, digits='.0f')} of memory by `gemma-ft plan sft_gemma3_270m --cpu 8GiB`; "
        f"strategy=full {byte_size(full, digits='.0f')}, " in text
    )
