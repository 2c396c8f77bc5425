"""The block `objective`: one shape for each kind, what a kind takes by default elsewhere, and what it cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemma_ft.recipe.load import dump_recipe, load_recipe, parse_recipe
from gemma_ft.recipe.objectives import KINDS, reference_kind, train_defaults
from gemma_ft.train.objectives.registry import build_objective, objective_names
from tests.recipe.conftest import Write, refusal

KNOWN = "sft, dpo, ipo, orpo, simpo, kto, reward"
OF_DPO = "dpo has dropout, judge, reference, beta, label_smoothing, length_normalized, sft_weight"
TEXT = """\
output_dir: runs/my
strategy: {strategy}
data: {{train: my.jsonl{data}}}
model: {{preset: gemma-2-2b}}
adapter: {{rank: 8{adapter}}}
objective: {objective}
train: {{max_steps: 3}}
"""


def text(objective: str, *, strategy: str = "lora", data: str = "", adapter: str = "") -> str:
    return TEXT.format(objective=objective, strategy=strategy, data=data, adapter=adapter)


def test_the_schema_and_the_registry_have_the_same_kinds() -> None:
    """And each kind's settings, without those of the run, are what its objective is built with."""
    assert sorted(KINDS) == objective_names()
    for kind, section in KINDS.items():
        settings = section(kind=kind).model_dump(exclude={"kind", "dropout", "judge", "reference"})  # type: ignore[arg-type]
        built = build_objective(kind, **settings)
        assert built.rows == section.rows
        assert built.needs_reference == section.needs_reference


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("{kind: dpo, gamma: 1}", f"objective.gamma: dpo has no such key (simpo has); {OF_DPO}"),
        ("{kind: dpo, bta: 1}", "objective.bta: unknown key; did you mean 'beta'?"),
        ("{kind: dpo, colour: 1}", f"objective.colour: unknown key; {OF_DPO}"),
        (
            "{kind: orpo, reference: start}",
            "objective.reference: orpo has no such key (dpo, ipo, kto have); orpo has dropout, judge, beta",
        ),
        (
            "{kind: sft, beta: 1}",
            "objective.beta: sft has no such key (dpo, ipo, orpo, simpo, kto have); sft has none",
        ),
        (
            "{kind: reward, judge: exact_match}",
            "objective.judge: reward has no such key (dpo, ipo, orpo, simpo, kto have); reward has dropout, centering",
        ),
        ("grpo", f"objective.kind: expected one of {KNOWN}, got 'grpo'"),
        ("{kind: 3}", f"objective.kind: expected one of {KNOWN}, got 3"),
        ("{beta: 1}", f"objective.kind: expected one of {KNOWN}, got nothing"),
        ("[dpo]", "objective: expected a block of keys, or its kind alone, got a list"),
        ("3", "objective: expected a block of keys, or its kind alone, got 3"),
        ("null", "objective: expected a block of keys, or its kind alone, got nothing"),
        ("{kind: dpo, beta: 0}", "objective.beta: must be more than 0, got 0"),
        ("{kind: dpo, beta: '0.1'}", "objective.beta: expected a number, got '0.1'"),
        ("{kind: dpo, label_smoothing: 0.5}", "objective.label_smoothing: must be less than 0.5, got 0.5"),
        (
            "{kind: ipo, reference: Adapter-Off}",
            "objective.reference: expected auto, adapter_off, start, precomputed or a folder, got 'Adapter-Off'",
        ),
    ],
)
def test_what_is_no_objective_is_refused_in_a_line(write: Write, objective: str, message: str) -> None:
    assert refusal(write(text(objective))) == [f"my.yaml:6: {message}"]


ONCE = (
    "are computed once before training, over rows that are all known; turn streaming off, or train an adapter and "
    "compare with adapter_off"
)
CUT = "takes the end of an answer away, and then it is not compared as it is; use drop, truncate_left or error"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (
            text("{kind: dpo, reference: adapter_off}", adapter=", start: runs/sft"),
            "6: objective.reference: adapter_off is the base, and training goes on from adapter.start; use start, or "
            "precomputed",
        ),
        (
            text("{kind: kto, reference: start}"),
            "6: objective.reference: start is the adapter that adapter.start names, and there is none; use adapter_off",
        ),
        (
            text("{kind: dpo, reference: start}", strategy="full"),
            "6: objective.reference: start: strategy full has no adapter; use precomputed",
        ),
        (
            text("{kind: ipo, reference: adapter_off}", strategy="full"),
            "6: objective.reference: adapter_off: strategy full has no adapter; use precomputed",
        ),
        (
            text("{kind: dpo, reference: precomputed}", data=", streaming: true"),
            f"6: objective.reference: data.streaming: log-probabilities of the reference (precomputed) {ONCE}",
        ),
        (
            text("{kind: dpo, reference: runs/other}", data=", streaming: true"),
            f"6: objective.reference: data.streaming: log-probabilities of the reference (runs/other) {ONCE}",
        ),
        (
            text("kto", strategy="full", data=", streaming: true"),
            f"6: objective.reference: data.streaming: log-probabilities of the reference (precomputed) {ONCE}",
        ),
        (text("reward", data=", too_long: truncate_right"), f"3: data.too_long: truncate_right {CUT}"),
        (text("simpo", data=", too_long: split"), f"3: data.too_long: split {CUT}"),
        (text("kto", data=", too_long: split"), f"3: data.too_long: split {CUT}"),
    ],
)
def test_what_an_objective_cannot_be_compared_with(write: Write, written: str, message: str) -> None:
    assert refusal(write(written)) == [f"my.yaml:{message}"]


@pytest.mark.parametrize(
    ("objective", "strategy", "start", "expected"),
    [
        ("sft", "lora", None, "none"),
        ("orpo", "lora", "runs/sft", "none"),
        ("reward", "full", None, "none"),
        ("dpo", "lora", None, "adapter_off"),
        ("dpo", "qlora", "runs/sft", "start"),
        ("dpo", "full", None, "precomputed"),
        ("{kind: dpo, reference: precomputed}", "lora", "runs/sft", "precomputed"),
        ("{kind: ipo, reference: runs/other}", "full", None, "runs/other"),
    ],
)
def test_whose_log_probabilities_are_compared_with(
    write: Write, objective: str, strategy: str, start: str | None, expected: str
) -> None:
    recipe = load_recipe(write(text(objective, strategy=strategy))).recipe
    assert reference_kind(recipe.objective, recipe.strategy, start) == expected


def test_streaming_goes_with_a_reference_that_is_alive_or_none(write: Write) -> None:
    for objective in ("dpo", "kto", "orpo", "{kind: dpo, reference: adapter_off}"):
        assert load_recipe(write(text(objective, data=", streaming: true"))).recipe.data.streaming


# What a kind takes elsewhere


@pytest.mark.parametrize(
    ("kind", "strategy", "rate"),
    [("dpo", "lora", 5e-6), ("dpo", "full", 5e-7), ("orpo", "qlora", 5e-5), ("reward", "lora", 1e-4)],
)
def test_defaults_of_a_kind_are_taken_and_told(write: Write, kind: str, strategy: str, rate: float) -> None:
    loaded = load_recipe(write(text(kind, strategy=strategy)))
    train = loaded.recipe.train
    assert (train.learning_rate, train.global_batch_size, train.warmup_ratio) == (rate, 64, 0.1)
    assert loaded.notes[0] == (
        f"objective {kind}: learning_rate {rate:g}, global_batch_size 64, warmup_ratio 0.1 (train has no other)"
    )
    assert parse_recipe(loaded.recipe.model_dump()) == loaded.recipe


def test_what_is_given_stays_as_it_is(write: Write) -> None:
    path = write(text("dpo").replace("max_steps: 3", "warmup_ratio: 0.0, global_batch_size: 8"))
    loaded = load_recipe(path, ["train.learning_rate=1e-5"])
    train = loaded.recipe.train
    assert (train.learning_rate, train.global_batch_size, train.warmup_ratio) == (1e-5, 8, 0.0)
    assert loaded.notes == ()


def test_sft_takes_nothing_and_says_nothing(write: Write) -> None:
    plain = write(text("sft").replace("objective: sft\n", ""), "plain.yaml")
    for path in (plain, write(text("sft"))):
        loaded = load_recipe(path)
        assert (loaded.recipe.train.learning_rate, loaded.recipe.train.global_batch_size) == (2e-4, 32)
        assert (loaded.notes, loaded.recipe.objective.kind) == ((), "sft")
    assert train_defaults("sft", "full") == {}


def test_dropout_is_switched_off_and_that_is_told(write: Write) -> None:
    loaded = load_recipe(write(text("simpo", adapter=", dropout: 0.1")))
    assert loaded.recipe.adapter is not None
    assert loaded.recipe.adapter.dropout == 0.0
    assert loaded.notes[1] == "adapter.dropout: off, as objective simpo asks; objective.dropout: true keeps it"
    kept = load_recipe(write(text("{kind: simpo, dropout: true}", adapter=", dropout: 0.1")))
    assert kept.recipe.adapter is not None
    assert kept.recipe.adapter.dropout == 0.1
    assert len(kept.notes) == 1
    of_sft = load_recipe(write(text("sft", adapter=", dropout: 0.1"))).recipe.adapter
    assert of_sft is not None
    assert of_sft.dropout == 0.1


# Switching the kind

DPO = "{kind: dpo, beta: 0.3, label_smoothing: 0.1, reference: adapter_off}"


@pytest.mark.parametrize("override", ["objective.kind=simpo", "objective=simpo", "objective={kind: simpo}"])
def test_another_kind_on_the_command_line_has_its_own_defaults(write: Write, override: str) -> None:
    """Its own beta, too: that of DPO is no SimPO's."""
    loaded = load_recipe(write(text(DPO)), [override])
    assert loaded.recipe.objective == KINDS["simpo"](kind="simpo")  # type: ignore[arg-type]
    assert loaded.recipe.train.learning_rate == 5e-6
    assert loaded.notes[0].startswith("objective simpo: learning_rate 5e-06, ")


@pytest.mark.parametrize(
    "overrides",
    [["objective.kind=simpo", "objective.beta=3"], ["objective.beta=3", "objective.kind=simpo"],
     ["objective={kind: simpo, beta: 3.0}"]],
)  # fmt: skip
def test_what_the_command_line_says_of_the_other_kind_counts_in_any_order(write: Write, overrides: list[str]) -> None:
    objective = load_recipe(write(text(DPO)), overrides).recipe.objective
    assert objective.model_dump() == {
        "kind": "simpo", "dropout": False, "judge": None, "beta": 3.0, "gamma": 1.0, "sft_weight": 0.0
    }  # fmt: skip


def test_the_same_kind_keeps_what_the_file_says(write: Write) -> None:
    for override in ("objective.kind=dpo", "objective=dpo", "objective.label_smoothing=0.1"):
        assert (
            load_recipe(write(text(DPO)), [override]).recipe.objective == load_recipe(write(text(DPO))).recipe.objective
        )
    assert load_recipe(write(text(DPO)), ["~objective"]).recipe.objective.kind == "sft"


def test_a_key_of_another_kind_on_the_command_line_is_refused(write: Write) -> None:
    assert refusal(write(text(DPO)), "objective.gamma=1.0") == [
        f"command line: objective.gamma: dpo has no such key (simpo has); {OF_DPO}"
    ]
    assert refusal(write(text(DPO)), "objective.colour=1.0") == [
        "command line: objective.colour: unknown key; known here: kind, dropout, judge, reference, beta, "
        "label_smoothing, length_normalized, sft_weight, gamma, desirable_weight, undesirable_weight, centering"
    ]


def test_a_kind_that_is_none_is_told_where_it_was_written(write: Write) -> None:
    assert refusal(write(text(DPO)), "objective.kind=dop") == [
        f"command line: objective.kind: expected one of {KNOWN}, got 'dop'"
    ]


def test_full_fine_tuning_that_names_an_adapter_to_begin_with_is_told_how(write: Write) -> None:
    loaded = load_recipe(write(text(DPO)), ["adapter.start=runs/sft", "strategy=full", "objective.reference=auto"])
    assert loaded.recipe.adapter is None
    assert (
        "adapter.start: ignored, strategy full trains all weights of the base as it is; to go on from runs/sft, merge "
        "it (gemma-ft merge) and set model.weights to the result"
    ) in loaded.notes


def test_a_kind_over_that_of_the_parent(write: Write) -> None:
    """`extends`: another kind begins anew, the same one is laid over key by key."""
    write(text(DPO), "parent.yaml")
    child = "extends: parent.yaml\nobjective: {}\n"
    other = load_recipe(write(child.format("{kind: ipo, beta: 0.2}"))).recipe.objective
    assert other.model_dump() == {
        "kind": "ipo", "dropout": False, "judge": None, "reference": "auto", "beta": 0.2, "sft_weight": 0.0
    }  # fmt: skip
    assert load_recipe(write(child.format("orpo"))).recipe.objective == KINDS["orpo"](kind="orpo")  # type: ignore[arg-type]
    same = load_recipe(write(child.format("{sft_weight: 0.5}"))).recipe.objective.model_dump()
    assert (same["kind"], same["beta"], same["sft_weight"], same["reference"]) == ("dpo", 0.3, 0.5, "adapter_off")
    grandchild = Path("last.yaml")
    write(child.format("{kind: simpo, gamma: 0.5}"), "child.yaml")
    grandchild.write_text("extends: child.yaml\nobjective: {kind: dpo}\n")
    assert load_recipe(grandchild).recipe.objective == KINDS["dpo"](kind="dpo")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_goes_to_yaml_and_back(write: Write, kind: str) -> None:
    recipe = load_recipe(write(text(kind))).recipe
    again = load_recipe(write(dump_recipe(recipe), "again.yaml"))
    assert (again.recipe, again.notes) == (recipe, ())
