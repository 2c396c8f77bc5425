"""Settings of the whole suite: no network, quiet libraries; and a run that was really made, for who reads its files."""

from __future__ import annotations

import atexit
import fcntl
import gc
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

# Before any library reads them: nothing in the suite may ask the hub.
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", WANDB_SILENT="true")
if not os.path.exists("/dev/nvidia0"):  # kernels for GPUs are interpreted
    os.environ["TRITON_INTERPRET"] = "1"
if "GEMMA_FT_CACHE" not in os.environ:  # the workers have it from the process that starts them
    os.environ["GEMMA_FT_CACHE"] = tempfile.mkdtemp(prefix="gemma-ft-tests-")
    atexit.register(shutil.rmtree, os.environ["GEMMA_FT_CACHE"], ignore_errors=True)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """What libraries and tests are made of stays: no pass of the collector meets it while it is made nor later, as in a
    process that `gemma-ft` began (cli/start.py). They were a quarter of the suite's CPU time.
    """
    gc.disable()
    found = yield
    gc.freeze()
    gc.enable()
    return found


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps as the verbs leave it: trained (LoRA over the tiny Gemma), evaluated, merged to `merged/`.

    Tests of what reads the files of a run take a copy of these, so that no reader is shown a shape that nothing writes.
    """
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared  # the workers' own
    run, done = shared / "finished" / "run", shared / "finished" / "done"
    run.parent.mkdir(exist_ok=True)
    with (shared / "finished.lock").open("w") as lock:  # made by the worker that is first
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(run, ignore_errors=True)  # what a worker left half made
            _run_verbs(run)
            done.touch()
    return run


def _run_verbs(run: Path) -> None:
    from gemma_ft.cli.app import main

    root = Path(__file__).resolve().parents[1]
    canary = run.parent / "canary.jsonl"
    canary.write_text("".join((root / "data" / "canary.jsonl").read_text().splitlines(keepends=True)[:3]))
    overrides = [
        f"output_dir={run}", "strategy=lora", "train.max_steps=2", "data.train=data/scheduling_eval.jsonl",
        "eval.overlap=allow", "data.max_seq_len=100", "data.packing=false", "adapter.rank=2", "eval.every_steps=1",
        "eval.max_rows=3", "eval.generate_rows=2", "eval.max_new_tokens=8", "eval.samples=2",
        f"eval.canary={canary}",
    ]  # fmt: skip
    for words in (
        ["train", "sft_tiny", *overrides],
        ["eval", str(run)],
        ["merge", str(run), "--out", str(run / "merged"), "--prompts", "2"],
    ):
        assert main(words) == 0, words
