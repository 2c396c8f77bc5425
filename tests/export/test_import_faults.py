"""What is no whole GGUF file of a Gemma is refused in one line, at once, whatever it claims; nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_ft.errors import DiskError, UserError
from gemma_ft.export import hf_folder
from gemma_ft.export.gguf_import import import_gguf as import_module
from gemma_ft.export.gguf_import.import_gguf import import_gguf, plan_import
from gemma_ft.export.gguf_reader import read_gguf
from tests.export.files_to_import import exported, rewritten
from tests.export.tuned import TINY, names_in, save_base

gguf = pytest.importorskip("gguf", reason="the extra [gguf] is not installed")
Change = Callable[[dict[str, Any], dict[str, Any]], None]
AGAIN = "fetch it again"
TEXT, NUMBER = gguf.GGUFValueType.STRING, gguf.GGUFValueType.UINT32
REAL, LIST = gguf.GGUFValueType.FLOAT32, gguf.GGUFValueType.ARRAY
TOKENS, SCORES, KINDS = (f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Gemma as a q8_0 file."""
    return exported(TINY, tmp_path_factory.mktemp("tiny") / "tiny.gguf", "q8_0")


@pytest.fixture(scope="module")
def header(tiny: Path) -> int:
    """Bytes before the tensors."""
    return min(one.start for one in read_gguf(tiny).tensors.values())


def refusal(file: Path, tmp_path: Path, **options: Any) -> str:
    """What is said of a file, without its name; nothing may be written."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        import_gguf(file, tmp_path / "out", **options)
    assert sorted(tmp_path.rglob("*")) == before
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(f"{file}: ")


def key(name: str, value: Any, kind: Any, item: Any = None) -> Change:
    """Put a key into a file, or take it out (None)."""

    def change(fields: dict[str, Any], stored: dict[str, Any]) -> None:
        fields.pop(name, None)
        if value is not None:
            fields[name] = (value, kind, item)

    return change


def without(name: str) -> Change:
    def change(fields: dict[str, Any], stored: dict[str, Any]) -> None:
        del stored[name]

    return change


def tensor(name: str, data: np.ndarray, kind: str) -> Change:
    def change(fields: dict[str, Any], stored: dict[str, Any]) -> None:
        stored[name] = (data, gguf.GGMLQuantizationType[kind])

    return change


def token(id: int, text: str) -> Change:
    def change(fields: dict[str, Any], stored: dict[str, Any]) -> None:
        fields[TOKENS][0][id] = text

    return change


CURE = "convert the model again"
SIZES = ("num_hidden_layers 6, hidden_size 128, intermediate_size 512, num_attention_heads 4, num_key_value_heads 1, "
         "head_dim 32")  # fmt: skip


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (key("general.type", "adapter", TEXT), "an adapter, and no model; import the GGUF file of a whole model"),
        (key("general.type", "mmproj", TEXT),
         "the projector of a vision model, and no text model; import the other file"),
        (key("general.type", "imatrix", TEXT),
         "its general.type is 'imatrix'; import the GGUF file of a whole model"),
        (key("general.architecture", "clip", TEXT),
         "the projector of a vision model, and no text model; import the other file"),
        (key("general.architecture", "llama", TEXT),
         "its architecture is 'llama'; gemma, gemma2, gemma3 are imported"),
        (key("split.count", 3, gguf.GGUFValueType.UINT16),
         "one of 3 parts of a model; join them with llama-gguf-split --merge"),
        (key("gemma2.block_count", None, None), f"has no gemma2.block_count; {CURE}"),
        (key("gemma2.feed_forward_length", [512] * 5 + [256], LIST, NUMBER),
         f"gemma2.feed_forward_length is no size of all layers; {CURE}"),
        (key("gemma2.attention.head_count_kv", 1, NUMBER),
         f"no published Gemma 2 has {SIZES}; name the model's own config.json with --config"),
        (key("gemma2.attention.sliding_window", 128, NUMBER),
         "says gemma2.attention.sliding_window 128, not 64, as no published Gemma 2 of its size; name the model's own "
         "config.json with --config"),
        (key("gemma2.attn_logit_softcapping", 20.0, REAL),
         "says gemma2.attn_logit_softcapping 20, not 50, as no published Gemma 2 of its size; name the model's own "
         "config.json with --config"),
        (key("gemma2.rope.freq_base", 1e6, REAL),
         "says gemma2.rope.freq_base 1e+06, not 10000, as no published Gemma 2 of its size; name the model's own "
         "config.json with --config"),
        (key("gemma2.rope.scaling.factor", 8.0, REAL),
         "says gemma2.rope.scaling.factor 8, not 1, as no published Gemma 2 of its size; name the model's own "
         "config.json with --config"),
        (without("token_embd.weight"), f"has no tensor token_embd.weight (model.embed_tokens.weight); {CURE}"),
        (without("blk.5.ffn_up.weight"),
         f"has no tensor blk.5.ffn_up.weight (model.layers.5.mlp.up_proj.weight); {AGAIN}, or {CURE}"),
        (tensor("output.weight", np.zeros((2048, 128), np.float32), "F32"),
         "has 1 tensors that no Gemma 2 of its size has, output.weight among them; it is another model"),
        (tensor("blk.0.attn_k.weight", np.zeros((32, 128), np.float32), "F32"),
         "blk.0.attn_k.weight is [32, 128], the record asks for [64, 128]; it is another model"),
        (tensor("blk.0.attn_k.weight", np.zeros((64, 128 // 32 * 40), np.uint8), "Q8_1"),
         "blk.0.attn_k.weight is stored as Q8_1, which the package gguf cannot widen; convert the model to Q8_0 or "
         "F16"),
        (key("tokenizer.ggml.model", "gpt2", TEXT),
         "its tokenizer is 'gpt2', and no Gemma's; SentencePiece's ('llama') is imported"),
        (key("tokenizer.ggml.add_space_prefix", True, gguf.GGUFValueType.BOOL),
         "its tokenizer puts a space before a text, which no Gemma's does"),
        (key(SCORES, None, None), f"its tokenizer has no text, score and kind for each token; {CURE}"),
        (key(KINDS, [1] * 7, LIST, gguf.GGUFValueType.INT32),
         f"its tokenizer has no text, score and kind for each token; {CURE}"),
        (token(6, "<end>"), "not a Gemma tokenizer: it has no token <end_of_turn>"),
        (token(60, "x"), "not a Gemma tokenizer: it has no token <0x0C>"),
        (token(1000, "\u2581an"), f"damaged: two tokens are '\u2581an'; {AGAIN}"),
        (key("tokenizer.ggml.bos_token_id", 9999, NUMBER),
         f"tokenizer.ggml.bos_token_id is 9999, which is no token; {CURE}"),
        (key("tokenizer.ggml.eos_token_id", None, None), f"has no tokenizer.ggml.eos_token_id; {CURE}"),
    ],
)  # fmt: skip
def test_what_is_no_whole_gemma_is_refused(change: Change, line: str, tiny: Path, tmp_path: Path) -> None:
    assert refusal(rewritten(tiny, tmp_path / "x.gguf", change=change), tmp_path) == line


def test_another_format_a_folder_and_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04" * 9)
    (tmp_path / "empty.gguf").touch()
    for name, line in (
        ("x.gguf", "no GGUF file: it does not begin with GGUF"),
        ("empty.gguf", "no GGUF file: it does not begin with GGUF"),
        ("gone.gguf", "cannot be read: No such file or directory"),
        (".", "cannot be read: Is a directory"),
    ):
        assert refusal(tmp_path / name, tmp_path) == line


def patched(tiny: Path, out: Path, start: int, data: bytes) -> Path:
    content = bytearray(tiny.read_bytes())
    content[start : start + len(data)] = data
    out.write_bytes(content)
    return out


@pytest.mark.parametrize(
    ("start", "data", "line"),
    [
        (4, struct.pack(">I", 3), "a big-endian GGUF file; convert the model for little-endian machines"),
        (4, struct.pack("<I", 1), "version 1 of GGUF; versions 2 and 3 are read, convert the model again"),
        (8, struct.pack("<Q", 2**60), f"damaged: claims {2**60:,} tensors, for which it is too short; {AGAIN}"),
        (16, struct.pack("<Q", 2**60), f"damaged: claims {2**60:,} keys, for which it is too short; {AGAIN}"),
        (24, struct.pack("<Q", 2**60), f"cut short or damaged: a key would end behind its end; {AGAIN}"),
    ],
)
def test_what_a_header_claims_costs_nothing(start: int, data: bytes, line: str, tiny: Path, tmp_path: Path) -> None:
    file = patched(tiny, tmp_path / "x.gguf", start, data)
    tracemalloc.start()
    assert refusal(file, tmp_path) == line
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("kind", [struct.pack("<I", 8), struct.pack("<I", 4)], ids=["texts", "numbers"])
def test_a_list_of_any_length_costs_nothing(kind: bytes, tiny: Path, tmp_path: Path) -> None:
    place = tiny.read_bytes().index(TOKENS.encode()) + len(TOKENS) + 4
    file = patched(tiny, tmp_path / "x.gguf", place, kind + struct.pack("<Q", 2**60))
    assert TOKENS in refusal(file, tmp_path)


def test_a_file_cut_anywhere_is_refused(tiny: Path, header: int, tmp_path: Path) -> None:
    whole = tiny.read_bytes()
    cuts = random.Random(0).sample(range(4, header), 60) + random.Random(1).sample(range(header, len(whole) - 32), 20)
    for cut in cuts:
        (tmp_path / "x.gguf").write_bytes(whole[:cut])
        assert refusal(tmp_path / "x.gguf", tmp_path).endswith(AGAIN), cut


@pytest.mark.parametrize(("seed", "times"), [(20261130, 60), pytest.param(20261201, 250, marks=pytest.mark.slow)])
def test_damaged_bytes_of_a_header_are_a_line_or_nothing(
    tiny: Path, header: int, tmp_path: Path, seed: int, times: int
) -> None:
    """Of the counts and numbers, not the texts of tokens: one bit in any place."""
    chance = random.Random(seed)
    whole = tiny.read_bytes()
    lists = (whole.index(TOKENS.encode()), whole.index(b"tokenizer.ggml.bos"))
    places = [place for place in range(4, header) if not lists[0] + 60 < place < lists[1]]
    passed = 0
    for _ in range(times):
        content = bytearray(whole)
        content[chance.choice(places)] ^= 1 << chance.randrange(8)
        (tmp_path / "x.gguf").write_bytes(content)
        with contextlib.suppress(UserError):
            plan_import(tmp_path / "x.gguf", tmp_path / "out")
            passed += 1
    assert passed < 0.8 * times


def test_numbers_that_are_none_are_refused_and_nothing_is_left(tiny: Path, header: int, tmp_path: Path) -> None:
    place = read_gguf(tiny).tensors["blk.2.attn_norm.weight"].start
    file = patched(tiny, tmp_path / "x.gguf", place, struct.pack("<f", float("nan")))
    assert refusal(file, tmp_path) == "blk.2.attn_norm.weight holds NaN or infinity; fetch the file again"


def test_a_config_of_another_size_family_or_kind_is_refused(tiny: Path, tmp_path: Path) -> None:
    fields = json.loads((Path(TINY) / "config.json").read_text())
    config = tmp_path / "config.json"
    for text, line in (
        (json.dumps({**fields, "hidden_size": 256}), f"hidden_size is 256, but {tiny} has 128; name its own"),
        (json.dumps({**fields, "model_type": "gemma"}),
         "cannot be taken for --config: it is of a gemma, the file of a gemma2"),
        ("[]", "cannot be read as a config.json: it is no JSON object"),
    ):  # fmt: skip
        config.write_text(text)
        assert refusal(tiny, tmp_path, config=config).removeprefix(f"{config}: ") == line


def test_a_config_wins_over_the_file_and_it_is_told(tiny: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads((Path(TINY) / "config.json").read_text()), "sliding_window": 32}))
    found = import_gguf(tiny, tmp_path / "out", config=config)
    assert found.notes() == [f"the file says gemma2.attention.sliding_window 64, not 32; {config} was taken"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["sliding_window"] == 32


def test_what_is_there_already_stays(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert refusal(tiny, tmp_path) == f"{tmp_path}/out: exists already; choose another --out, or move it away"


def test_the_room_that_it_needs_is_told_first(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 10_000_000})
    monkeypatch.setattr(hf_folder.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DiskError) as error:
        import_gguf(tiny, tmp_path / "out")
    assert str(error.value) == (
        f"{tmp_path}/out: needs 0.0741 GB, its disk has 0.01 GB left; free some, or choose another --out"
    )


def test_an_interrupt_leaves_nothing(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module, "save_tokenizer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        import_gguf(tiny, tmp_path / "out")
    assert names_in(tmp_path) == []


def test_our_reader_finds_what_the_package_s_does(tiny: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "gemma-2b")
    for file in (tiny, exported(base, tmp_path / "1" / "x.gguf", "f16")):
        ours, theirs = read_gguf(file), gguf.GGUFReader(str(file))
        assert {one.name: (one.start, one.bytes, one.type) for one in ours.tensors.values()} == {
            one.name: (one.data_offset, one.n_bytes, one.tensor_type.name) for one in theirs.tensors
        }
        for name, field in theirs.fields.items():
            if name.startswith("GGUF."):
                continue
            found = ours.fields[name]
            assert (found.tolist() if isinstance(found, np.ndarray) else found) == field.contents(), name
