"""A recipe in TRL's words: steps and trainer settings."""

from __future__ import annotations

import math
from pathlib import Path

from trl import SFTConfig

from gemma_ft.data.pack.examples import steps_per_epoch
from gemma_ft.recipe.batch_plan import accumulation, micro_batch
from gemma_ft.recipe.schema import Recipe
from gemma_ft.system import hardware
from gemma_ft.train.distributed import World


def total_steps(recipe: Recipe, examples: int) -> int:
    """Optimizer steps of a run over so many examples."""
    per_epoch = steps_per_epoch(examples, recipe.train.global_batch_size)
    return recipe.train.max_steps or math.ceil(recipe.train.epochs * per_epoch)


def training_arguments(recipe: Recipe, checkpoints: Path, total: int, world: World, *, evaluates: bool) -> SFTConfig:
    """A recipe as TRL's settings; whatever a library would do on its own (reports, progress bars, datasets) is switched
    off.
    """
    train = recipe.train
    evals = recipe.eval.every_steps if evaluates else None
    arguments = SFTConfig(
        output_dir=str(checkpoints),
        seed=recipe.seed,
        max_steps=total,
        per_device_train_batch_size=micro_batch(recipe, world.size),
        per_device_eval_batch_size=recipe.eval.batch_size,
        gradient_accumulation_steps=accumulation(recipe, world.size),
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim="adamw_torch_fused",
        bf16=False,
        gradient_checkpointing=False,  # Trainer knows all layers or none; train.checkpointing takes some
        logging_steps=1,
        logging_nan_inf_filter=False,
        ddp_find_unused_parameters=False,  # every trained weight is used in every step
        ddp_broadcast_buffers=False,  # there are none
        save_only_model=world.layout == "fsdp2",  # Trainer refuses to resume what was cut beforehand; our saves do
        save_strategy="steps",
        save_steps=recipe.checkpoint.every_steps or total,
        eval_strategy="steps" if evals else "no",
        eval_steps=evals,
        prediction_loss_only=True,
        use_cache=True,  # Trainer writes it into the model's config, and the saved model would generate without a cache
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        packing=False,
        padding_free=False,
        max_length=None,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        use_cpu=hardware.default_device().type == "cpu",
    )
    # Trainer would spread a model over every visible GPU with nn.DataParallel, which TRL refuses: one device is used.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments
