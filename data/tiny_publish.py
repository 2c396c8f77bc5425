"""Puts a finished pretraining run into data/gemma-tiny: bf16 weights, config.json, generation_config.json.

    python data/tiny_publish.py RUN FOLDER     # RUN/model and RUN/summary.json, as `gemma-ft train` leaves them

The run's held-out rows are the copying probe (tiny_corpus.py probe): below COPYING_FLOOR nothing is published.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

COPYING_FLOOR = 0.95
TERMINATORS = ("<eos>", "<end_of_turn>")


def copying_score(run: Path) -> float:
    """The run's exact match on the copying probe after training, from its summary.json."""
    return float(json.loads((run / "summary.json").read_text(encoding="utf-8"))["eval_after"]["exact_match"])


def write_json(value: dict, path: Path) -> None:
    """One JSON file, keys sorted, so that a remade one differs only where something changed."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def publish(run: Path, folder: Path) -> int:
    """The tiny Gemma's weights (bf16) and two config files in the folder, from RUN/model; returns the weights' bytes.

    Raises ValueError when the run copies too badly or its vocabulary is not the tokenizer's.
    """
    score = copying_score(run)
    if score < COPYING_FLOOR:
        raise ValueError(f"{run}: copies {score:.1%} of the probe, {COPYING_FLOOR:.0%} is due; train longer")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = json.loads((run / "model" / "config.json").read_text(encoding="utf-8"))
    if config["vocab_size"] != len(tokenizer):
        raise ValueError(f"{run}: a vocabulary of {config['vocab_size']}, but {folder} has {len(tokenizer)} tokens")
    config.pop("transformers_version", None)
    config.pop("_name_or_path", None)
    config["dtype"] = "bfloat16"
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted((run / "model").glob("*.safetensors")):
        tensors.update({name: tensor.to(torch.bfloat16).contiguous() for name, tensor in load_file(shard).items()})
    save_file(dict(sorted(tensors.items())), folder / "model.safetensors", metadata={"format": "pt"})
    write_json(config, folder / "config.json")
    stops = [tokenizer.convert_tokens_to_ids(name) for name in TERMINATORS]
    generation = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    write_json({**generation, "do_sample": False, "eos_token_id": stops}, folder / "generation_config.json")
    return (folder / "model.safetensors").stat().st_size


def main() -> None:
    """Command line: see the top of this file."""
    parser = argparse.ArgumentParser(description="Publish a pretraining run as the tiny Gemma.")
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    print(f"{options.folder}: {publish(options.run, options.folder):,} bytes of weights")


if __name__ == "__main__":
    main()
