"""The trainer is TRL's, and what it must not do to us is undone."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer
from trl import SFTTrainer

from gemma_ft.build.data import build_data
from gemma_ft.build.inputs import build_tokenizer
from gemma_ft.build.model import build_model
from gemma_ft.data.pack.collate import Collator
from gemma_ft.recipe.batch_plan import batch_plan
from gemma_ft.recipe.load import LoadedRecipe
from gemma_ft.train import step as page
from gemma_ft.train.distributed import World
from gemma_ft.train.lr_schedule import learning_rate_factor
from gemma_ft.train.objectives.registry import build_objective
from gemma_ft.train.progress import Listener, Progress
from gemma_ft.train.reference import Reference
from gemma_ft.train.sampler import TrainingData
from gemma_ft.train.settings import TrainerOptions, training_arguments
from gemma_ft.train.signals import StopRequest
from gemma_ft.train.step import forward_backward
from gemma_ft.train.trainer import GemmaTrainer

RecipeFor = Callable[..., LoadedRecipe]
Train = Callable[..., list[dict[str, Any]]]


def make_trainer(loaded: LoadedRecipe, model: Any = None, **changes: Any) -> GemmaTrainer:
    """A trainer as run.py makes it; `changes` replace single arguments."""
    recipe = loaded.recipe
    tokenizer = build_tokenizer(recipe)
    data = build_data(recipe, tokenizer)
    if model is None:
        model, _ = build_model(recipe, tokenizer)
    arguments: dict[str, Any] = {
        "world": World(),
        "stop": StopRequest(),
        "source": None,
        "data": TrainingData(data.train.examples, None, Collator(data.encoder.control.pad)),
        "batch": batch_plan(recipe, 1),
        "objective": build_objective("sft"),
        "reference": Reference(),
        "options": TrainerOptions(keep_checkpoints=2),
        "tokenizer": tokenizer,
        "progress": Progress(),
    }
    out = Path(recipe.output_dir) / "checkpoints"
    settings = training_arguments(recipe, out, 4, arguments["batch"], World(), evaluates=False)
    return GemmaTrainer(model, settings, **{**arguments, **changes})


def test_it_is_sfttrainer_and_its_train_is_what_runs(
    recipe_for: RecipeFor, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert issubclass(GemmaTrainer, SFTTrainer)
    assert GemmaTrainer.train is SFTTrainer.train is Trainer.train
    for name in ("_inner_training_loop", "_run_epoch", "get_batch_samples"):
        assert getattr(GemmaTrainer, name) is getattr(Trainer, name)
    steps: list[int] = []
    original = Trainer.get_batch_samples

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append(0)
        return original(self, *args, **kwargs)

    def micro_batch(*args: Any) -> Any:
        steps[-1] += 1
        return forward_backward(*args)

    monkeypatch.setattr(Trainer, "get_batch_samples", counted)
    monkeypatch.setattr(page, "forward_backward", micro_batch)
    assert len(train(recipe_for("strategy=lora"))) == 4
    assert steps == [2, 2, 1, 2]  # 10 rows in micro-batches of 2: steps of 4, 4 and 2 rows, then 4 again


def test_no_pickle_is_ever_written(
    recipe_for: RecipeFor, train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("torch.save was called")

    monkeypatch.setattr(torch, "save", refused)
    train(recipe_for("checkpoint.every_steps=2"), page=True)
    train(recipe_for("strategy=full", out="full"))
    written = {path.suffix for path in tmp_path.rglob("*") if path.is_file() and "console" not in path.name}
    assert written == {"", ".safetensors", ".json", ".jsonl", ".yaml", ".jinja", ".model", ".html"}


def test_telemetry_is_never_sent(recipe_for: RecipeFor, monkeypatch: pytest.MonkeyPatch) -> None:
    import trl.trainer.base_trainer as base

    for name in ("CI", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.delenv(name, raising=False)
    sent: list[Any] = []
    monkeypatch.setattr(base, "send_telemetry", lambda *args, **kwargs: sent.append(kwargs))
    make_trainer(recipe_for("strategy=lora"))
    assert sent == []


@pytest.mark.parametrize("overrides", [["quantize=nf4"], ["quantize=nf4", "adapter.dora=true", "train.precision=bf16"]])
def test_trainables_keep_their_float32_values(recipe_for: RecipeFor, overrides: list[str]) -> None:
    loaded = recipe_for(*overrides)
    model, _ = build_model(loaded.recipe, build_tokenizer(loaded.recipe))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = make_trainer(loaded, model)
    after = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert before.keys() == after.keys()
    for name, parameter in after.items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name]), name


def test_our_forward_is_the_one_that_runs(recipe_for: RecipeFor) -> None:
    trainer = make_trainer(recipe_for("strategy=lora"))
    base = trainer.model.get_base_model()
    assert inspect.getmodule(base.forward.__func__.__wrapped__).__name__ == "gemma_ft.model.gemma"
    assert "forward" not in vars(base)


def test_position_and_document_ids_reach_the_model(recipe_for: RecipeFor) -> None:
    trainer = make_trainer(recipe_for("strategy=lora", "data.packing=true"))
    seen: list[set[str]] = []
    trainer.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    trainer.train()
    assert all(
        {"position_ids", "document_ids", "attention_mask", "labels", "num_items_in_batch"} <= names for names in seen
    )
    assert seen


def trained_in_float64(loaded: LoadedRecipe) -> tuple[list[float], torch.Tensor]:
    """(losses of the steps, all trained weights afterwards)"""
    model, _ = build_model(loaded.recipe, build_tokenizer(loaded.recipe))
    model.to(torch.float64)
    losses: list[float] = []
    make_trainer(loaded, model, listener=Listener(lambda figures: losses.append(figures["loss"]))).train()
    weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    assert weights.dtype == torch.float64
    return losses, weights


def test_fault_27_the_loss_does_not_depend_on_the_cut(recipe_for: RecipeFor) -> None:
    """Every cut of a step of 4 rows into micro-batches gives the same losses and weights, in float64; also in the last,
    partial step of an epoch (10 rows)."""
    results = []
    for micro in (1, 2, 4):
        loaded = recipe_for("strategy=lora", f"train.micro_batch_size={micro}", "train.precision=float32", "seed=3")
        results.append(trained_in_float64(loaded))
    for losses, weights in results[1:]:
        assert losses == pytest.approx(results[0][0], rel=1e-10, abs=0)
        assert (weights - results[0][1]).abs().max() <= 1e-10 * results[0][1].abs().max()


def test_a_row_of_weight_2_is_the_row_twice_in_any_cut(recipe_for: RecipeFor, tmp_path: Path) -> None:
    """Steps of whole epochs over weighted rows, against the same rows repeated; in float64."""
    rows = [{"question": f"{n} + 1?", "answer": f"{n + 1}. " * n} for n in (1, 2, 3)]
    heavy = [row | {"w": weight} for row, weight in zip(rows, (0.5, 1, 1.5), strict=True)]
    repeated = [rows[0], *[rows[1]] * 2, *[rows[2]] * 3]
    results = []
    for lines, columns, batch, micro in (
        (repeated, "{}", 6, 6),
        (heavy, "{weight: '{w}'}", 3, 1),
        (heavy, "{weight: '{w}'}", 3, 3),
    ):
        path = tmp_path / f"{len(results)}.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)))
        batches = [f"train.global_batch_size={batch}", f"train.micro_batch_size={micro}", "train.precision=float32"]
        loaded = recipe_for("strategy=lora", f"data.train={path}", f"data.columns={columns}", *batches)
        results.append(trained_in_float64(loaded))
    for losses, weights in results[1:]:
        assert losses == pytest.approx(results[0][0], rel=1e-9, abs=0)
        assert (weights - results[0][1]).abs().max() <= 1e-9 * results[0][1].abs().max()


@pytest.mark.parametrize("kind", ["nf4"])
def test_evaluation_does_not_cost_gradients(recipe_for: RecipeFor, kind: str) -> None:
    """bitsandbytes repacks 4-bit weights in a no-grad eval forward on some CPUs; after that no gradient passes the
    base.
    """
    loaded = recipe_for(f"quantize={kind}")
    tokenizer = build_tokenizer(loaded.recipe)
    model, _ = build_model(loaded.recipe, tokenizer)
    with torch.no_grad():  # B = 0 would hide a missing gradient of A
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    batch = Collator(0)(build_data(loaded.recipe, tokenizer).train.examples[:2])

    def gradients() -> dict[str, torch.Tensor]:
        model.train()
        model.zero_grad()
        model(**batch).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    first = gradients()
    model.eval()
    with torch.no_grad():
        model(**batch)
    second = gradients()
    assert first
    assert first.keys() == second.keys()
    for name, gradient in first.items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, second[name]), name


def test_each_epoch_sees_every_row_once_in_its_own_order(recipe_for: RecipeFor) -> None:
    trainer = make_trainer(recipe_for("strategy=lora"))
    trainer.args.max_steps = 6  # two epochs of 10 rows in steps of 4
    seen: list[tuple[int, ...]] = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.extend(tuple(row[row > 0].tolist()) for row in kwargs["input_ids"]),
        with_kwargs=True,
    )
    trainer.train()
    first, second = seen[:10], seen[10:]
    assert len(set(first)) == len(second) == 10
    assert set(first) == set(second)
    assert first != second


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_learning_rate_warms_up_and_never_is_zero(schedule: Any) -> None:
    factors = [learning_rate_factor(step, total_steps=20, warmup_steps=4, schedule=schedule) for step in range(20)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert min(factors) > 0
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert learning_rate_factor(0, total_steps=1, warmup_steps=0, schedule=schedule) == 1.0


def test_a_metrics_line_has_full_precision(recipe_for: RecipeFor, train: Train) -> None:
    lines = train(recipe_for("strategy=lora"))
    for number, line in enumerate(lines, start=1):
        assert list(line) == ["step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "entropy"]
        assert line["step"] == number
        assert json.loads(json.dumps(line)) == line
        assert len(str(line["loss"])) > 8
