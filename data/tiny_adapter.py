"""Puts a finished run's adapter into data/scheduling-adapter, where it names its base as it ships: data/gemma-tiny.

    python data/tiny_adapter.py RUN FOLDER     # RUN/adapter, as `gemma-ft train` leaves it

The tokenizer is left out: it is the base's own.
"""

import argparse
import json
import shutil
from pathlib import Path

BASE = "data/gemma-tiny"  # found from any folder: gemma_ft/system/shipped.py
WEIGHTS = "adapter_model.safetensors"
NAMES_BASE = {"adapter_config.json": "base_model_name_or_path", "gemma_ft.json": "base"}


def publish(run: Path, folder: Path) -> int:
    """Weights and the two files that name the base in the folder, from RUN/adapter; returns their bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run / "adapter" / WEIGHTS, folder / WEIGHTS)
    for name, key in NAMES_BASE.items():
        fields = json.loads((run / "adapter" / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps({**fields, key: BASE}, indent=2) + "\n", encoding="utf-8")
    return sum(path.stat().st_size for path in folder.iterdir())


def main() -> None:
    """Command line: see the top of this file."""
    parser = argparse.ArgumentParser(description="Publish a run's adapter as the start of preference runs.")
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    print(f"{options.folder}: {publish(options.run, options.folder):,} bytes")


if __name__ == "__main__":
    main()
