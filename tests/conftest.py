"""Settings of the whole suite: no network, quiet libraries."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

# Before any library reads them: nothing in the suite may ask the hub.
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", WANDB_SILENT="true")
if not os.path.exists("/dev/nvidia0"):  # kernels for GPUs are interpreted
    os.environ["TRITON_INTERPRET"] = "1"
if "GEMMA_FT_CACHE" not in os.environ:  # the workers have it from the process that starts them
    os.environ["GEMMA_FT_CACHE"] = tempfile.mkdtemp(prefix="gemma-ft-tests-")
    atexit.register(shutil.rmtree, os.environ["GEMMA_FT_CACHE"], ignore_errors=True)
