"""TRL's SFTTrainer, bent where Gemma, exactness and our files ask for it. The training loop is `SFTTrainer.train`,
unchanged.

What is overridden, and why, is said at each method; nothing of a library is patched.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase
from transformers.trainer import TRAINER_STATE_NAME, Trainer
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from gemma_ft.adapters.lora import restore_trainables, trainables_in_float32
from gemma_ft.checkpoint import checkpoint_folder, commit_folder, prune
from gemma_ft.evaluate.held_out import held_out_loss
from gemma_ft.train import state
from gemma_ft.train.schedule import learning_rate_factor


@dataclass
class Progress:
    """What a run has done so far, over all of its resumes; part of every checkpoint."""

    step: int = 0
    tokens: int = 0  # non-pad input tokens
    seconds: float = 0.0  # in optimizer steps; evaluation and saving are not counted
    last_loss: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # figures of the caller that a resumed run needs again


class SeededSampler(Sampler[int]):
    """All indices in an order that is a pure function of (seed, epoch), so that a resumed run sees the same rows."""

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed, self.epoch = length, seed, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        return iter(torch.randperm(self.length, generator=generator).tolist())


class GemmaTrainer(SFTTrainer):
    """Trains a model on examples that are already tokens, labels and document ids.

    `on_step(figures)` hears every optimizer step: step, loss, learning_rate, grad_norm, tokens, tokens_per_second.
    `on_eval(step, loss)` hears each in-training evaluation. Raises what `SFTTrainer.train` raises.
    """

    # The loss is divided by the labelled tokens of the whole optimizer step: Trainer must not divide it again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        args: SFTConfig,
        *,
        train_dataset: Dataset,
        eval_dataset: Dataset | None,
        collator: Callable[[Any], dict[str, Tensor]],
        tokenizer: PreTrainedTokenizerBase,
        schedule: Any,
        warmup_ratio: float,
        autocast: torch.dtype | None,
        keep_checkpoints: int,
        progress: Progress,
        on_step: Callable[[dict[str, Any]], None],
        on_eval: Callable[[int, float | None], None],
    ) -> None:
        self.schedule, self.warmup_ratio, self.autocast = schedule, warmup_ratio, autocast
        self.keep_checkpoints, self.progress = keep_checkpoints, progress
        self.on_step, self.on_eval = on_step, on_eval
        self._step_loss: Tensor | None = None
        self._step_tokens: Tensor | None = None
        self._step_started = 0.0
        values = trainables_in_float32(model)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=collator,
            processing_class=tokenizer,
        )
        restore_trainables(self.model, values)
        # SFTTrainer hangs its own fused head on the instance's forward; ours is in the class.
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        base.__dict__.pop("forward", None)
        self.remove_callback(PrinterCallback)

    # What SFTTrainer does unasked

    def _send_telemetry(self) -> None:
        """SFTTrainer reports each construction to its hub; a training run tells nobody anything."""

    # Data order and loss

    def _get_train_sampler(self, train_dataset: Any = None) -> SeededSampler:
        """Trainer's own sampler draws its order from the global random state, which a resume cannot replay."""
        self._sampler = SeededSampler(len(train_dataset or self.train_dataset), self.args.seed)
        return self._sampler

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        """On a resume Trainer takes the intervals of evaluation and saving from the checkpoint; the recipe decides."""
        result = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)
        return result

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> None:
        """Trainer tells the epoch to the data loader, but on a resume that loader is wrapped and the sampler never
        hears it.
        """
        self._sampler.epoch = epoch
        super()._run_epoch(*args, epoch=epoch, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The start of an optimizer step: its clock and its sums begin here."""
        self._step_started, self._step_loss, self._step_tokens = time.perf_counter(), None, None
        return super().get_batch_samples(*args, **kwargs)

    def compute_loss_context_manager(self) -> contextlib.AbstractContextManager[Any]:
        """bf16 autocast for full fine-tuning, whose weights are float32; a frozen base has its own dtype and needs
        none.
        """
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.args.device.type, dtype=self.autocast)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Summed loss of labelled tokens over the count of the whole optimizer step, from our fused head: the result
        does not depend on how the step is cut into micro-batches (SFTTrainer asks its own head, which ours replaces).
        """
        outputs = model(**inputs, use_cache=False, num_items_in_batch=num_items_in_batch)
        tokens = inputs["attention_mask"].sum()
        first = self._step_loss is None or self._step_tokens is None
        self._step_loss = outputs.loss.detach() if first else self._step_loss + outputs.loss.detach()
        self._step_tokens = tokens if first else self._step_tokens + tokens
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The learning rate as a pure function of the step (`schedule.py` says why not the library's)."""
        warmup = round(self.warmup_ratio * num_training_steps)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer if optimizer is None else optimizer,
            lambda step: learning_rate_factor(
                step, total_steps=num_training_steps, warmup_steps=warmup, schedule=self.schedule
            ),
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    # Figures

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """One call for each optimizer step (logging_steps is 1): hand its figures on, keep no history in memory."""
        Trainer.log(self, logs, start_time)
        self.state.log_history.clear()
        if "loss" not in logs or self._step_loss is None or self._step_tokens is None:
            return
        seconds, tokens = time.perf_counter() - self._step_started, int(self._step_tokens)
        progress = self.progress
        progress.step, progress.tokens = self.state.global_step, progress.tokens + tokens
        progress.seconds, progress.last_loss = progress.seconds + seconds, float(self._step_loss)
        self.on_step(
            {
                "step": progress.step,
                "loss": progress.last_loss,
                "learning_rate": logs["learning_rate"],
                "grad_norm": logs.get("grad_norm"),
                "tokens": progress.tokens,
                "tokens_per_second": tokens / seconds,
            }
        )

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Loss per labelled token, every token weighing the same (Trainer averages over batches). What is trained
        afterwards does not depend on whether this was called.
        """
        with state.randomness_kept():
            loss = held_out_loss(self.model, self.get_eval_dataloader(), autocast=self.compute_loss_context_manager)
            self.on_eval(self.state.global_step, loss)
        metrics = {} if loss is None else {f"{metric_key_prefix}_loss": loss}
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # Checkpoints: Trainer's are four pickles written in place; ours are safetensors and JSON that appear complete

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        root = Path(self.args.output_dir)

        def write(folder: Path) -> None:
            state.save_weights(folder, self.model)
            state.save_optimizer(folder, self.optimizer, self.model)
            state.save_randomness(folder)
            state.save_state(folder, vars(self.progress))
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

        commit_folder(checkpoint_folder(root, self.state.global_step), write)
        prune(root, self.keep_checkpoints)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        raise AssertionError("models are written by run.py, checkpoints by _save_checkpoint")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The weights; `progress` was already taken from this checkpoint by whoever made the trainer."""
        state.load_weights(Path(resume_from_checkpoint), self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state.load_optimizer(Path(checkpoint), self.optimizer, self.model)
        # The optimizer's own learning rates were set for step 0; the scheduler would correct them one step too late.
        scheduler = self.lr_scheduler
        scheduler.last_epoch = self.progress.step
        rates = [
            base * factor(self.progress.step)
            for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        scheduler._last_lr = rates
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state.load_randomness(Path(checkpoint))
