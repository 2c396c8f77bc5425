"""What summary.json says of a run that came to its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gemma_ft.build.data import BuiltData
from gemma_ft.evaluate.forgetting import forgetting_note
from gemma_ft.evaluate.held_out import Question, Score
from gemma_ft.recipe.run_files import RunFiles
from gemma_ft.system import environment, hardware
from gemma_ft.system.row_kind import RowKind
from gemma_ft.train.evaluation import Figures
from gemma_ft.train.lengths import length_histogram
from gemma_ft.train.progress import Progress


@dataclass(frozen=True)
class TrainedRun:
    """A run that came to its end, what its summary.json says, and what its loss is a mean of."""

    run: RunFiles
    summary: dict[str, Any]
    rows: RowKind


def summary_of(
    progress: Progress,
    *,
    after: Score,
    compared: Figures,
    questions: Sequence[Question],
    result: str,
    data: BuiltData,
) -> dict[str, Any]:
    """The figures before and after, what was gained and forgotten, speed, memory, samples, data and environment.

    `result`: the folder in the run that holds what was trained.
    """
    before = dict(progress.extra["before"])
    answers = before.pop("answers")
    proof = progress.extra.get("zero_proof")
    return {
        "steps": progress.step,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "tokens_per_second": progress.tokens / progress.seconds if progress.seconds else 0.0,
        "peak_bytes": hardware.peak_memory_bytes(),
        "train_loss": progress.last_loss,  # of the last optimizer step
        **({"zero_proof": proof} if proof is not None else {}),
        "eval_before": before,
        "eval_after": after.figures(),
        **compared,
        "forgetting_note": forgetting_note(compared.get("forgetting"), compared["gain"]),
        "result": result,
        "samples": [
            {"prompt": question.prompt, "expected": question.answer, "before": first, "after": last}
            for question, first, last in zip(questions, answers, after.answers, strict=False)
        ],
        "data": data.stats.as_dict(),
        "lengths": length_histogram(data.examples.length_counts),
        "device": hardware.device_name(),
        "versions": environment.versions(),
    }
