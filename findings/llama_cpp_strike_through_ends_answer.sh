#!/usr/bin/env bash
# llama.cpp (xllamacpp 2026.10.11549): the end tokens of a GGUF are also told by their text, and "</s>" is one. In
# Gemma's vocabulary "<s>" and "</s>" are ordinary pieces: the HTML tags of struck-through text. A GGUF that gives them
# as user defined text, as <h1> and all other tags, has "</s>" as an end of generation all the same: it is split when it
# is typed, and an answer stops where the tuned model closes <s>. transformers and SentencePiece take it for one token
# of text.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" --quiet --disable-pip-version-check install xllamacpp==2026.10.11549 gguf==0.19.0
cat > "$folder/write.py" <<'PYTHON'
import sys

import gguf
import numpy

tags, letters = ["<s>", "</s>", "<h1>", "</h1>"], list("xy<>/sh1▁")
control, text, byte, learned = (
    gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED, gguf.TokenType.BYTE, gguf.TokenType.NORMAL,
)  # fmt: skip
names = ["<pad>", "<eos>", "<bos>", "<unk>", *tags, *(f"<0x{value:02X}>" for value in range(256)), *letters]
writer = gguf.GGUFWriter(sys.argv[1], "gemma")
writer.add_context_length(64)
writer.add_embedding_length(8)
writer.add_block_count(1)
writer.add_feed_forward_length(8)
writer.add_head_count(1)
writer.add_head_count_kv(1)
writer.add_key_length(8)
writer.add_value_length(8)
writer.add_layer_norm_rms_eps(1e-6)
writer.add_tokenizer_model("llama")
writer.add_token_list(names)
writer.add_token_scores([0.0] * (len(names) - len(letters)) + [-float(place) for place in range(len(letters))])
writer.add_token_types([control] * 3 + [gguf.TokenType.UNKNOWN] + [text] * 4 + [byte] * 256 + [learned] * len(letters))
writer.add_pad_token_id(0)
writer.add_eos_token_id(1)
writer.add_bos_token_id(2)
writer.add_unk_token_id(3)
writer.add_add_space_prefix(False)
shapes = {"token_embd": (len(names), 8), "output_norm": (8,), "blk.0.attn_norm": (8,), "blk.0.ffn_norm": (8,)}
shapes |= {f"blk.0.attn_{part}": (8, 8) for part in ("q", "k", "v", "output")}
shapes |= {f"blk.0.ffn_{part}": (8, 8) for part in ("gate", "up", "down")}
for name, shape in shapes.items():
    writer.add_tensor(f"{name}.weight", numpy.zeros(shape, numpy.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
PYTHON
cat > "$folder/ask.py" <<'PYTHON'
import ctypes
import importlib.util
import sys
from ctypes import c_bool, c_char_p, c_int32, c_void_p
from pathlib import Path


class Parameters(ctypes.Structure):  # opaque, and large enough: the library fills it and takes it back
    _fields_ = (("bytes", ctypes.c_char * 1024),)


package = Path(importlib.util.find_spec("xllamacpp").origin).parent
llama = ctypes.CDLL(str(next(package.glob("xllamacpp*.so"))))
for name, (result, *arguments) in {
    "llama_model_default_params": (Parameters,),
    "llama_model_load_from_file": (c_void_p, c_char_p, Parameters),
    "llama_model_get_vocab": (c_void_p, c_void_p),
    "llama_vocab_n_tokens": (c_int32, c_void_p),
    "llama_vocab_get_text": (c_char_p, c_void_p, c_int32),
    "llama_vocab_is_eog": (c_bool, c_void_p, c_int32),
    "llama_tokenize": (c_int32, c_void_p, c_char_p, c_int32, c_void_p, c_int32, c_bool, c_bool),
}.items():
    getattr(llama, name).restype, getattr(llama, name).argtypes = result, arguments
model = llama.llama_model_load_from_file(sys.argv[1].encode(), llama.llama_model_default_params())
vocabulary = llama.llama_model_get_vocab(model)
names = [llama.llama_vocab_get_text(vocabulary, id).decode() for id in range(llama.llama_vocab_n_tokens(vocabulary))]


def pieces(text):
    ids = (c_int32 * 64)()
    count = llama.llama_tokenize(vocabulary, text.encode(), len(text.encode()), ids, 64, False, False)
    return [names[id] for id in ids[:count]]


ends = [name for id, name in enumerate(names) if llama.llama_vocab_is_eog(vocabulary, id)]
print(f"ends of generation: {ends}; x<s>y: {pieces('x<s>y')}; x</h1>y: {pieces('x</h1>y')}; x</s>y: {pieces('x</s>y')}")
assert pieces("x<s>y") == ["x", "<s>", "y"] and pieces("x</h1>y") == ["x", "</h1>", "y"]
assert ends == ["<eos>", "</s>"], f"the behaviour changed: ends of generation are {ends}"
assert pieces("x</s>y") == ["x", "<", "/", "s", ">", "y"], f"the behaviour changed: x</s>y is {pieces('x</s>y')}"
PYTHON
"$folder/venv/bin/python" "$folder/write.py" "$folder/small.gguf"
"$folder/venv/bin/python" "$folder/ask.py" "$folder/small.gguf" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
# seen: ends of generation: ['<eos>', '</s>']; x<s>y: ['x', '<s>', 'y']; x</h1>y: ['x', '</h1>', 'y']; x</s>y: ['x', '<', '/', 's', '>', 'y']
