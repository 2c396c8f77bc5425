"""What the parts of benchmarks/gpu.py share: the device, shapes that shrink in a dry run, memory, what failed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

MODELS = ("gemma-2b", "gemma-2-2b", "gemma-2-9b")


@dataclass(frozen=True)
class Setup:
    """`dry`: tiny shapes on the CPU, to know that the code works. `pythons`: the interpreter of an arm, where it needs
    an environment of its own.
    """

    dry: bool = False
    pythons: dict[str, Path] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def models(self) -> tuple[str, ...]:
        return MODELS[1:2] if self.dry else MODELS

    @property
    def tries(self) -> int:
        return 1 if self.dry else 30

    def small(self, size: int, tiny: int) -> int:
        return tiny if self.dry else size

    def reset_peak(self) -> int:
        """Bytes in use; the peak is counted from here."""
        if self.dry:
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        return 0 if self.dry else torch.cuda.max_memory_allocated()

    def attempt(self, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What an arm gives, or why it gives nothing; in a dry run only for a refusal, or for what a CPU lacks."""
        from gemma_ft.errors import UserError

        try:
            return run()
        except (UserError, NotImplementedError) as error:
            return {"skipped": str(error)}
        except Exception as error:  # one arm that fails must not cost the others' measurements
            if self.dry:
                raise
            torch.cuda.empty_cache()
            return {"skipped": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]}
