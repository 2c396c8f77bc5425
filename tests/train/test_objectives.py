"""The seam for objectives: any function of token log-probabilities is trained through the fused head as if whole logits
had been built; supervised fine-tuning is one; another one is a file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gemma_ft.build.data import build_data
from gemma_ft.build.inputs import build_tokenizer
from gemma_ft.build.model import build_model
from gemma_ft.data.pack.collate import Collator
from gemma_ft.recipe.batch_plan import BatchPlan
from gemma_ft.recipe.load import LoadedRecipe
from gemma_ft.train.micro_batch import micro_batch_loss, token_weights
from gemma_ft.train.objectives.registry import NO_OBJECTIVES, Batch, Objective, build_objective, objective_names
from gemma_ft.train.objectives.sft import SupervisedFineTuning
from gemma_ft.train.progress import Listener
from gemma_ft.train.sampler import StepRows
from tests.train.test_trainer import make_trainer

RecipeFor = Callable[..., LoadedRecipe]
PACKAGE = Path(__file__).resolve().parents[2] / "gemma_ft"


def desired(batch: Batch) -> Tensor:
    """A label of each row, +1 or -1, that does not depend on its neighbours: [B]."""
    return 1.0 - 2.0 * (batch["input_ids"].sum(dim=1) % 2)


@dataclass(frozen=True)
class Pushed(SupervisedFineTuning):
    """-log sigmoid(beta * +-mean log p) of each row: rows of one label are pushed up, of the other down."""

    beta: float = 0.7
    needs_logprobs = True

    def divisors(self, batch: Batch) -> tuple[float, ...]:
        return (float((batch["document_ids"] >= 0).any(dim=1).sum()),)

    def __call__(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        count = (batch["labels"][:, 1:] != -100).sum(dim=1)
        score = logprobs.sum(dim=1) / count.clamp(min=1)
        return (-(F.logsigmoid(self.beta * desired(batch) * (score + 2.0)) * (count > 0)).sum(),)


@dataclass(frozen=True)
class Preferred(SupervisedFineTuning):
    """-log sigmoid(beta * (log p of a row - log p of the next one)): rows are pairs, as in arXiv:2305.18290 eq. 7 with
    a reference that holds both alike.
    """

    beta: float = 0.1
    needs_logprobs = True

    def divisors(self, batch: Batch) -> tuple[float, ...]:
        return (len(batch["labels"]) / 2,)

    def __call__(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        chosen, rejected = logprobs.sum(dim=1)[0::2], logprobs.sum(dim=1)[1::2]
        return (-F.logsigmoid(self.beta * (chosen - rejected)).sum(),)


@dataclass(frozen=True)
class Unlikely(SupervisedFineTuning):
    """-log(1 - p) of each label, arXiv:1908.04319 eq. 4: every weight is negative."""

    needs_logprobs = True

    def divisors(self, batch: Batch) -> tuple[float, ...]:
        return (float((batch["labels"][:, 1:] != -100).sum()),)

    def __call__(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, ...]:
        labelled = F.pad(batch["labels"][:, 1:] != -100, (1, 0))
        return (-torch.where(labelled, torch.log1p(-logprobs.clamp(max=-1e-6).exp()), 0.0).sum(),)


@dataclass(frozen=True)
class Explicit(SupervisedFineTuning):
    """Supervised fine-tuning that asks for the log-probabilities."""

    needs_logprobs = True


def built(loaded: LoadedRecipe, dtype: torch.dtype) -> tuple[Any, Any]:
    """(a model whose adapter does something, its rows)"""
    tokenizer = build_tokenizer(loaded.recipe)
    model, _ = build_model(loaded.recipe, tokenizer)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    return model.to(dtype), build_data(loaded.recipe, tokenizer).train.examples


def gradients(model: Any) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def summed_divisors(objective: Objective, batches: Sequence[Batch]) -> Tensor:
    """[terms], of all batches together."""
    return torch.tensor([objective.divisors(batch) for batch in batches], dtype=torch.float64).sum(dim=0)


def over_full_logits(model: Any, batches: Sequence[Any], objective: Objective) -> tuple[float, Tensor]:
    """(value, gradient) as a textbook has them: whole logits, autograd through everything."""
    model.zero_grad()
    divisors, value = summed_divisors(objective, batches), 0.0
    for batch in batches:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids", "document_ids")}
        logits = model.train()(**inputs, use_cache=False, skip_logits=False).logits
        targets = batch["labels"][:, 1:]
        found = logits[:, :-1].log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
        terms = objective(F.pad(torch.where(targets == -100, 0.0, found), (1, 0)), batch)
        loss = sum(term / divisor for term, divisor in zip(terms, divisors, strict=True))
        loss.backward()
        value += float(loss.detach())
    return value, gradients(model)


def through_the_seam(model: Any, batches: Sequence[Any], objective: Objective) -> tuple[float, Tensor]:
    model.zero_grad()
    divisors, value = summed_divisors(objective, batches), 0.0
    for batch in batches:
        found = micro_batch_loss(model.train(), batch, objective, divisors)
        found.loss.backward()
        value += float(found.value)
    return value, gradients(model)


@pytest.mark.parametrize(
    ("objective", "packing"),
    [(Pushed(), "false"), (Preferred(), "false"), (Unlikely(), "true"), (SupervisedFineTuning(), "true")],
    ids=repr,
)
def test_gradients_are_those_of_autograd_over_full_logits(
    recipe_for: RecipeFor, objective: Objective, packing: str
) -> None:
    """Two micro-batches, labels of prompts ignored, Gemma 2's cap of 30; in float64 to its rounding, float32 to its."""
    loaded = recipe_for("strategy=lora", f"data.packing={packing}", "train.precision=float32", "adapter.dropout=0.0")
    for dtype, near in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        model, examples = built(loaded, dtype)
        assert model.get_base_model().model.numerics.final_softcap == 30.0
        rows = [examples[row % len(examples)] for row in range(4)]
        batches = [Collator(0)(rows[:2]), Collator(0)(rows[2:])]
        wanted, slope = over_full_logits(model, batches, objective)
        found, given = through_the_seam(model, batches, objective)
        assert found == pytest.approx(wanted, rel=near)
        assert slope.abs().max() > 1e-4
        assert (given - slope).abs().max() <= near * slope.abs().max()


def test_supervised_fine_tuning_in_the_seam_is_the_loss_of_the_model(recipe_for: RecipeFor) -> None:
    """Loss and gradients to the bit, with the weights of rows and without; and what it would be if it asked."""
    model, examples = built(recipe_for("strategy=lora", "train.precision=float32"), torch.float32)
    batch = Collator(0)(examples[:3])
    weighted = {**batch, "loss_weights": torch.tensor([0.5, 2.0, 1.0])[:, None].expand_as(batch["labels"])}
    for inputs in (batch, weighted):
        model.zero_grad()
        (divisor,) = summed_divisors(SupervisedFineTuning(), [inputs])
        expected = model.train()(**inputs, use_cache=False, num_items_in_batch=divisor).loss
        expected.backward()
        wanted = gradients(model).clone()
        found, given = through_the_seam(model, [inputs], SupervisedFineTuning())
        assert found == float(expected.detach())
        assert torch.equal(given, wanted)
        asked, also = through_the_seam(model, [inputs], Explicit())
        assert asked == pytest.approx(found, rel=1e-6)
        assert (also - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_only_an_objective_that_needs_them_has_log_probabilities_computed(
    recipe_for: RecipeFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, examples = built(recipe_for("strategy=lora"), torch.float32)
    calls: list[int] = []
    from gemma_ft.model import lm_head

    original = lm_head._scored
    monkeypatch.setattr(lm_head, "_scored", lambda *a, **k: calls.append(1) or original(*a, **k))
    through_the_seam(model, [Collator(0)(examples[:2])], SupervisedFineTuning())
    assert calls == []
    through_the_seam(model, [Collator(0)(examples[:2])], Explicit())
    assert calls == [1]


def test_an_objective_without_a_term_weighs_nothing() -> None:
    """A blank row, of whose log-probabilities nothing depends."""

    class Nothing(Unlikely):
        def __call__(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, ...]:
            return (torch.zeros(()),)

    value, weights = token_weights(Nothing(), torch.zeros(1, 3), {}, torch.ones(1))
    assert (value, weights.tolist()) == (0, [[0, 0, 0]])


@pytest.mark.parametrize("objective", [Pushed(), Unlikely()], ids=repr)
def test_no_cut_of_a_step_changes_what_is_trained(recipe_for: RecipeFor, objective: Objective) -> None:
    """4 x 1 = 2 x 2 = 1 x 4, in float64, also in the last, partial step of an epoch (10 rows)."""
    results = []
    for micro in (4, 2, 1):
        loaded = recipe_for("strategy=lora", f"train.micro_batch_size={micro}", "train.precision=float32", "seed=3")
        model, _ = build_model(loaded.recipe, build_tokenizer(loaded.recipe))
        losses: list[float] = []
        listener = Listener(lambda figures, losses=losses: losses.append(figures["loss"]))
        make_trainer(loaded, model.to(torch.float64), objective=objective, listener=listener).train()
        results.append((losses, torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])))
    assert len(set(results[0][0])) == 4
    for losses, weights in results[1:]:
        assert losses == pytest.approx(results[0][0], rel=1e-10, abs=0)
        assert (weights - results[0][1]).abs().max() <= 1e-10 * results[0][1].abs().max()


def test_a_step_is_that_of_autograd_over_full_logits(recipe_for: RecipeFor) -> None:
    """One step of the trainer, accumulated: the figures it tells are the objective's own."""
    loaded = recipe_for("strategy=lora", "train.micro_batch_size=2", "train.precision=float32", "adapter.dropout=0.0")
    model, examples = built(loaded, torch.float64)
    rows = StepRows(len(examples), BatchPlan(4, 2, 2), seed=loaded.recipe.seed, tokens=examples.lengths)
    batches = [Collator(0)([examples[row] for row in some]) for some in rows.micro_batches(0)]
    wanted, slope = over_full_logits(model, batches, Pushed())
    told: list[dict[str, Any]] = []
    trainer = make_trainer(loaded, model, objective=Pushed(), listener=Listener(told.append))
    trainer.args.max_steps = 1
    trainer.train()
    assert told[0]["loss"] == pytest.approx(wanted, rel=1e-9)
    assert told[0]["grad_norm"] == pytest.approx(float(slope.norm()), rel=1e-9)


def test_the_objectives_are_the_files() -> None:
    folder = PACKAGE / "train" / "objectives"
    files = sorted(path.stem for path in folder.glob("*.py") if path.stem not in ("__init__", *NO_OBJECTIVES))
    assert objective_names() == files
    assert isinstance(build_objective("sft"), SupervisedFineTuning)
    with pytest.raises(AssertionError, match=r"no objective ppo: there are .*sft"):
        build_objective("ppo")
