"""llama.cpp's logits and greedy answers, computed in a process of its own: a build that dies takes no test run with it.

    python llama_evaluate.py FILE.gguf FOLDER     # FOLDER: of an unpacked xllamacpp

stdin: {"logits": [{"ids": [...], "from": 0}, ...], "out": PATH, "greedy": [{"ids": [...], "tokens": 200, "stop": []}]}.
stdout: one JSON object
    shapes   of the logits of each text: [positions, tokens of the vocabulary]; they lie in the file PATH, one text
             behind the other, float32: those of every position from `from` on
    answers  the ids of each greedy continuation, without what ended it
    system   what the library says of the processor

The cache is float32 and attention is not fused, so that what differs from another implementation is arithmetic alone.
Parameters of a context are opaque as llama_child's are; the few that are set here are found by the places at which this
version has them, and by their defaults.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Iterator
from ctypes import POINTER, c_char_p, c_float, c_int8, c_int32, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

if __package__:
    from tests.real.llama_child import Parameters, library, quiet
else:
    sys.path.insert(0, str(Path(__file__).parent))
    from llama_child import Parameters, library, quiet  # type: ignore[import-not-found, no-redef]

# Places (of 4 bytes) and defaults in llama_context_params of xllamacpp 2026.10.11549.
CONTEXT, BATCH, MICRO_BATCH, THREADS, BATCH_THREADS, FUSED, KEYS, VALUES = 0, 1, 2, 7, 8, 13, 26, 27
DEFAULTS = {CONTEXT: 512, BATCH: 2048, MICRO_BATCH: 512, THREADS: 4, BATCH_THREADS: 4, FUSED: -1, KEYS: 1, VALUES: 1}
AT_ONCE = 512  # tokens


class Batch(ctypes.Structure):
    """llama_batch; null: positions go on from the last one, in one sequence."""

    _fields_ = (
        ("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", c_void_p), ("pos", c_void_p),
        ("n_seq_id", c_void_p), ("seq_id", c_void_p), ("logits", POINTER(c_int8)),
    )  # fmt: skip


class Context:
    """A model with a context for so many tokens."""

    def __init__(self, llama: Any, model: Any, tokens: int, threads: int) -> None:
        self.llama = llama
        self.vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        parameters = llama.llama_context_default_params()
        fields = (c_int32 * 64).from_buffer(parameters)
        assert {place: fields[place] for place in DEFAULTS} == DEFAULTS, "another struct"
        wanted = {CONTEXT: tokens, BATCH: AT_ONCE, MICRO_BATCH: AT_ONCE, THREADS: threads, BATCH_THREADS: threads}
        for place, value in {**wanted, FUSED: 0, KEYS: 0, VALUES: 0}.items():
            fields[place] = value
        self.context = llama.llama_init_from_model(model, parameters)
        assert self.context, "llama.cpp makes no context"

    def begin(self) -> None:
        """Forget what was read."""
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), True)

    def read(self, ids: list[int], first: int) -> Iterator[np.ndarray]:
        """Read ids; gives the logits [tokens of the vocabulary] behind each of them from the place `first` on."""
        for start in range(0, len(ids), AT_ONCE):
            part = ids[start : start + AT_ONCE]
            asked = [start + place >= first for place in range(len(part))]
            batch = Batch(len(part), (c_int32 * len(part))(*part), None, None, None, None, (c_int8 * len(part))(*asked))
            done = self.llama.llama_decode(self.context, batch)
            assert done == 0, done
            for place, wanted in enumerate(asked):
                if wanted:
                    row = self.llama.llama_get_logits_ith(self.context, place)
                    yield np.ctypeslib.as_array(row, (self.vocabulary,))

    def greedy(self, ids: list[int], tokens: int, stop: list[int]) -> list[int]:
        """The likeliest continuation, without what ended it."""
        self.begin()
        answer: list[int] = []
        unread = ids
        while len(answer) < tokens:
            (logits,) = self.read(unread, len(unread) - 1)
            token = int(logits.argmax())
            if token in stop:
                break
            answer.append(token)
            unread = [token]
        return answer


def main() -> None:
    """Command line: see the top of this file."""
    asked = json.load(sys.stdin)
    llama = library(sys.argv[2])
    for name, result, arguments in (
        ("llama_context_default_params", Parameters, []),
        ("llama_init_from_model", c_void_p, [c_void_p, Parameters]),
        ("llama_decode", c_int32, [c_void_p, Batch]),
        ("llama_get_logits_ith", POINTER(c_float), [c_void_p, c_int32]),
        ("llama_get_memory", c_void_p, [c_void_p]),
        ("llama_memory_clear", None, [c_void_p, ctypes.c_bool]),
        ("llama_print_system_info", c_char_p, []),
    ):
        function = getattr(llama, name)
        function.restype, function.argtypes = result, arguments
    kept = quiet(llama)
    model = llama.llama_model_load_from_file(sys.argv[1].encode(), llama.llama_model_default_params())
    if not model:
        raise SystemExit(f"{sys.argv[1]}: llama.cpp cannot load it")
    texts, chats = asked.get("logits", []), asked.get("greedy", [])
    longest = max([len(one["ids"]) for one in texts] + [len(one["ids"]) + one["tokens"] for one in chats])
    context = Context(llama, model, longest + 8, int(os.environ.get("OMP_NUM_THREADS", "2")))
    shapes = []
    if texts:
        with Path(asked["out"]).open("wb") as file:
            for one in texts:
                context.begin()
                for row in context.read(one["ids"], one["from"]):
                    file.write(row.tobytes())
                shapes.append([len(one["ids"]) - one["from"], context.vocabulary])
    answers = [context.greedy(one["ids"], one["tokens"], one.get("stop", [])) for one in chats]
    system = llama.llama_print_system_info().decode()
    json.dump({"shapes": shapes, "answers": answers, "system": system}, sys.stdout)
    del kept


if __name__ == "__main__":
    main()
