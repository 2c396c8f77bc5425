"""Trains the tiny Gemma's tokenizer on its corpus and writes it as transformers and llama.cpp read it.

    python data/tiny_tokenizer.py CORPUS.jsonl FOLDER     # FOLDER is data/gemma-tiny

Settings are Gemma's: SentencePiece BPE, byte fallback, split digits, no normalization, no dummy prefix, and as
user-defined pieces <mask>, the turn tokens, runs of newlines and spaces, and HTML tags. Only the vocabulary is smaller.
"""

import argparse
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
from transformers import GemmaTokenizer

from gemma_ft.data.encode.tokenizer_model import settings_from_pieces
from tiny_words import MADE_UP

WANTED_PIECES = 2048
MARKUP = ("table", "tr", "td", "th", "b", "i", "p", "ul", "li", "code", "pre", "h1", "h2")


def user_defined_pieces() -> list[str]:
    """Pieces that are always kept whole, in the order of their ids; <mask> comes first and so gets id 4."""
    newlines = ["\n" * count for count in range(1, 9)]
    spaces = ["▁" * count for count in range(2, 9)]
    markup = [f"<{slash}{tag}>" for tag in MARKUP for slash in ("", "/")]
    return ["<mask>", "<start_of_turn>", "<end_of_turn>", *newlines, *spaces, *markup]


def corpus_texts(path: Path) -> Iterator[str]:
    """Every turn's text in a messages jsonl file but for made-up words, and the role names that the template adds.

    A made-up word that became one piece would be learned as a word; in pieces it can only be copied: its purpose.
    """
    yield "user"
    yield "model"
    with path.open(encoding="utf-8") as file:
        for line in file:
            for message in json.loads(line)["messages"]:
                yield MADE_UP.sub("", message["content"])


def train_pieces(texts: Iterable[str]) -> bytes:
    """A serialized SentencePiece model from texts. The pieces may be fewer than WANTED_PIECES: the corpus decides."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n") if line),
        model_writer=model,
        model_type="bpe",
        vocab_size=WANTED_PIECES,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=user_defined_pieces(),
        pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>", unk_piece="<unk>",
        num_threads=1,  # the same pieces on every machine
        minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def write_tokenizer(model: bytes, folder: Path) -> int:
    """The three tokenizer files in the folder from a SentencePiece model's bytes; returns the number of pieces.

    tokenizer.json is what Gemma 2's published one is to its tokenizer.model: merges by score, the tab under its own
    character where tokenizer.model has the byte piece, user-defined pieces as added tokens.

    No chat template is stored: like the published base models, this one gets it from the toolkit when it is tuned.
    Raises ValueError when transformers' tokenizer does not have exactly the model's pieces.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stale in ("tokenizer.json", "tokenizer_config.json"):
        (folder / stale).unlink(missing_ok=True)
    (folder / "tokenizer.model").write_bytes(model)  # save_pretrained drops it
    tokenizer = GemmaTokenizer.from_pretrained(folder, add_bos_token=True, **settings_from_pieces(folder))
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    stored = json.loads(settings.read_text(encoding="utf-8"))
    for local in ("vocab_file", "is_local", "local_files_only", "extra_special_tokens"):
        stored.pop(local, None)
    stored["add_bos_token"] = True  # without it transformers adds no BOS
    settings.write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
    if len(tokenizer) != pieces:
        raise ValueError(f"{folder}: transformers reads {len(tokenizer)} tokens where the model has {pieces} pieces")
    return pieces


def main() -> None:
    """Command line: see the top of this file."""
    parser = argparse.ArgumentParser(description="Train the tiny Gemma's tokenizer.")
    parser.add_argument("corpus", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    print(f"{options.folder}: {write_tokenizer(train_pieces(corpus_texts(options.corpus)), options.folder)} pieces")


if __name__ == "__main__":
    main()
