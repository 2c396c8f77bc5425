"""What one run is made of, on one of its ranks: what run.py built, and what it then goes on with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from gemma_ft.build.data import BuiltData
from gemma_ft.build.located import Source
from gemma_ft.evaluate.forgetting import ForgettingSet
from gemma_ft.evaluate.judge import Judge
from gemma_ft.recipe.batch_plan import BatchPlan
from gemma_ft.recipe.schema import Recipe
from gemma_ft.system.observer import SILENT, Job, Observer
from gemma_ft.train.activation_checkpointing import Checkpointing
from gemma_ft.train.distributed import World
from gemma_ft.train.evaluation import Scorer
from gemma_ft.train.progress import Progress
from gemma_ft.train.run_dir import RunDir
from gemma_ft.train.run_log import RunLog
from gemma_ft.train.signals import StopRequest
from gemma_ft.train.summary import TrainedRun
from gemma_ft.train.trainer import GemmaTrainer

Finish = Callable[[TrainedRun], None]  # called on the main rank when all else is done


@dataclass(frozen=True)
class RunContext:
    """A run that is checked and built, before it trains."""

    recipe: Recipe
    run: RunDir
    observer: Observer
    finish: Finish
    tokenizer: PreTrainedTokenizerBase
    data: BuiltData
    canary: ForgettingSet | None
    model: Any
    source: Source | None  # of the base's weights
    total: int  # optimizer steps
    batch: BatchPlan
    world: World
    stop: StopRequest
    checkpointing: Checkpointing


@dataclass
class TrainingLoop:
    """A run and what it goes on with: how far it has come, who logs, trains and scores it."""

    context: RunContext
    progress: Progress
    log: RunLog
    trainer: GemmaTrainer
    scorer: Scorer
    job: Job = SILENT  # of the training, for whoever watches
    judge: Judge | None = None  # who compares answers before and after
    eval_loss: float | None = None  # the last one of this process
    scoring_seconds: float = 0.0  # what held-out rows took before training, in this process
