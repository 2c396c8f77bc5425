"""Checkpoints in place of Trainer's: four pickles written in place become safetensors and JSON that appear complete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from gemma_ft.errors import DiskError, UserError
from gemma_ft.system.files import commit_folder
from gemma_ft.train import checkpoint_state
from gemma_ft.train.checkpoints import checkpoint_folder, prune


class OwnCheckpoints:
    """What a Trainer writes and reads on its way. Mixed into GemmaTrainer, whose attributes it uses."""

    args: Any
    state: Any
    model: Any
    optimizer: Any
    lr_scheduler: Any
    world: Any
    progress: Any
    on_fault: Any
    stopped: bool
    keep_checkpoints: int
    saved_step: int
    former_best: Any

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A checkpoint of this step. A full disk costs the checkpoint, and the run only where it was to end here."""
        step = self.state.global_step
        try:
            with self.world.phase(f"the save of step {step}"):
                self._commit(step)
        except UserError as error:
            if error.exit_code != DiskError.exit_code or self.stopped:
                raise
            if self.progress.extra.get("best", {}).get("step") == step:  # it is not kept: the one before it stays
                self.progress.extra["best"] = self.former_best or {}
            self.on_fault(f"{error}; no checkpoint of step {step}, the next interval tries again")
            return
        self.saved_step = step

    def _commit(self, step: int) -> None:
        """Every rank takes part in what is gathered, also when the one that writes cannot begin to."""
        root, begun = Path(self.args.output_dir), False

        def write(folder: Path | None) -> None:
            nonlocal begun
            begun = True
            checkpoint_state.save_weights(folder, self.model, self.world)
            checkpoint_state.save_optimizer(folder, self.optimizer, self.model, self.world)
            if folder is not None:
                checkpoint_state.save_state(folder, vars(self.progress))
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

        if not self.world.main:
            write(None)
            return
        try:
            commit_folder(checkpoint_folder(root, step), write, bytes_needed=checkpoint_state.bytes_of(self.model))
            prune(root, self.keep_checkpoints, spare=self.progress.extra.get("best", {}).get("step"))
        except Exception:
            if not begun:
                write(None)
            raise

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        raise AssertionError("models are written by artefacts.py, checkpoints by _save_checkpoint")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The weights; `progress` was already taken from this checkpoint by whoever made the trainer."""
        checkpoint_state.load_weights(Path(resume_from_checkpoint), self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        checkpoint_state.load_optimizer(Path(checkpoint), self.optimizer, self.model)
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
        """There is none: see `training_step`."""
