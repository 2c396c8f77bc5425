"""Part of benchmarks/gpu.py: answers of one sequence, against the rate at which the weights can be read."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch

from benchmarks import gpu_models
from benchmarks.decode_cpu import by_engine, by_generate, engine_for, equal_tokens
from benchmarks.gpu_setup import Setup
from benchmarks.shared.limits import read_rate
from benchmarks.shared.turns import in_turns, paired


def decode(setup: Setup, model: str, kind: str) -> dict[str, Any]:
    """Tokens per second after a prompt of 512, ours and transformers' `generate`; and the limit of the memory."""
    prompt, new, turns = setup.small(512, 20), setup.small(128, 4), setup.small(4, 1)
    config = gpu_models.config_of(model, dry=setup.dry)
    made = {
        native: gpu_models.base(config, native=native, device=setup.device, attention=None if native else "eager",
                                quantize=kind == "nf4").eval()
        for native in (True, False)
    }  # fmt: skip
    asked = torch.randint(4, config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(1)).tolist()
    engine = engine_for(made[True], asked, new)
    arms: dict[str, Any] = {
        "ours": partial(by_engine, made[True], engine=engine),  # which records its steps once, as that of a server
        "stock": partial(by_generate, made[False]),
        "stock_static": partial(by_generate, made[False], cache_implementation="static"),
    }
    skipped = {}
    for name, run in list(arms.items()):  # warm-up, compiling included
        told = setup.attempt(lambda run=run: {"answered": run(asked, new)})
        if "skipped" in told:
            skipped[name] = told
            del arms[name]
    found = in_turns({name: lambda run=run: run(asked, new) for name, run in arms.items()}, turns)
    rates = {name: [one.rate for one in ones] for name, ones in found.items()}
    weights = gpu_models.stored_bytes(made[True])
    limit = read_rate(setup.device, setup.small(2**32, 2**16), setup.tries) / weights
    return {
        "weight_gib": weights / 2**30,
        "unrecorded": engine.unrecorded,  # why there is no CUDA graph, where there is none
        "limit_tokens_per_second": round(limit, 1),
        "arms": {
            name: {
                "tokens_per_second": round(statistics.median(ones), 1),
                "of_the_limit": round(statistics.median(ones) / limit, 3),
                "first_token_seconds": round(statistics.median(one.first for one in found[name]), 4),
                "ours_over": paired(rates["ours"], ones),
                "tokens_equal_to_ours": equal_tokens(found[name][0].ids, found["ours"][0].ids),
            }
            for name, ones in rates.items()
        }
        | skipped,
    }
