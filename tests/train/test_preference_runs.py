"""Runs over pairs: they start at their reference to the bit, train one adapter and nothing else, and do not depend on
how a step is cut, on packing, on a kill or on an evaluation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from gemma_ft.model.gemma import GemmaForCausalLM
from gemma_ft.recipe.load import LoadedRecipe
from gemma_ft.train.trainer import GemmaTrainer
from tests.train.preference_runs import preference_recipe, write_pairs
from tests.train.test_resume import Killed, exact, kill_after

Train = Callable[..., list[dict[str, Any]]]
Prefer = Callable[..., LoadedRecipe]
ADAPTER = "adapter/adapter_model.safetensors"
AT_START = {"dpo": math.log(2), "ipo": 25.0, "kto": 0.5}  # 1 / (4 x 0.1^2)
STRATEGIES = {
    "lora": ["strategy=lora"],
    "lora, bf16": ["strategy=lora", "train.precision=bf16"],
    "nf4": ["quantize=nf4", "train.precision=bf16"],
    "int8": ["quantize=int8", "train.precision=bf16"],
    "dora": ["strategy=lora", "adapter.dora=true"],
}


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


@pytest.fixture
def prefer(small_gemma: Path, pairs: Path, tmp_path: Path) -> Prefer:
    def make(kind: str, *overrides: str, out: str = "run") -> LoadedRecipe:
        return preference_recipe(small_gemma, pairs, tmp_path / out, kind, *overrides)

    return make


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[GemmaTrainer]:
    """Those that the test's runs make, with the values of all weights at their start in `begun`, and the ids of each
    batch that they scored in eval mode in `in_eval_mode`.
    """
    found: list[GemmaTrainer] = []
    original = GemmaTrainer.__init__

    def kept(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.begun = {name: one.detach().clone() for name, one in self.model.named_parameters()}
        self.in_eval_mode = list[Any]()
        self.model.register_forward_pre_hook(lambda *given: kept_ids(self, *given), with_kwargs=True)
        found.append(self)

    def kept_ids(trainer: Any, model: Any, given: Any, named: dict[str, Any]) -> None:
        if not model.training and callable(named.get("loss_weights")):
            trainer.in_eval_mode.append(named["input_ids"].tolist())

    monkeypatch.setattr(GemmaTrainer, "__init__", kept)
    return found


def result(loaded: LoadedRecipe) -> bytes:
    return (Path(loaded.recipe.output_dir) / ADAPTER).read_bytes()


def bits(value: torch.Tensor) -> bytes:
    """Of 4-bit weights the floats that they are kept as may be NaN."""
    return value.detach().contiguous().view(torch.uint8).numpy().tobytes()


def assert_starts_at_zero(line: dict[str, Any], kind: str) -> None:
    assert line["loss"] == pytest.approx(AT_START[kind], rel=1e-12)
    names = ["rewards/chosen", "rewards/rejected", "kl"]
    names += ["rewards/margins", "rewards/margins_per_token"] if kind != "kto" else []
    assert {line[name] for name in names} - ({None} if kind == "kto" else set()) == {0.0}  # None: of no such answer
    assert line.get("rewards/accuracies", 0.5) == 0.5


# Where a run starts


@pytest.mark.parametrize(
    ("kind", "strategy"), [*(("dpo", strategy) for strategy in STRATEGIES), ("kto", "lora"), ("kto", "nf4")]
)
def test_a_run_starts_at_its_reference_to_the_bit(
    prefer: Prefer, train: Train, trainers: list[GemmaTrainer], kind: str, strategy: str
) -> None:
    """Then again from what it left: the frozen copy of the adapter is the reference, and nothing changes but LoRA's own
    weights.
    """
    first = prefer(kind, *STRATEGIES[strategy], "adapter.dropout=0.3", "train.max_steps=2", out="first")
    lines = train(first)
    assert_starts_at_zero(lines[0], kind)
    assert lines[1]["loss"] != lines[0]["loss"]
    left = Path(first.recipe.output_dir)
    on = prefer(kind, *STRATEGIES[strategy], f"adapter.start={left}", "~adapter.dora", "train.max_steps=2", out="on")
    more = train(on)
    assert_starts_at_zero(more[0], kind)
    assert more[1]["loss"] != more[0]["loss"]
    for number, trainer in enumerate(trainers):
        now = dict(trainer.model.named_parameters())
        changed = {name for name, value in trainer.begun.items() if bits(value) != bits(now[name])}  # type: ignore[attr-defined]
        assert changed
        assert [name for name in sorted(changed) if ".lora_" not in name or ".default" not in name] == []
        copies = [name for name in now if ".reference" in name]
        assert bool(copies) == bool(number)
        for name in copies:  # what the first run left, before and after
            assert torch.equal(now[name], trainer.begun[name.replace(".reference", ".default")])  # type: ignore[attr-defined]
    saved = Path(on.recipe.output_dir) / "adapter"
    assert not [path for path in saved.iterdir() if path.is_dir()]
    if strategy == "lora":
        base = GemmaForCausalLM.from_pretrained(on.recipe.model.weights)
        opened = PeftModel.from_pretrained(base, str(saved))
        trained = dict(trainers[1].model.named_parameters())
        for name, value in opened.named_parameters():
            if ".lora_" in name:
                assert torch.equal(value, trained[name]), name


def test_ipo_starts_at_its_reference(prefer: Prefer, train: Train) -> None:
    assert_starts_at_zero(train(prefer("ipo", "strategy=lora", "train.max_steps=1"))[0], "ipo")


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_full_tuning_starts_at_what_was_computed_before(prefer: Prefer, train: Train, kind: str) -> None:
    line = train(prefer(kind, "strategy=full", "train.max_steps=1"))[0]
    assert line["loss"] == pytest.approx(AT_START[kind], rel=1e-6)
    assert line["kl"] == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("kind", ["dpo", "kto"])
@pytest.mark.parametrize("packing", ["false", "true"])
def test_held_out_rows_start_at_what_was_computed_before_to_the_bit(
    prefer: Prefer, train: Train, tmp_path: Path, trainers: list[GemmaTrainer], kind: str, packing: str
) -> None:
    """They are computed before in the very batches of evaluation: no accuracy is the sign of a rounding."""
    held_out = write_pairs(tmp_path / "held_out.jsonl", 7)
    loaded = prefer(kind, "strategy=full", "train.max_steps=1", "train.micro_batch_size=4", "train.precision=bf16",
                    f"data.eval={held_out}", "eval.batch_size=3", f"data.packing={packing}")  # fmt: skip
    train(loaded)
    before = json.loads((Path(loaded.recipe.output_dir) / "summary.json").read_text())["eval_before"]
    assert before["loss"] == pytest.approx(AT_START[kind], rel=1e-12)
    assert {before["rewards/chosen"], before["rewards/rejected"], before["kl"]} == {0.0}
    assert before.get("rewards/accuracies", 0.5) == 0.5
    (trainer,) = trainers
    scored = trainer.in_eval_mode  # type: ignore[attr-defined]
    passes = {"dpo": 3, "kto": 2 * 5}[kind]  # of 7 pairs or 14 rows in threes; KTO's rows once more, mismatched
    computed, evaluated = scored[:passes], scored[passes : 2 * passes]
    assert sorted(computed) == sorted(evaluated)


# What a step does not depend on

CUTS = [["train.micro_batch_size=1"], ["train.micro_batch_size=4"], ["train.micro_batch_size=2", "data.packing=true"]]


@pytest.mark.parametrize(
    ("kind", "more"),
    [("dpo", ["objective.sft_weight=0.5"]), ("kto", []), ("orpo", []), ("ipo", ["objective.beta=0.5"])],
)
def test_a_step_does_not_depend_on_its_cut(prefer: Prefer, train: Train, kind: str, more: list[str]) -> None:
    """Micro-batches of one, of four and of two, the last of an epoch smaller; packed as well."""
    found = [
        train(prefer(kind, "strategy=lora", *more, *cut, "train.max_steps=4", out=f"run{number}"))
        for number, cut in enumerate(CUTS)
    ]
    assert found[0][3]["loss"] != found[0][0]["loss"]
    for other in found[1:]:
        for mine, theirs in zip(found[0], other, strict=True):
            assert mine["tokens"] == theirs["tokens"]
            for name in ("loss", "grad_norm", "entropy"):
                assert mine[name] == pytest.approx(theirs[name], rel=2e-5 if mine["step"] > 1 else 2e-6), name
        assert other[0]["loss"] == pytest.approx(found[0][0]["loss"], rel=1e-6)


def test_the_order_of_pairs_in_a_step_changes_nothing(
    small_gemma: Path, pairs: Path, tmp_path: Path, train: Train
) -> None:
    turned = tmp_path / "turned.jsonl"
    turned.write_text("\n".join(reversed(pairs.read_text().splitlines())) + "\n")
    words = ["strategy=lora", "train.max_steps=3", "train.global_batch_size=10", "train.micro_batch_size=5"]
    found = [
        train(preference_recipe(small_gemma, rows, tmp_path / rows.stem, "dpo", *words)) for rows in (pairs, turned)
    ]
    for mine, theirs in zip(*found, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert mine["rewards/margins"] == pytest.approx(theirs["rewards/margins"], abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "overrides", "from_adapter"),
    [
        ("dpo", ["strategy=lora", "train.precision=bf16"], False),
        ("kto", ["quantize=nf4", "train.precision=bf16"], True),
        pytest.param("dpo", ["strategy=lora", "train.precision=bf16"], True, marks=pytest.mark.slow),
        pytest.param("kto", ["quantize=nf4", "train.precision=bf16"], False, marks=pytest.mark.slow),
    ],
)
def test_resumed_equals_uninterrupted(
    prefer: Prefer, train: Train, monkeypatch: pytest.MonkeyPatch, kind: str, overrides: list[str], from_adapter: bool
) -> None:
    """Of ten pairs in steps of four (of twenty answers): a kill inside the second epoch. From an adapter, too."""
    shared = [*overrides, "train.max_steps=7", "checkpoint.every_steps=2", "train.schedule=cosine"]
    if from_adapter:
        started = prefer(kind, *overrides, "train.max_steps=1", out="started")
        train(started)
        shared.append(f"adapter.start={started.recipe.output_dir}")
    whole, broken = (prefer(kind, *shared, out=name) for name in ("whole", "broken"))
    expected = train(whole)
    kill_after(monkeypatch, 5)
    with pytest.raises(Killed):
        train(broken)
    assert train(broken, resume=True) == [
        {**line, "tokens_per_second": pytest.approx(line["tokens_per_second"], rel=1e9)} for line in expected
    ]
    assert exact(expected)[-1]["step"] == 7
    assert result(broken) == result(whole)


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_an_evaluation_on_the_way_changes_nothing(prefer: Prefer, train: Train, pairs: Path, kind: str) -> None:
    """And says the objective's figures: at step 0 those of a policy that is its reference."""
    shared = ["strategy=lora", "train.max_steps=3", "adapter.dropout=0.2", "objective.dropout=true"]
    plain = prefer(kind, *shared, out="plain")
    watched = prefer(kind, *shared, f"data.eval={pairs}", "eval.every_steps=1", "eval.max_rows=5", out="watched")
    assert exact(train(plain)) == exact(train(watched))
    assert result(plain) == result(watched)
    summary = json.loads((Path(watched.recipe.output_dir) / "summary.json").read_text())
    before = summary["eval_before"]
    assert before["loss"] == pytest.approx(AT_START[kind], rel=1e-6)
    assert before["loss"] != summary["eval_after"]["loss"]


def test_a_step_that_is_not_finite_is_left_out(
    prefer: Prefer, train: Train, monkeypatch: pytest.MonkeyPatch, trainers: list[GemmaTrainer]
) -> None:
    """One NaN among the log-probabilities of a reference costs its step, and no weight becomes NaN."""
    from gemma_ft.train import micro_batch

    calls: list[int] = []
    original = micro_batch.Reference.logprobs

    def spoiled(self: Any, model: Any, inputs: Any) -> Any:
        calls.append(1)
        found = original(self, model, inputs)
        return found * math.nan if len(calls) == 4 else found  # one of the proof, then two a step

    monkeypatch.setattr(micro_batch.Reference, "logprobs", spoiled)
    lines = train(prefer("dpo", "strategy=lora", "train.max_steps=3"))
    bad = [line["step"] for line in lines if not math.isfinite(line["loss"] or math.nan)]
    assert bad == [2]
    assert math.isfinite(lines[2]["loss"])
    assert all(torch.isfinite(one).all() for one in trainers[0].model.parameters())
