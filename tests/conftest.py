"""Settings of the whole suite: no network, quiet libraries."""

from __future__ import annotations

import os

# Before any library reads them: nothing in the suite may ask the hub.
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", WANDB_SILENT="true")
