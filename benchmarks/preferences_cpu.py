"""Steps of preferences on the CPU, side by side: ours, and TRL's DPOTrainer at its best, with the same kind of reference;
and beside our own step of supervised fine-tuning on the same answers.

    .venv/bin/python -m benchmarks.preferences_cpu                to benchmarks/results/preferences_cpu.json
    .venv/bin/python -m benchmarks.preferences_cpu --rest 60      with so many seconds between the arms

The model, adapter, optimizer and clipping are those of train_cpu.py, and so is the way of measuring: an arm is a process
of its own, arms take turns, and a ratio is the median over the turns. A step is one pair: a prompt with two answers
(kto: two answers, to one prompt or to two).
A reference is live (the adapter switched off), or its log-probabilities were computed before, which is not timed.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.plan import memory, own_memory
from benchmarks.shared.hundred_million import RANK, SHAPE, VOCABULARY, tokenizer, write_base
from benchmarks.shared.our_trainer import trainer_of
from benchmarks.shared.record import write_result
from benchmarks.shared.turns import QUICK, order, paired
from benchmarks.train_cpu import WARM, our_model, trained
from gemma_ft.system import hardware

PROMPT, CHOSEN, REJECTED = 512, 512, 448  # tokens: sequences of 1,024 and 960
STEPS, TURNS = 3, 2
BETA = 0.1


@dataclass(frozen=True)
class Arm:
    """`kind`: of our objective, or None for TRL's DPO."""

    kind: str | None
    precomputed: bool = False
    apart: bool = False  # the second answer is to another prompt than the first
    attention: str = "eager"  # of theirs; sdpa leaves Gemma 2's cap out, and so has another loss
    steps: int = STEPS


ARMS = {
    "ours": Arm("dpo", steps=5),
    "ours, precomputed": Arm("dpo", precomputed=True, steps=5),
    "sft": Arm("sft", steps=5),
    "kto": Arm("kto", steps=5),
    "kto, two prompts": Arm("kto", apart=True, steps=5),
    "trl": Arm(None),
    "trl, precomputed": Arm(None, precomputed=True),
    "trl, sdpa": Arm(None, attention="sdpa"),
}
RATIOS = {  # how many times as fast the first is as the second
    "dpo over trl": ("ours", "trl"),
    "dpo over trl, precomputed": ("ours, precomputed", "trl, precomputed"),
    "dpo over trl, sdpa": ("ours", "trl, sdpa"),
}
TIMES = {  # how many times as long the first takes as the second
    "dpo of sft": ("ours", "sft"),
    "dpo of sft, precomputed": ("ours, precomputed", "sft"),
    "kto of dpo, per answer": ("kto", "ours"),
    "kto of dpo, per answer, two prompts": ("kto, two prompts", "ours"),
}


def pairs() -> Iterator[dict[str, list[int]]]:
    """The pair of each step, the same for every arm: ids of a prompt and of two answers to it."""
    draw = torch.Generator().manual_seed(1)
    while True:
        sizes = {"prompt_ids": PROMPT, "chosen_ids": CHOSEN, "rejected_ids": REJECTED}
        yield {
            name: torch.randint(4, VOCABULARY, (size,), generator=draw).tolist() for name, size in sizes.items()
        }  # fmt: skip


def our_rows(kind: str, steps: int, *, apart: bool) -> list[dict[str, list[Any]]]:
    """As our trainer takes them: of dpo one row each, of sft and kto the two answers by themselves; `apart`: not to the
    same prompt.
    """
    found = []
    for _, pair in zip(range(steps), pairs(), strict=False):
        answers = [_answer(pair["prompt_ids"], pair[side]) for side in ("chosen_ids", "rejected_ids")]
        if apart:
            answers[1]["input_ids"][:PROMPT] = pair["prompt_ids"][::-1]
        for side, one in enumerate(answers):
            one["sides"], one["row_weights"], one["margins"] = [1 - side], [1.0], [0.0]
        if kind == "dpo":
            both = {name: answers[0][name] + answers[1][name] for name in answers[0]}
            both["document_ids"] = [side for side in (0, 1) for _ in answers[side]["input_ids"]]
            found.append({**both, "row_weights": [1.0], "margins": [0.0]})
        else:
            found += answers
    return found


def _answer(prompt: list[int], answer: list[int]) -> dict[str, list[Any]]:
    size = len(prompt) + len(answer)
    labels = [-100] * len(prompt) + answer
    columns = {"input_ids": prompt + answer, "labels": labels, "position_ids": list(range(size))}
    return {**columns, "document_ids": [0] * size}


def arguments(config: Any, folder: Path, arm: Arm, **changes: Any) -> Any:
    """What all arms share of TRL's settings."""
    rows = 2 if arm.kind in ("sft", "kto") else 1
    return config(
        output_dir=str(folder / "out"), seed=0, max_steps=arm.steps, per_device_train_batch_size=rows,
        learning_rate=1e-4, lr_scheduler_type="constant", max_grad_norm=1.0, optim="adamw_torch_fused",
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, log_level="error", use_cpu=True,
        remove_unused_columns=False, gradient_checkpointing=False, max_length=None, **changes,
    )  # fmt: skip


def our_trainer(folder: Path, arm: Arm) -> Any:
    from trl import SFTConfig

    assert arm.kind is not None
    quiet = {"bf16": False, "ddp_find_unused_parameters": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    settings = arguments(SFTConfig, folder, arm, **quiet)
    settings._n_gpu = 0
    reference = "none" if arm.kind == "sft" else "precomputed" if arm.precomputed else "adapter_off"
    rows = our_rows(arm.kind, arm.steps, apart=arm.apart)
    model = our_model(folder)
    if arm.precomputed:
        _precompute(model, rows)
    return trainer_of(model, settings, rows, kind=arm.kind, reference=reference)


def _precompute(model: Any, rows: list[dict[str, list[Any]]]) -> None:
    from gemma_ft.adapters.lora import adapter_off
    from gemma_ft.data.pack.collate_preferences import PreferenceCollator
    from gemma_ft.train.reference import answer_logprobs

    with adapter_off(model.train()):
        for row in rows:
            row["reference_logprobs"] = answer_logprobs(model, PreferenceCollator(0)([row])).tolist()


def trl_trainer(folder: Path, arm: Arm) -> Any:
    """TRL's DPOTrainer around a base and a fresh adapter, so that its reference is the base; the adapter then gets the
    weights that all arms begin with.
    """
    import datasets
    from peft import PeftConfig, load_peft_weights, set_peft_model_state_dict
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    class OfIds(DPOTrainer):
        """Of rows that are tokens already, in their order."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    rows = [pair for _, pair in zip(range(arm.steps), pairs(), strict=False)]
    base = AutoModelForCausalLM.from_pretrained(
        str(folder / "base"), dtype=torch.bfloat16, attn_implementation=arm.attention
    )
    adapter = PeftConfig.from_pretrained(str(folder / "adapter"))
    adapter.inference_mode = False
    settings = arguments(DPOConfig, folder, arm, beta=BETA, precompute_ref_log_probs=arm.precomputed)
    trainer = OfIds(
        model=base, args=settings, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer(),
        peft_config=adapter,
    )  # fmt: skip
    set_peft_model_state_dict(trainer.model, load_peft_weights(str(folder / "adapter")))
    return trainer


def one_arm(name: str, folder: Path) -> None:
    """Train and print seconds of each step, losses and memory above what the model takes: that of a reference that was
    computed before is not counted.
    """
    arm = ARMS[name]
    trainer = our_trainer(folder, arm) if arm.kind else trl_trainer(folder, arm)
    own_memory(trainer.model)
    hardware.give_memory_back()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    found = trained(trainer, arm.steps)
    print(json.dumps(found | {"above_the_model": memory("VmHWM") - before}))


def measured(turns: int, rest: float) -> dict[str, Any]:
    """All arms in turns."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ARMS}
    with tempfile.TemporaryDirectory() as place:
        write_base(Path(place))
        for name in order(list(ARMS), turns):
            time.sleep(rest)
            told = subprocess.run([sys.executable, "-m", "benchmarks.preferences_cpu", name, place],
                                  check=True, capture_output=True, text=True)  # fmt: skip
            found[name].append(json.loads(told.stdout.splitlines()[-1]))
            print(name, found[name][-1], flush=True)
    seconds = {name: [statistics.median(one["seconds"]) for one in ones] for name, ones in found.items()}
    memory = {name: round(min(one["above_the_model"] for one in ones) / 2**20) for name, ones in found.items()}
    return {
        "pairs_per_second": {name: round(1 / statistics.median(ones), 3) for name, ones in seconds.items()},
        "ours_over": {name: paired(seconds[theirs], seconds[ours]) for name, (ours, theirs) in RATIOS.items()},
        "times_as_long": {name: paired(seconds[one], seconds[other]) for name, (one, other) in TIMES.items()},
        "above_the_model_mib": memory,
        "memory_of_theirs": {
            name: round(memory[ours] / memory[theirs], 3) for name, (ours, theirs) in RATIOS.items()
        },
        "losses": {name: ones[0]["losses"] for name, ones in found.items()},
    }  # fmt: skip


def main(turns: int = TURNS, rest: float = 0) -> None:
    """All arms and the result file."""
    found = measured(turns, rest)
    tokens = {"prompt": PROMPT, "chosen": CHOSEN, "rejected": REJECTED}
    write_result("preferences_cpu", also=("peft", "trl"), command="python -m benchmarks.preferences_cpu", shape=SHAPE,
                 rank=RANK, tokens=tokens, threads=torch.get_num_threads(), turns=turns,
                 steps={name: arm.steps - WARM for name, arm in ARMS.items()}, **found)  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] in ARMS:
        one_arm(sys.argv[1], Path(sys.argv[2]))
    else:
        rest = float(sys.argv[sys.argv.index("--rest") + 1]) if "--rest" in sys.argv else 0
        main(1 if QUICK in sys.argv else TURNS, rest)
