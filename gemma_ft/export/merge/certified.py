"""`gemma-ft merge`: an adapter into its base, as a folder with a certificate; a run keeps a copy of what it says."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from gemma_ft.build.place import place_of
from gemma_ft.export.merge.certificate import certify
from gemma_ft.export.merge.merge import MergeFacts, merge_to_folder
from gemma_ft.export.merge.merged import Policy
from gemma_ft.system.files import as_json, replace_text
from gemma_ft.system.observer import SILENT, Observer, callbacks

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


def merge_model(
    model: str,
    out: Path,
    *,
    adapters: Sequence[tuple[Path, float]] = (),
    dtype: str | None = None,
    policy: Policy = "original",
    graft: bool = False,
    prompts: int,
    observer: Observer = SILENT,
) -> MergeFacts:
    """Merge as `merge_to_folder` does, with a certificate over `prompts` held-out rows (0: without one). A run whose
    own adapter is merged keeps a copy of merge.json.

    Raises: UserError and its children, among them BeyondLimit with the certificate that did not pass.
    """
    place = place_of(model)
    with callbacks(observer) as on_progress:
        facts = merge_to_folder(
            place,
            out,
            adapters=adapters,
            dtype=DTYPES[dtype] if dtype is not None else None,
            policy=policy,
            graft=graft,
            certify=partial(certify, prompts=prompts, on_progress=on_progress("compare")) if prompts else None,
            on_progress=on_progress("merge"),
        )
    if not adapters and place.run is not None:
        with contextlib.suppress(OSError):  # a run that cannot be written to any more: the folder has it
            replace_text(place.run.certificate, as_json(facts.said()))
    return facts
