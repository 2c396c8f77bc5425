"""A tokenizer.model made from a published tokenizer.json: the SentencePiece side of comparisons.

tokenizer.model itself lies in no package. Everything that SentencePiece needs is in tokenizer.json but the scores; of
learned pieces they fall with the id (checked by `published_order`), of all others they are 0.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, _, BYTE = range(1, 7)  # sentencepiece_model.proto, SentencePiece.Type
BPE = 2  # TrainerSpec.ModelType
BYTE_NAME = re.compile(r"<0x[0-9A-F]{2}>")
CONTROL_NAME = re.compile(  # by name: "[...]", "<?>" and "<_>" are learned pieces
    r"<(?:pad|eos|bos|mask|2mass|unused\d+|start_of_turn|end_of_turn|start_of_image)>|\[(?:@BOS@|toxicity=0)\]"
)
TAGS = (
    "table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td", "h1", "h2", "h3", "h4", "h5", "h6", "blockquote",
    "strong", "em", "b", "i", "u", "s", "sub", "sup", "code",
)  # fmt: skip
TEXT_TAGS = {f"<{slash}{tag}>" for tag in TAGS for slash in ("", "/")}


def vocabulary(tokenizer_json: Path) -> list[str]:
    """The names of tokenizer.json's tokens, by id."""
    spec = json.loads(tokenizer_json.read_text(encoding="utf-8"))
    ids = {**spec["model"]["vocab"], **{token["content"]: token["id"] for token in spec["added_tokens"]}}
    names = sorted(ids, key=ids.__getitem__)
    assert [ids[name] for name in names] == list(range(len(names)))
    return names


def kind_of(name: str) -> int:
    """SentencePiece's type of a token. Control tokens are CONTROL, so that no text becomes one."""
    if name == "<unk>":
        return UNKNOWN
    if BYTE_NAME.fullmatch(name):
        return BYTE
    if name == "\n" or name in TEXT_TAGS or (len(name) > 1 and not name.strip(name[0]) and name[0] in "\n\t▁"):
        return USER_DEFINED
    return CONTROL if CONTROL_NAME.fullmatch(name) else NORMAL


def rebuilt_model(tokenizer_json: Path, *, typed: bool = False) -> bytes:
    """The bytes of a tokenizer.model with the same ids as `tokenizer_json` (Gemma 1 or 2).

    typed: control tokens but pad, eos, bos and unk are found in a text, as in Google's own; without it no text becomes
    one. Byte pieces have their SentencePiece names: the one that tokenizer.json calls "\\t" is `<0x09>`.
    """
    names = vocabulary(tokenizer_json)
    if "<0x09>" not in names:
        names[names.index("\t")] = "<0x09>"
    kinds = [kind_of(name) for name in names]
    if typed:
        kinds = [USER_DEFINED if kind == CONTROL and id > 3 else kind for id, kind in enumerate(kinds)]
    first = kinds.index(NORMAL)
    model = sentencepiece_model_pb2.ModelProto()
    for id, (name, kind) in enumerate(zip(names, kinds, strict=True)):
        score = -float(id - first) if kind == NORMAL else 0.0
        model.pieces.add(piece=name, score=score, type=kind)
    trained: Any = model.trainer_spec
    trained.model_type, trained.vocab_size, trained.byte_fallback = BPE, len(names), True
    for role in ("pad", "eos", "bos", "unk"):
        setattr(trained, f"{role}_id", names.index(f"<{role}>"))
        setattr(trained, f"{role}_piece", f"<{role}>")
    rules: Any = model.normalizer_spec
    rules.name, rules.precompiled_charsmap = "identity", b""
    rules.add_dummy_prefix, rules.remove_extra_whitespaces, rules.escape_whitespaces = False, False, True
    return bytes(model.SerializeToString())


def processor(model: bytes) -> SentencePieceProcessor:
    """SentencePiece itself, with such a model."""
    return SentencePieceProcessor(model_proto=model)


def published_order(tokenizer_json: Path) -> bool:
    """Whether the merges of tokenizer.json make learned pieces in the order of their ids, as the scores here do."""
    spec = json.loads(tokenizer_json.read_text(encoding="utf-8"))
    ids = spec["model"]["vocab"]
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in spec["model"]["merges"]]
    made = dict.fromkeys(left + right for left, right in pairs)
    learned = [ids[name] for name in made if kind_of(name) == NORMAL]
    return learned == sorted(learned)
