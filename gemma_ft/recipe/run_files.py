"""What lies where in the directory of a run; the one home of these names."""

from __future__ import annotations

from pathlib import Path

FACTS = "merge.json"  # of a merge: in the folder that was made, and in the run that it was made of


class RunFiles:
    """Paths of one run under `root`. Nothing is read or written here."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.recipe = root / "recipe.yaml"
        self.metrics = root / "metrics.jsonl"  # a line for each optimizer step
        self.evals = root / "evals.jsonl"  # a line for each in-training evaluation
        self.samples = root / "samples.jsonl"  # a line for each answer that was sampled on the way
        self.bad_rows = root / "bad_rows.jsonl"  # what was left out (data.on_bad_row: skip)
        self.checkpoints = root / "checkpoints"
        self.adapter = root / "adapter"
        self.model = root / "model"
        self.summary = root / "summary.json"
        self.report = root / "report.html"
        self.eval_results = root / "eval.json"  # of `gemma-ft eval`
        self.certificate = root / FACTS

    @property
    def folders(self) -> tuple[Path, ...]:
        """What a run and its loggers keep as folders of their own."""
        return (self.adapter, self.model, self.checkpoints, self.root / "tensorboard", self.root / "wandb")
