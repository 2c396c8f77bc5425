"""Preference losses against TRL's own trainers (1.16), on transformers' Gemma under PEFT: from our ids, masks and
reference log-probabilities, the loss and the gradient of every weight of the adapter. Then where TRL computes something
else: what it gives, and what is right by which paper.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor

from gemma_ft.data.encode.tokenizer import load_tokenizer
from gemma_ft.train.micro_batch import token_weights
from gemma_ft.train.objectives.registry import build_objective
from tests.parity.amplified import FIRST, SECOND, VOCAB, amplify, ours, reference, relative, tiny_config
from tests.train.preferences import (
    Pair,
    divisors_of,
    drawn_pairs,
    head_logprobs,
    labelled_batch,
    pairs_batch,
    through_the_seam,
    with_reference,
)

TOLERANCE = 1e-5
SMALL = {"num_hidden_layers": 2}  # each layer adds float32's rounding of another order of sums
ROOT = Path(__file__).resolve().parents[2]
LORA = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
Inputs = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def _silent() -> Iterator[None]:
    """No telemetry, and no warning that a trainer is experimental."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        patch.setenv("CI", "1")  # of which TRL sends nothing
        import trl.trainer.base_trainer as base

        trl_classes("dpo")  # seconds, which are no test's own
        patch.setattr(base, "send_telemetry", lambda *args, **kwargs: pytest.fail("telemetry"))
        yield


def adapted(model: Any) -> Any:
    """With an adapter of loud weights, drawn by name: the same on any model."""
    wrapped = get_peft_model(model, copy.deepcopy(LORA))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in sorted(wrapped.named_parameters()):
            if "lora_" in name:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return wrapped


def trl_classes(kind: str) -> tuple[Any, Any]:
    """(config, trainer)"""
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return {
        "dpo": (DPOConfig, DPOTrainer),
        "kto": (KTOConfig, KTOTrainer),
        "orpo": (ORPOConfig, ORPOTrainer),
        "cpo": (CPOConfig, CPOTrainer),
        "reward": (RewardConfig, RewardTrainer),
    }[kind]


def trainer_of(kind: str, model: Any, folder: Path, **settings: Any) -> Any:
    """TRL's trainer for an objective, over a data set that it is never asked for."""
    config, trainer = trl_classes(kind)
    off = {"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "max_length": 64}
    batch = {"per_device_train_batch_size": 4, "logging_nan_inf_filter": False, "save_strategy": "no"}
    row: dict[str, Any] = {"prompt": "one", "chosen": " two", "rejected": " three"}
    if kind == "kto":
        row = {"prompt": "one", "completion": " two", "label": True}
    made = trainer(
        model=model,
        args=config(str(folder), **off, **batch, **settings),
        train_dataset=Dataset.from_list([row, {**row, "label": False} if kind == "kto" else row]),
        processing_class=load_tokenizer(str(ROOT / "data" / "gemma-tiny")),
    )
    made.precompute_ref_logps = True  # the reference is in the inputs
    return made


def trl_result(trainer: Any, inputs: Inputs) -> tuple[float, dict[str, Tensor]]:
    """(loss, gradient of each weight of the adapter) of one micro-batch."""
    model = trainer.model.train()
    model.zero_grad()
    loss = trainer.compute_loss(model, inputs)
    loss.backward()
    return float(loss.detach()), adapter_gradients(model)


def adapter_gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if "lora_" in name and p.grad is not None}
    return {name: grad for name, grad in found.items() if ".ref." not in name}


def our_result(model: Any, batches: list[dict[str, Tensor]], kind: str, **settings: Any) -> tuple[float, Any]:
    loss, _ = through_the_seam(model, batches, build_objective(kind, **settings))
    return loss, adapter_gradients(model)


def agree(found: tuple[float, dict[str, Tensor]], wanted: tuple[float, dict[str, Tensor]], least: int = 28) -> None:
    """`least`: how many weights there are; A and B of each linear layer."""
    assert found[0] == pytest.approx(wanted[0], rel=TOLERANCE)
    assert found[1].keys() == wanted[1].keys()
    assert len(found[1]) >= least
    size = float(torch.cat([grad.flatten() for grad in wanted[1].values()]).norm())
    assert size > 1e-3
    for name, grad in wanted[1].items():
        assert float((found[1][name] - grad).norm()) <= TOLERANCE * size, name


def halves_first(batch: dict[str, Tensor]) -> Inputs:
    """All chosen answers, then all rejected ones, as TRL has them."""
    order = [*range(0, len(batch["sides"]), 2), *range(1, len(batch["sides"]), 2)]
    inputs = {"input_ids": batch["input_ids"][order], "attention_mask": batch["attention_mask"][order]}
    inputs["completion_mask"] = (batch["labels"][order] != -100).long()
    if "reference_logprobs" in batch:
        reference = batch["reference_logprobs"].float()
        inputs |= {"ref_chosen_logps": reference[0::2], "ref_rejected_logps": reference[1::2]}
    return inputs


def by_halves(batch: dict[str, Tensor]) -> Inputs:
    """As TRL's older trainers take them."""
    names = ("input_ids", "attention_mask", "labels")
    return {f"{side}_{name}": batch[name][at::2] for at, side in enumerate(("chosen", "rejected")) for name in names}


@pytest.fixture(scope="module", params=[FIRST, SECOND], ids=["no cap", "cap 30"])
def shape(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def setting(shape: str) -> Any:
    """Our model with the adapter, and pairs with the base's log-probabilities for their reference."""
    model, base = adapted(ours(shape, **SMALL)), ours(shape, **SMALL)

    def batch(pairs: list[Pair], **more: Any) -> dict[str, Tensor]:
        return with_reference(base, pairs_batch(pairs, **more))

    return model, base, batch


@pytest.fixture(scope="module")
def trainers(shape: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    folder, made = tmp_path_factory.mktemp("trl"), dict[str, Any]()

    def get(kind: str, **settings: Any) -> Any:
        key = f"{kind} {sorted(settings.items())}"
        if key not in made:
            made[key] = trainer_of(kind, adapted(reference(shape, **SMALL)), folder, **settings)
        return made[key]

    return get


PAIRS = drawn_pairs(4, vocab=VOCAB)
BARE = [([2], chosen, rejected) for _, chosen, rejected in PAIRS]  # with nothing but <bos> before the answer


@pytest.mark.parametrize(
    ("kind", "mine", "theirs"),
    [
        ("dpo", {"beta": 0.1}, {"loss_type": ["sigmoid"], "beta": 0.1}),
        ("dpo", {"beta": 0.5, "length_normalized": True}, {"loss_type": ["sigmoid_norm"], "beta": 0.5}),
        ("dpo", {"sft_weight": 0.3}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3], "beta": 0.1}),
        ("ipo", {"beta": 0.2}, {"loss_type": ["ipo"], "beta": 0.2}),
    ],
)
def test_dpo_and_ipo(kind: str, mine: Inputs, theirs: Inputs, setting: Any, trainers: Any) -> None:
    model, _, batch = setting
    trainer, pairs = trainers("dpo", **theirs), batch(PAIRS)
    agree(our_result(model, [pairs], kind, **mine), trl_result(trainer, halves_first(pairs)))
    told, figures = trainer._metrics["train"], build_objective(kind, **mine).figures(head_logprobs(model, pairs), pairs)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert told[name][-1] == pytest.approx(figures[name][0] / figures[name][1], rel=1e-4, abs=1e-5), name


def test_smoothed_dpo_where_trl_drops_the_smoothing(setting: Any, trainers: Any) -> None:
    """TRL's "sigmoid" takes `label_smoothing` and computes the loss without it; right is E. Mitchell, "A note on DPO
    with noisy preferences", eq. 3: so much of the loss, and of its gradient, is that of the swapped pair.
    """
    model, _, batch = setting
    pairs, swapped = batch(PAIRS), batch([(prompt, rejected, chosen) for prompt, chosen, rejected in PAIRS])
    plain = trl_result(trainers("dpo", loss_type=["sigmoid"], beta=0.1), halves_first(pairs))
    theirs = trainers("dpo", loss_type=["sigmoid"], beta=0.1, label_smoothing=0.2)
    assert trl_result(theirs, halves_first(pairs))[0] == plain[0]
    other = trl_result(theirs, halves_first(swapped))
    mixed = {name: 0.8 * grad + 0.2 * other[1][name] for name, grad in plain[1].items()}
    agree(our_result(model, [pairs], "dpo", label_smoothing=0.2), (0.8 * plain[0] + 0.2 * other[0], mixed))


def test_orpo_where_nothing_is_before_the_answer(setting: Any, trainers: Any) -> None:
    model, _, batch = setting
    pairs = batch(BARE)
    agree(our_result(model, [pairs], "orpo", beta=0.5), trl_result(trainers("orpo", beta=0.5), by_halves(pairs)))


def test_simpo(setting: Any, trainers: Any) -> None:
    """As the paper has it, and with CPO's term of cross-entropy on top, which TRL's default keeps."""
    model, _, batch = setting
    pairs, theirs = batch(PAIRS), {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0}
    trainer = trainers("cpo", cpo_alpha=0.0, **theirs)
    agree(our_result(model, [pairs], "simpo"), trl_result(trainer, by_halves(pairs)))
    agree(our_result(model, [pairs], "simpo", sft_weight=1.0), trl_result(trainers("cpo", **theirs), by_halves(pairs)))


def labelled(
    model: Any, base: Any, rows: list[tuple[list[int], list[int], bool]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the rows, the rows with each other's answers by TRL's rotation), both with their reference. That of the turned
    ones is so far from the model that z is above 0.
    """
    matched = with_reference(base, labelled_batch(rows))
    turned = [(prompt, rows[n - 1][1], good) for n, (prompt, _, good) in enumerate(rows)]
    other = with_reference(model, labelled_batch(turned))
    other["reference_logprobs"] = other["reference_logprobs"] - torch.tensor([4.0, 1.0, 2.0, 0.5])[: len(rows)]
    return matched, other


def baseline(model: Any, turned: dict[str, Tensor]) -> Tensor:
    """z of these rows."""
    figures = build_objective("dpo").figures(head_logprobs(model, turned), {**turned, "row_weights": torch.ones(1)})
    return torch.tensor(max(0.0, figures["kl"][0] / figures["kl"][1]))


def kto_inputs(matched: dict[str, Tensor], turned: dict[str, Tensor]) -> Inputs:
    inputs: Inputs = {"label": matched["sides"] == 1, "ref_logps": matched["reference_logprobs"].float()}
    inputs["ref_KL_logps"] = turned["reference_logprobs"].float()
    for prefix, batch in (("", matched), ("KL_", turned)):
        inputs |= {f"{prefix}input_ids": batch["input_ids"], f"{prefix}attention_mask": batch["attention_mask"]}
        inputs[f"{prefix}completion_mask"] = (batch["labels"] != -100).long()
    return inputs


ROWS = [(prompt, chosen, n != 1) for n, (prompt, chosen, _) in enumerate(PAIRS)]
KTO = {"beta": 0.2, "desirable_weight": 1.0, "undesirable_weight": 1.5}


def test_kto_in_one_micro_batch(setting: Any, trainers: Any) -> None:
    model, base, _ = setting
    matched, turned = labelled(model, base, ROWS)
    trainer = trainers("kto", **KTO)
    wanted = trl_result(trainer, kto_inputs(matched, turned))
    matched["kl_baseline"] = baseline(model, turned)
    agree(our_result(model, [matched], "kto", **KTO), wanted)
    assert trainer._metrics["train"]["kl"][-1] == pytest.approx(float(matched["kl_baseline"]), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("centering", "margins"), [(None, None), (0.1, None), (0.1, [0.5, 0.0, 1.0, 0.2])], ids=["plain", "k", "margins"]
)
def test_reward(centering: float | None, margins: list[float] | None, shape: str, tmp_path: Path) -> None:
    """One model, transformers' sequence classification: from its rewards, the gradient of each of its weights."""
    from transformers import AutoModelForSequenceClassification

    config = tiny_config(shape, attn_implementation="eager", num_labels=1, **SMALL)
    model = AutoModelForSequenceClassification.from_config(config)
    amplify(model)
    trainer = trainer_of("reward", model, tmp_path, center_rewards_coefficient=centering)
    batch = pairs_batch(PAIRS, margins=margins)
    order = halves_first(batch)
    inputs = {"input_ids": order["input_ids"], "attention_mask": order["attention_mask"]}
    if margins is not None:
        inputs["margin"] = torch.tensor(margins)
    model.zero_grad()
    loss = trainer.compute_loss(model, dict(inputs))
    loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    objective = build_objective("reward", centering=centering or 0.0)
    found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.squeeze(-1)
    value, weights = token_weights(objective, found, batch, divisors_of(objective, [batch]))
    model.zero_grad()
    (-weights * found).sum().backward()
    found_gradients = {name: p.grad for name, p in model.named_parameters()}
    agree((float(value), found_gradients), (float(loss.detach()), wanted), least=21)


def test_micro_batches_of_three_and_one_pair(setting: Any, trainers: Any) -> None:
    """TRL's loss and gradient of a step are the mean of its micro-batches' means: the lone pair weighs three times as
    much. By arXiv:2305.18290 eq. 7 the loss is the mean over pairs, which TRL's is in one micro-batch, and ours is in
    any.
    """
    model, _, batch = setting
    whole, parts = batch(PAIRS), [batch(PAIRS[:3]), batch(PAIRS[3:])]
    trainer = trainers("dpo", loss_type=["sigmoid"], beta=0.1)
    right = trl_result(trainer, halves_first(whole))
    agree(our_result(model, parts, "dpo"), right)
    three, one = (trl_result(trainer, halves_first(part))[0] for part in parts)
    trainer.current_gradient_accumulation_steps = 2
    trainer.model.zero_grad()
    step = sum(float(trainer.training_step(trainer.model, halves_first(part))) for part in parts)
    assert step == pytest.approx((three + one) / 2, rel=1e-5)
    assert right[0] == pytest.approx((3 * three + one) / 4, rel=1e-5)
    assert abs(step - right[0]) > 1e-3 * right[0]


def test_cross_entropy_beside_dpo_in_micro_batches(setting: Any, trainers: Any) -> None:
    """TRL's "sft" is a mean over the tokens of a micro-batch: of two alike in pairs but not in tokens it is another
    loss than of the whole. Ours is the whole's.
    """
    model, _, batch = setting
    trainer = trainers("dpo", loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.3], beta=0.1)
    order = [PAIRS[n] for n in (0, 3, 1, 2)]
    whole, parts = batch(order), [batch(order[:2]), batch(order[2:])]
    lengths = [int((part["labels"][::2] != -100).sum()) for part in parts]
    right = trl_result(trainer, halves_first(whole))
    agree(our_result(model, parts, "dpo", sft_weight=0.3), right)
    if lengths[0] != lengths[1]:
        theirs = sum(trl_result(trainer, halves_first(part))[0] for part in parts) / 2
        assert abs(theirs - right[0]) > 1e-4 * right[0]


def test_ties_are_no_wins(setting: Any, trainers: Any) -> None:
    """Where the model is its reference TRL's accuracy is 0.0; a coin's is 0.5, and so is ours. The loss is log 2."""
    model, _, batch = setting
    pairs = batch(PAIRS)
    pairs["reference_logprobs"] = with_reference(model, pairs)["reference_logprobs"]
    trainer, inputs = trainers("dpo", loss_type=["sigmoid"], beta=0.1), halves_first(pairs)
    labels = torch.where(inputs["completion_mask"] == 1, inputs["input_ids"], -100)
    known = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        own = trainer.model(**known, labels=labels, fused_lm_head=True).log_probs.sum(dim=1)
    loss, _ = trl_result(trainer, {**inputs, "ref_chosen_logps": own[:4], "ref_rejected_logps": own[4:]})
    assert loss == pytest.approx(math.log(2), rel=1e-6)
    assert trainer._metrics["train"]["rewards/accuracies"][-1] == 0.0
    figures = build_objective("dpo").figures(head_logprobs(model, pairs), pairs)
    assert figures["rewards/accuracies"] == (2.0, 4.0)


def test_orpo_with_a_prompt(setting: Any, trainers: Any) -> None:
    """TRL's cross-entropy is of prompt and answer, so that another prompt changes it; arXiv:2403.07691 eq. 1 has that
    of the answer given the prompt. The term of the odds, and its gradient, are the same.
    """
    model, _, batch = setting
    pairs = batch(PAIRS)
    theirs, none = (trl_result(trainers("orpo", beta=beta), by_halves(pairs)) for beta in (0.5, 0.0))
    mine, alone = (our_result(model, [pairs], "orpo", beta=beta) for beta in (0.5, 0.0))
    everything = {**pairs, "labels": torch.where(pairs["attention_mask"] == 1, pairs["input_ids"], -100)}
    everything["answer_ids"] = torch.arange(8)[:, None].expand_as(pairs["answer_ids"])
    assert none[0] == pytest.approx(our_result(model, [everything], "orpo", beta=0.0)[0], rel=TOLERANCE)
    assert abs(none[0] - alone[0]) > 1e-3 * alone[0]

    def odds(both: tuple[float, Any], nll: tuple[float, Any]) -> tuple[float, dict[str, Tensor]]:
        return both[0] - nll[0], {name: grad - nll[1][name] for name, grad in both[1].items()}

    found, wanted = odds(mine, alone), odds(theirs, none)
    assert found[0] == pytest.approx(wanted[0], rel=1e-3)  # a difference of two losses in float32
    for name, grad in wanted[1].items():
        assert relative(found[1][name], grad) <= 1e-3, name


def test_kto_in_two_micro_batches(setting: Any, trainers: Any) -> None:
    """TRL's z is of a micro-batch, so that accumulation changes the loss; arXiv:2402.01306 section 4.1 has one estimate
    for a step's rows. Ours, with z of all four rows, is TRL's loss of the four at once.
    """
    model, base, _ = setting
    matched, turned = labelled(model, base, ROWS)
    trainer = trainers("kto", **KTO)
    right, z = trl_result(trainer, kto_inputs(matched, turned)), baseline(model, turned)
    parts, theirs = [], []
    for rows in (ROWS[:2], ROWS[2:]):
        part, other = labelled(model, base, rows)
        theirs.append(trl_result(trainer, kto_inputs(part, other))[0])
        parts.append({**part, "kl_baseline": z})
    agree(our_result(model, parts, "kto", **KTO), right)
    assert abs(sum(theirs) / 2 - right[0]) > 1e-3 * right[0]


def test_an_answer_that_is_cut_away_is_nan(setting: Any, trainers: Any) -> None:
    """ORPO and CPO of TRL cut the answer alone, and go on where nothing is left: 0 / 0. Such a pair is never one of
    ours: it is refused or left out as a pair when rows become tokens.
    """
    _, _, batch = setting
    inputs = by_halves(batch(PAIRS))
    inputs["rejected_labels"] = torch.full_like(inputs["rejected_labels"], -100)
    assert math.isnan(trl_result(trainers("orpo", beta=0.5), inputs)[0])


def test_an_answer_that_is_cut_short_is_compared_as_if_it_had_ended() -> None:
    """TRL's DPO cuts each half by itself at max_length: a chosen answer without its terminator against a whole one."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    row = {"prompt_ids": [2, 5], "chosen_ids": [6, 7, 8, 1], "rejected_ids": [9, 1]}
    batch = DataCollatorForPreference(pad_token_id=0, max_length=4)([row])
    assert batch["input_ids"].tolist() == [[2, 5, 6, 7], [2, 5, 9, 1]]
    assert batch["completion_mask"].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]
