"""TRL's SFTTrainer, bent where Gemma, exactness and our files ask for it. The training loop is `SFTTrainer.train`,
unchanged.

What is overridden, and why, is said at each method; nothing of a library is patched.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.trainer import Trainer
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from gemma_ft.adapters.lora import restore_trainables, trainables_in_float32
from gemma_ft.build.located import Source
from gemma_ft.data.encode.chat import IGNORE
from gemma_ft.data.pack.examples import Examples
from gemma_ft.data.pack.streamed import StreamedExamples
from gemma_ft.evaluate.held_out import held_out_loss
from gemma_ft.train.activation_checkpointing import Checkpointing
from gemma_ft.train.distributed import World
from gemma_ft.train.fsdp import reshard, shard, whole
from gemma_ft.train.lr_schedule import learning_rate_factor
from gemma_ft.train.sampler import DealtRows, placeholder
from gemma_ft.train.saving import OwnCheckpoints
from gemma_ft.train.signals import StopRequest


@dataclass
class Progress:
    """What a run has done so far, over all of its resumes; part of every checkpoint."""

    step: int = 0
    tokens: int = 0  # non-pad input tokens
    seconds: float = 0.0  # in optimizer steps; evaluation and saving are not counted
    last_loss: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # figures of the caller that a resumed run needs again


class GemmaTrainer(DealtRows, OwnCheckpoints, SFTTrainer):
    """Trains a model on examples that are already tokens, labels and document ids, on every rank of a world.

    `on_step(figures)` hears every optimizer step: step, loss, learning_rate, grad_norm, tokens, tokens_per_second.
    `on_eval(step, loss)` hears each in-training evaluation, `on_fault(line)` what went wrong and
    ends nothing. Raises what `SFTTrainer.train` raises.
    """

    # The loss is divided by the labelled tokens of the whole optimizer step: Trainer must not divide it again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        args: SFTConfig,
        *,
        world: World,
        stop: StopRequest,
        source: Source | None,
        train_examples: Examples | StreamedExamples,
        eval_examples: Examples | None,
        collator: Callable[[Any], dict[str, Tensor]],
        tokenizer: PreTrainedTokenizerBase,
        schedule: Any,
        warmup_ratio: float,
        autocast: torch.dtype | None,
        keep_checkpoints: int,
        keep_best: bool,
        progress: Progress,
        on_step: Callable[[dict[str, Any]], None],
        on_eval: Callable[[int, float | None], None],
        on_fault: Callable[[str], None],
    ) -> None:
        self.world, self.stop = world, stop
        self.train_examples, self.eval_examples = train_examples, eval_examples
        self.stopped = False  # all ranks agreed to stop
        self.skipped = 0  # updates left out in a row, for they were not finite
        self.computing = False  # forward and backward, in which no weight changes
        self.saved_step = -1
        self.checkpointing: Checkpointing | None = None  # the plan, where the caller has one
        self.former_best: dict[str, Any] | None = None
        self.schedule, self.warmup_ratio, self.autocast = schedule, warmup_ratio, autocast
        self.keep_checkpoints, self.keep_best, self.progress = keep_checkpoints, keep_best, progress
        self.on_step, self.on_eval, self.on_fault = on_step, on_eval, on_fault
        self._step_loss: Tensor | None = None
        self._step_tokens: Tensor | None = None
        self._step_started = 0.0
        self._micro = 0
        tuned = hasattr(model, "get_base_model")
        native = model.get_base_model() if tuned else model
        values = trainables_in_float32(model) if tuned else {}  # a whole model is not cast by SFTTrainer
        # Trainer's own word for a model that is cut already: it wraps and moves nothing of it.
        native._is_distributed_loading_by_transformers = world.layout == "fsdp2"
        super().__init__(
            model=model,
            args=args,
            train_dataset=placeholder(train_examples),
            eval_dataset=placeholder(eval_examples) if eval_examples is not None else None,
            data_collator=collator,
            processing_class=tokenizer,
        )
        if tuned:
            restore_trainables(self.model, values)
        # SFTTrainer hangs its own fused head on the instance's forward; ours is in the class.
        native.__dict__.pop("forward", None)
        self.remove_callback(PrinterCallback)
        if world.layout == "fsdp2":  # after SFTTrainer, which casts weights in place, and before there is an optimizer
            shard(self.model, source, world)

    # What SFTTrainer does unasked

    def _send_telemetry(self) -> None:
        """SFTTrainer reports each construction to its hub; a training run tells nobody anything."""

    # Data order and loss

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
        self._micro = 0
        self.world.enter(f"step {self.state.global_step + 1}")
        return super().get_batch_samples(*args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """What the loss of a step is divided by: its labelled tokens on all ranks; where rows have weights, the sum of
        those, so that a row of weight 2 is the same as the row twice.
        """
        if not self.train_examples.weighted:
            return super()._get_num_items_in_batch(batch_samples, device)
        own = 0.0
        for batch in batch_samples:
            if "loss_weights" in batch:  # not a blank row
                own += float(batch["loss_weights"][batch["labels"] != IGNORE].double().sum())
        return torch.tensor(self.world.sum([own])[0], dtype=torch.float64, device=device)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """What dropout draws is a function of the seed, the step and the micro-batch, as one rank counts them: the same
        after a resume, and on any number of ranks.
        """
        micro = self._micro * self.world.size + self.world.rank
        self._micro += 1
        torch.manual_seed(_mixed(self.args.seed, self.state.global_step, micro))
        self.computing = True
        loss = super().training_step(*args, **kwargs)
        self.computing = False
        return loss

    def _defer_fsdp_gradient_reduction(self) -> contextlib.AbstractContextManager[None]:
        """Between the micro-batches of a step: an adapter's gradients are small and are summed once, at its end; those
        of a whole model are cut at once, or they would take as much memory as the model.
        """
        return _unreduced(self.model) if hasattr(self.model, "get_base_model") else contextlib.nullcontext()

    def _clip_grad_norm(self, model: Any) -> Any:
        return whole(super()._clip_grad_norm(model))

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The norm; where it or the loss is not finite, there are no gradients any more when this returns, and the
        optimizer changes nothing.
        """
        norm = float(whole(super()._get_grad_norm(model, grad_norm=grad_norm)))
        loss = 0.0 if self._step_loss is None else float(self._step_loss)
        if self.world.any(not (math.isfinite(norm) and math.isfinite(loss))):
            self.skipped += 1
            for parameter in self.model.parameters():
                parameter.grad = None
        else:
            self.skipped = 0
        return norm

    def rows_of_last_step(self) -> list[int]:
        """The examples of all ranks in the step whose figures were logged last."""
        per_epoch = math.ceil(self._sampler.length / self._sampler.step_rows)
        return self._sampler.rows_of_step((self.state.global_step - 1) % per_epoch)

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
        tokens = (inputs["document_ids"] >= 0).sum()  # neither padding nor blank rows
        first = self._step_loss is None or self._step_tokens is None
        self._step_loss = outputs.loss.detach() if first else self._step_loss + outputs.loss.detach()
        self._step_tokens = tokens if first else self._step_tokens + tokens
        loss = outputs.loss * self.world.size  # gradients are averaged over ranks, and are to be summed
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """An evaluation before training leaves a sharded model's root whole: the optimizer is of its slices."""
        reshard(self.model)
        return super().create_optimizer(*args, **kwargs)

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
        seconds = time.perf_counter() - self._step_started
        loss, counted = self.world.sum([float(self._step_loss), float(self._step_tokens)])
        progress, tokens = self.progress, round(counted)
        progress.step, progress.tokens = self.state.global_step, progress.tokens + tokens
        progress.seconds += seconds
        if self.train_examples.streamed:
            progress.extra["stream"] = self.train_examples.state(progress.step * self._sampler.step_rows)
        if not self.skipped:
            progress.last_loss = loss
        self.on_step(
            {
                "step": progress.step,
                "loss": loss,
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
        self.world.enter(f"evaluation after step {self.state.global_step}")
        best = False
        loss = held_out_loss(
            self.model,
            self.get_eval_dataloader(),
            autocast=self.compute_loss_context_manager,
            sum_over_ranks=self.world.sum,
            stop=self.stop_now,
        )
        if not self.stopped:
            self.on_eval(self.state.global_step, loss)
            best = self._note_best(loss)
        metrics = {} if loss is None else {f"{metric_key_prefix}_loss": loss}
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.control.should_save |= best
        return metrics

    def _note_best(self, loss: float | None) -> bool:
        """Whether the best held-out loss so far is to be kept, which it then is in `progress` as well."""
        best = self.progress.extra.get("best")
        if not self.keep_best or loss is None or (best and loss >= best["loss"]):
            return False
        self.former_best = best
        self.progress.extra["best"] = {"step": self.state.global_step, "loss": loss}
        return True

    # Stopping

    def stop_now(self) -> bool:
        """Whether any rank was asked to stop; all ranks call it at the same places, and then all stop."""
        self.stopped = self.stopped or self.world.any(self.stop.asked())
        return self.stopped

    def keep_step(self) -> None:
        """A checkpoint of the last whole step, where there is none yet."""
        if self.state.global_step and self.saved_step != self.state.global_step:
            self._save_checkpoint(self.model, None)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """The end of a step: one that ends the run leaves a checkpoint of itself, whatever the intervals."""
        if self.stop_now():
            self.control.should_evaluate = False
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.stop_now():
            self.control.should_training_stop = True
            if self.saved_step != self.state.global_step:
                self._save_checkpoint(self.model, None)


@contextlib.contextmanager
def _unreduced(model: Any) -> Iterator[None]:
    """Gradients of an FSDP model stay whole on each rank while this is open."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def _mixed(*numbers: int) -> int:
    """One seed out of several numbers, unlike that of any numbers near them."""
    digest = hashlib.blake2b(":".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % 2**63
