"""llama.cpp's ids of texts, asked in a process of its own: a build that dies takes no test run with it.

    python llama_child.py FILE.gguf [FOLDER]     # FOLDER: of an unpacked xllamacpp; else the installed one

stdin: {"texts": [...], "special": false, "bos": false}. stdout: one JSON object
    ids      of each text; `special`: control tokens are found in it, `bos`: the file's BOS is put before it
    decoded  of those ids, control tokens left out
    ends     every token that ends an answer: id -> text
    add_bos, bos, eos, eot     as the file says

The library's C interface is called, which xllamacpp's extension module holds. Parameters are passed as the library
fills them: their struct is opaque here, large enough for every version.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import sys
from ctypes import POINTER, c_bool, c_char_p, c_int32, c_void_p, create_string_buffer
from pathlib import Path
from typing import Any

MOST_BYTES_OF_A_TOKEN = 64


class Parameters(ctypes.Structure):
    """llama_model_params, whatever is in it: more than 16 bytes are passed and returned in memory."""

    _fields_ = (("bytes", ctypes.c_char * 1024),)


def library(folder: str | None) -> Any:
    """The C functions of the llama.cpp inside xllamacpp."""
    if folder is not None:
        sys.path.insert(0, folder)
    package = importlib.util.find_spec("xllamacpp")
    if package is None or package.origin is None:
        raise SystemExit("xllamacpp is not installed")
    llama = ctypes.CDLL(str(next(Path(package.origin).parent.glob("xllamacpp*.so"))))
    returns: dict[str, tuple[Any, list[Any]]] = {
        "llama_model_default_params": (Parameters, []),
        "llama_model_load_from_file": (c_void_p, [c_char_p, Parameters]),
        "llama_model_get_vocab": (c_void_p, [c_void_p]),
        "llama_vocab_n_tokens": (c_int32, [c_void_p]),
        "llama_vocab_get_text": (c_char_p, [c_void_p, c_int32]),
        "llama_vocab_is_eog": (c_bool, [c_void_p, c_int32]),
        "llama_vocab_get_add_bos": (c_bool, [c_void_p]),
        "llama_vocab_bos": (c_int32, [c_void_p]),
        "llama_vocab_eos": (c_int32, [c_void_p]),
        "llama_vocab_eot": (c_int32, [c_void_p]),
        "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
        "llama_detokenize": (c_int32, [c_void_p, POINTER(c_int32), c_int32, c_char_p, c_int32, c_bool, c_bool]),
    }
    for name, (result, arguments) in returns.items():
        function = getattr(llama, name)
        function.restype, function.argtypes = result, arguments
    return llama


def quiet(llama: Any) -> Any:
    """Take the library's log away; what is returned must be kept alive."""
    silent = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)(lambda level, text, data: None)
    llama.llama_log_set.restype, llama.llama_log_set.argtypes = None, [c_void_p, c_void_p]
    llama.llama_log_set(ctypes.cast(silent, c_void_p), None)
    return silent


def tokenize(llama: Any, vocabulary: Any, text: str, *, bos: bool, special: bool) -> list[int]:
    """The ids of one text; a negative count from the library is a fault of ours."""
    data = text.encode()
    room = len(data) + 8
    ids = (c_int32 * room)()
    count = llama.llama_tokenize(vocabulary, data, len(data), ids, room, bos, special)
    assert count >= 0, (text, count)
    return list(ids[:count])


def detokenize(llama: Any, vocabulary: Any, ids: list[int]) -> str:
    """The text of ids as llama.cpp shows an answer: without control tokens."""
    room = MOST_BYTES_OF_A_TOKEN * len(ids) + 8
    text = create_string_buffer(room)
    count = llama.llama_detokenize(vocabulary, (c_int32 * len(ids))(*ids), len(ids), text, room, False, False)
    assert count >= 0, count
    return text.raw[:count].decode(errors="replace")


def main() -> None:
    """Command line: see the top of this file."""
    asked = json.load(sys.stdin)
    llama = library(sys.argv[2] if len(sys.argv) > 2 else None)
    kept = quiet(llama)
    model = llama.llama_model_load_from_file(sys.argv[1].encode(), llama.llama_model_default_params())
    if not model:
        raise SystemExit(f"{sys.argv[1]}: llama.cpp cannot load it")
    vocabulary = llama.llama_model_get_vocab(model)
    options = {"bos": bool(asked.get("bos")), "special": bool(asked.get("special"))}
    ids = [tokenize(llama, vocabulary, text, **options) for text in asked["texts"]]
    tokens = range(llama.llama_vocab_n_tokens(vocabulary))
    ends = {id: llama.llama_vocab_get_text(vocabulary, id) for id in tokens if llama.llama_vocab_is_eog(vocabulary, id)}
    answer = {
        "ids": ids,
        "decoded": [detokenize(llama, vocabulary, one) for one in ids],
        "ends": {str(id): text.decode() for id, text in ends.items()},
        "add_bos": bool(llama.llama_vocab_get_add_bos(vocabulary)),
        "bos": llama.llama_vocab_bos(vocabulary),
        "eos": llama.llama_vocab_eos(vocabulary),
        "eot": llama.llama_vocab_eot(vocabulary),
    }
    json.dump(answer, sys.stdout)
    del kept


if __name__ == "__main__":
    main()
