"""TRL's SFTTrainer, bent where Gemma, exactness and our files ask for it: what is bent of a library is bent here.

`SFTTrainer.train`, unchanged, drives: it places and wraps the model, makes the optimizer, goes through epochs and
steps, and says when to evaluate, save and stop. What one step is stands in step.py. Why something is overridden is said
at each method; nothing of a library is patched.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from gemma_ft.adapters.lora import restore_trainables, trainables_in_float32
from gemma_ft.adapters.trainable_tokens import native_of
from gemma_ft.build.located import Source
from gemma_ft.errors import DiskError, UserError
from gemma_ft.recipe.batch_plan import BatchPlan
from gemma_ft.train.activation_checkpointing import Checkpointing
from gemma_ft.train.checkpoint_state import load_optimizer, load_weights
from gemma_ft.train.distributed import World
from gemma_ft.train.fsdp import shard
from gemma_ft.train.held_out_objective import held_out_score
from gemma_ft.train.lr_schedule import learning_rate_factor
from gemma_ft.train.objectives.registry import Objective
from gemma_ft.train.progress import Listener, Progress
from gemma_ft.train.reference import Reference
from gemma_ft.train.sampler import Batch, StepRows, TrainingData, held_out_batches
from gemma_ft.train.saving import commit_checkpoint
from gemma_ft.train.settings import TrainerOptions
from gemma_ft.train.signals import StopRequest
from gemma_ft.train.step import StepFigures, StepParts, optimizer_step


class GemmaTrainer(SFTTrainer):
    """Trains a model on every rank of a world, as `batch` deals the rows of a step, for an objective.

    Raises what `SFTTrainer.train` raises.
    """

    def __init__(
        self,
        model: Any,
        args: SFTConfig,
        *,
        data: TrainingData,
        batch: BatchPlan,
        objective: Objective,
        reference: Reference,
        options: TrainerOptions,
        tokenizer: PreTrainedTokenizerBase,
        world: World,
        stop: StopRequest,
        source: Source | None,
        progress: Progress,
        listener: Listener | None = None,
        checkpointing: Checkpointing | None = None,
    ) -> None:
        self.data, self.batch, self.options = data, batch, options
        self.objective, self.reference = objective, reference
        self.world, self.stop, self.progress = world, stop, progress
        self.listener = listener or Listener()
        self.checkpointing = checkpointing  # the plan, where the caller has one
        self.stopped = False  # all ranks agreed to stop
        self.skipped = 0  # updates left out in a row, for they were not finite
        self.saved_step = -1
        self.former_best: dict[str, Any] | None = None
        self._parts: StepParts | None = None
        self._figures: StepFigures | None = None  # of a step that nobody has heard of yet
        self._step_started = 0.0
        native = native_of(model)
        tuned = native is not model
        values = trainables_in_float32(model) if tuned else {}  # a whole model is not cast by SFTTrainer
        # Trainer's own word for a model that is cut already: it wraps and moves nothing of it.
        native._is_distributed_loading_by_transformers = world.layout == "fsdp2"
        # It would spread a model over every visible GPU with nn.DataParallel, which TRL refuses: one device is used.
        args._n_gpu = min(1, args.n_gpu)
        super().__init__(
            model=model,
            args=args,
            train_dataset=_placeholder(data.train),
            eval_dataset=None if data.held_out is None else _placeholder(data.held_out),
            data_collator=data.collate,
            processing_class=tokenizer,
            optimizer_cls_and_kwargs=options.optimizer,
        )
        if tuned:
            restore_trainables(self.model, values)
        # SFTTrainer hangs its own fused head on the instance's forward; ours is in the class.
        native.__dict__.pop("forward", None)
        self.remove_callback(PrinterCallback)
        if world.layout == "fsdp2":  # after SFTTrainer, which casts weights in place, and before there is an optimizer
            shard(self.model, source, world)

    def _send_telemetry(self) -> None:
        """SFTTrainer reports each construction to its hub; a training run tells nobody anything."""

    # A step

    def get_train_dataloader(self) -> DataLoader[int]:
        """What Trainer goes through: the number of each step of an epoch, for a step deals its own rows.

        Trainer's own sampler draws its order from the global random state, which a resume cannot replay, and accelerate
        deals rows twice where they do not go round.
        """
        self._rows = self.step_rows()
        steps: Any = range(self._rows.steps_per_epoch)
        return DataLoader(steps, collate_fn=tuple)

    def step_rows(self) -> StepRows:
        """The rows of each step, and this rank's micro-batches of them."""
        examples, seed = self.data.train, self.args.seed
        return StepRows(
            len(examples), self.batch, seed=None if examples.streamed else seed, rank=self.world.rank,
            tokens=examples.lengths,
        )  # fmt: skip

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """A whole optimizer step, the update included: Trainer, whose accumulation is 1, then finds no gradients and
        changes nothing. Its own way averages over micro-batches and ranks, and hides what is not finite.
        """
        self.world.enter(f"step {self.state.global_step + 1}")
        self._step_started = time.perf_counter()
        self._parts = StepParts(
            step=self.state.global_step,
            model=model,
            optimizer=self.optimizer,
            objective=self.objective,
            reference=self.reference,
            examples=self.data.train,
            rows=self._rows,
            collate=self.data.collate,
            pad_id=self.processing_class.pad_token_id,
            world=self.world,
            device=self.args.device,
            autocast=self.autocast_context,
            seed=self.args.seed,
            max_grad_norm=self.args.max_grad_norm,
        )
        self._figures = optimizer_step(self._parts)
        self.skipped = 0 if self._figures.finite else self.skipped + 1
        return torch.tensor(self._figures.loss, device=self.args.device)

    @property
    def computing(self) -> bool:
        """Whether forward or backward of a step is under way, or broke off: no weight was changed by it."""
        return self._parts is not None and self._parts.computing

    def rows_of_last_step(self) -> list[int]:
        """The examples of all ranks in the step whose figures were told last."""
        return self._rows.rows_of_step(self.state.global_step - 1)

    def autocast_context(self) -> contextlib.AbstractContextManager[Any]:
        """What forward passes run in."""
        if self.options.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.args.device.type, dtype=self.options.autocast)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The learning rate as a pure function of the step (lr_schedule.py says why not the library's), from the step
        on that a run goes on with.
        """
        options, begun = self.options, self.progress.step
        warmup = round(options.warmup_ratio * num_training_steps)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer if optimizer is None else optimizer,
            lambda step: learning_rate_factor(
                begun + step, total_steps=num_training_steps, warmup_steps=warmup, schedule=options.schedule
            ),
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    # The end of a step

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Figures are handed on; a step that ends the run leaves a checkpoint of itself, whatever the intervals."""
        if self.stop_now():
            self.control.should_evaluate = False
        self._tell_figures()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.stop_now():
            self.control.should_training_stop = True
            if self.saved_step != self.state.global_step:
                self._save_checkpoint(self.model, None)

    def _tell_figures(self) -> None:
        if self._figures is None:  # the end of an epoch, which is told of its last step again
            return
        figures, self._figures = self._figures, None
        seconds, progress = time.perf_counter() - self._step_started, self.progress
        examples: Any = self.data.train
        progress.step, progress.tokens = self.state.global_step, progress.tokens + figures.tokens
        progress.seconds += seconds
        if examples.streamed:
            progress.extra["stream"] = examples.state(progress.step * self.batch.global_batch_size)
        if figures.finite:
            progress.last_loss = figures.loss
        self.listener.on_step(
            {
                "step": progress.step,
                "loss": figures.loss,
                "learning_rate": figures.learning_rate,
                "grad_norm": figures.grad_norm,
                "tokens": progress.tokens,
                "tokens_per_second": figures.tokens / seconds,
                **figures.shown,
            }
        )

    def stop_now(self) -> bool:
        """Whether any rank was asked to stop; all ranks call it at the same places, and then all stop."""
        self.stopped = self.stopped or self.world.any(self.stop.asked())
        return self.stopped

    # Evaluation

    def held_out_batches(self) -> Iterator[Batch]:
        """This rank's part of the held-out rows; none where there are no such rows."""
        data, world = self.data, self.world
        return held_out_batches(
            data.held_out or [], data.collate, self.processing_class.pad_token_id,
            size=self.args.per_device_eval_batch_size, rank=world.rank, ranks=world.size,
        )  # fmt: skip

    @property
    def held_out_count(self) -> int:
        """How many batches of held-out rows this rank has."""
        rows, size = len(self.data.held_out or []), self.args.per_device_eval_batch_size * self.world.size
        return -(-rows // size)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Loss per labelled token, every token weighing the same (Trainer averages over batches). What is trained
        afterwards does not depend on whether this was called.
        """
        step, best = self.state.global_step, False
        self.world.enter(f"evaluation after step {step}")
        score = held_out_score(self, self.stop_now)
        if not self.stopped:
            self.listener.on_eval(step, score)
            best = self._note_best(score.loss)
        metrics = {} if score.loss is None else {f"{metric_key_prefix}_loss": score.loss}
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.control.should_save |= best
        return metrics

    def _note_best(self, loss: float | None) -> bool:
        """Whether the best held-out loss so far is to be kept, which it then is in `progress` as well."""
        best = self.progress.extra.get("best")
        if not self.options.keep_best or loss is None or (best and loss >= best["loss"]):
            return False
        self.former_best = best
        self.progress.extra["best"] = {"step": self.state.global_step, "loss": loss}
        return True

    # Checkpoints

    def keep_step(self) -> None:
        """A checkpoint of the last whole step, where there is none yet."""
        if self.state.global_step and self.saved_step != self.state.global_step:
            self._save_checkpoint(self.model, None)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A checkpoint of this step (saving.py). A full disk costs the checkpoint, and the run only where it was to end
        here.
        """
        step, extra = self.state.global_step, self.progress.extra
        try:
            with self.world.phase(f"the save of step {step}"):
                commit_checkpoint(
                    Path(self.args.output_dir),
                    step,
                    model=self.model,
                    optimizer=self.optimizer,
                    world=self.world,
                    progress=vars(self.progress),
                    write_more=lambda folder: self.state.save_to_json(str(folder / TRAINER_STATE_NAME)),
                    keep=self.options.keep_checkpoints,
                )
        except UserError as error:
            if error.exit_code != DiskError.exit_code or self.stopped:
                raise
            if extra.get("best", {}).get("step") == step:  # it is not kept: the one before it stays
                extra["best"] = self.former_best or {}
            self.listener.on_fault(f"{error}; no checkpoint of step {step}, the next interval tries again")
            return
        self.saved_step = step

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The weights; `progress` was already taken from this checkpoint by whoever made the trainer."""
        load_weights(Path(resume_from_checkpoint), self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The optimizer's tensors; the schedule begins where the run goes on, and nothing random is kept (step.py)."""
        if checkpoint is None:
            return
        load_optimizer(Path(checkpoint), self.optimizer, self.model)
        # Trainer took the intervals of evaluation and saving from the checkpoint; the recipe decides.
        self.state.compute_steps(self.args, self.state.max_steps)


def _placeholder(examples: Any) -> datasets.Dataset:
    """What SFTTrainer is given, for it takes nothing but a `Dataset`: the first example."""
    return datasets.Dataset.from_list([dict(examples[0])])
