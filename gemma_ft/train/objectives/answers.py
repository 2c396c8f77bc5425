"""What objectives over whole answers have in common: log-probabilities summed over each answer, their divisors and
their figures. No objective itself.

Letters: B sequences of a micro-batch, T tokens, A answers, P pairs, M labelled tokens.

The batch of such rows has, besides labels [B, T] (-100: not trained) and what the model reads:

- answer_ids [B, T]: the number, 0 to A - 1, of the answer that a labelled token belongs to; -1 elsewhere. Answers may
  be in one sequence (documents that do not see each other) or in several.
- sides [A]: 1 for a chosen or desirable answer, 0 for a rejected or undesirable one. Of pairs, answer 2i is the chosen
  and 2i + 1 the rejected one of pair i. A blank micro-batch has A = 0.
- row_weights [P], of "labelled" rows [A]: a row of weight 2 is the row twice.
- margins [P], of pairs: by how much the chosen answer is said to be better, 0 where nothing is said.
- reference_logprobs [A]: `summed_logprobs` of the reference. They are kept in the dtype in which they were summed, so
  that a model that is its reference differs from it by exactly 0.
- kl_baseline, a scalar: KTO's z of the whole step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemma_ft.system.limits import IGNORE
from gemma_ft.train.objectives.registry import Batch, Figures


def summed_logprobs(logprobs: Tensor, batch: Batch) -> Tensor:
    """Log-probabilities of labels [B, T] -> of answers [A] in float64, in which a sum of them is the same in any
    order to far less than their own rounding: the cut of a step and packing change nothing.
    """
    labelled = _labelled(batch)
    return torch.where(_members(batch, labelled), logprobs[labelled].double(), 0.0).sum(dim=1)


def answer_lengths(batch: Batch) -> Tensor:
    """Labelled tokens of each answer, its terminator included: [A] in float64."""
    return _members(batch, _labelled(batch)).sum(dim=1).double()


def halves(of_answers: Tensor) -> tuple[Tensor, Tensor]:
    """[A] -> (that of the chosen, that of the rejected answer of each pair), [P] both."""
    return of_answers[0::2], of_answers[1::2]


def weighted_sum(of_rows: Tensor, batch: Batch) -> Tensor:
    """[P], or [A] of labelled rows -> their sum, each times the weight of its row."""
    return (of_rows * batch["row_weights"].double()).sum()


def row_count(batch: Batch) -> float:
    """Rows of a micro-batch, each as often as its weight says."""
    return float(batch["row_weights"].double().sum())


def pair_divisors(batch: Batch, *, sft: bool) -> tuple[float, ...]:
    """(pairs), or (pairs, tokens of chosen answers) for an objective that has `chosen_nll` for a second term; each as
    often as its row's weight says.
    """
    if not sft:
        return (row_count(batch),)
    chosen, _ = halves(answer_lengths(batch))
    return row_count(batch), float(weighted_sum(chosen, batch))


def chosen_nll(logprobs: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy summed over the tokens of the chosen answers: what supervised fine-tuning on them alone is."""
    chosen, _ = halves(summed_logprobs(logprobs, batch))
    return -weighted_sum(chosen, batch)


def pair_figures(rewards: Tensor, batch: Batch) -> Figures:
    """Figures of pairs, under TRL's names, from the rewards of answers [A]; each pair counts once, whatever its
    weight. A pair whose rewards are equal is half right.
    """
    chosen, rejected = halves(rewards.detach().double())
    right = (chosen > rejected).double() + (chosen == rejected).double() / 2
    lengths = halves(answer_lengths(batch))
    return means(
        {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": right,
            "lengths/chosen": lengths[0],
            "lengths/rejected": lengths[1],
        }
    )


def logprob_figures(logprobs: Tensor, batch: Batch) -> Figures:
    """Log-probabilities of chosen and rejected answers of pairs, summed over their tokens."""
    chosen, rejected = halves(summed_logprobs(logprobs.detach(), batch))
    return means({"logps/chosen": chosen, "logps/rejected": rejected})


def reference_figures(logprobs: Tensor, batch: Batch, beta: float) -> Figures:
    """All figures of pairs whose answers are compared with a reference, their rewards being beta times log p - log q.
    `rewards/margins_per_token` has the reward of each answer over its length; `kl` is the mean log p - log q.
    """
    ratios = log_ratios(logprobs.detach(), batch)
    chosen, rejected = halves(beta * ratios / answer_lengths(batch))
    return {
        **pair_figures(beta * ratios, batch),
        **logprob_figures(logprobs, batch),
        **means({"rewards/margins_per_token": chosen - rejected, "kl": ratios}),
    }


def log_ratios(logprobs: Tensor, batch: Batch) -> Tensor:
    """log p - log q of each answer, q the reference: [A] in float64."""
    return summed_logprobs(logprobs, batch) - batch["reference_logprobs"].double()


def means(values: dict[str, Tensor]) -> Figures:
    """Name -> (sum, how many) of one-dimensional tensors, read from their device at once."""
    sums = torch.stack([value.sum() for value in values.values()]).tolist()
    return {name: (total, float(len(value))) for (name, value), total in zip(values.items(), sums, strict=True)}


def _labelled(batch: Batch) -> Tensor:
    """Which tokens are labelled and predicted from one before them, [B, T]."""
    labelled = batch["labels"] != IGNORE
    labelled[:, 0] = False
    return labelled


def _members(batch: Batch, labelled: Tensor) -> Tensor:
    """Which labelled tokens are of which answer, [A, M]."""
    numbers = torch.arange(len(batch["sides"]), device=labelled.device)
    return batch["answer_ids"][labelled] == numbers[:, None]
