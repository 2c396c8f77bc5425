"""The tokenizer, and the one way that text becomes ids: by a copy of it that knows no control token.

Gemma's turn tokens are ordinary added tokens to transformers, so neither `add_special_tokens=False` nor
`split_special_tokens=True` keeps a typed "<start_of_turn>" from becoming the token. Here nothing typed can.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from gemma_ft.data.conversation import text_fault
from gemma_ft.data.encode.registered_tokens import lacks_tokens, register_tokens
from gemma_ft.data.encode.template import chat_of
from gemma_ft.data.encode.tokenizer_facts import BLANK_RUN, spells_control, tokenizer_facts
from gemma_ft.data.encode.tokenizer_files import LEGACY_TEMPLATE, VOCABULARIES, own_template
from gemma_ft.data.encode.tokenizer_model import settings_from_pieces
from gemma_ft.errors import DataError, UserError, first_line
from gemma_ft.system import environment
from gemma_ft.system.hub import snapshot

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
TOKENIZER_FILES = ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "*.jinja", LEGACY_TEMPLATE]
ADDED_BY_USER = "text_tokens"  # the setting of a tokenizer that names them


@dataclass(frozen=True)
class ControlIds:
    """The ids of the control tokens, by name from the tokenizer, never by number."""

    pad: int
    eos: int
    bos: int
    start_of_turn: int
    end_of_turn: int

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> "ControlIds":
        """The ids of a transformers tokenizer. Raises: UserError naming the tokens that it does not have."""
        return cls(*map(tokenizer.backend_tokenizer.token_to_id, chat_of(tokenizer).control_tokens))


class ContentEncoder:
    """Text -> ids in which no control token can occur, and text that decodes to the same text.

    Newline runs and HTML tags keep their own ids, and so do tokens that a user added (`add_tokens`). "\u2581" is
    SentencePiece's sign for a space and decodes as one.
    """

    def __init__(self, tokenizer: Any) -> None:
        backend = tokenizer.backend_tokenizer
        serialized = backend.to_str()
        facts = tokenizer_facts(serialized, _added_by_user(tokenizer), environment.cache_folder() / "tokenizers")
        self.sha256 = facts.sha256
        self.control_ids = frozenset(facts.control.values())
        shared = None if facts.spelled else _sharing(backend, set(facts.control))
        self._backend = shared or _without(json.loads(serialized), set(facts.control))

    def encode(self, text: str) -> list[int]:
        """The ids of one text. Raises: DataError when the text is not valid Unicode (half a surrogate pair)."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, all at once (the backend works on them in parallel). Raises: DataError as `encode`."""
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except (UnicodeEncodeError, TypeError) as error:
            raise DataError("the text holds half a surrogate pair; it was cut inside a character") from error
        ids: list[list[int]] = [encoding.ids for encoding in encodings]
        assert all(self.control_ids.isdisjoint(one) for one in ids), "a control token came out of plain text"
        return ids


def add_tokens(tokenizer: Any, names: Sequence[str]) -> None:
    """Give a tokenizer tokens of a user's: from then on a text that holds a name has that token in its place, whoever
    wrote it. So no name is a control token.

    Raises: UserError for a name that is no text, is there twice, or is a token already.
    """
    if not names:
        return
    known = tokenizer.get_vocab()
    control = tokenizer.convert_ids_to_tokens(sorted(ContentEncoder(tokenizer).control_ids))
    for place, name in enumerate(names):
        fault = text_fault(name)
        why = f"{name!r} {fault}" if fault else None
        if why is None and (name != name.strip() or BLANK_RUN.search(name)):
            why = f"{name!r} holds blanks; a token is found in a text by its exact characters, so write it without"
        if why is None and (name in names[:place] or name in known):
            why = f"{name!r} is a token already; take it out"
        if why is None and (inner := next((one for one in control if one in name), None)):
            why = f"{name!r} holds {inner}, which other libraries would find in it; choose another name"
        if why is not None:
            raise UserError(f"model.added_tokens: {why}")
    tokenizer.add_tokens([AddedToken(name, normalized=False, special=False) for name in names])
    tokenizer.init_kwargs[ADDED_BY_USER] = [*_added_by_user(tokenizer), *names]  # saved in tokenizer_config.json


def _added_by_user(tokenizer: Any) -> list[str]:
    """Names of `add_tokens`, now or before the tokenizer was saved; other added tokens are control tokens."""
    found, control = getattr(tokenizer, "init_kwargs", {}).get(ADDED_BY_USER, []), chat_of(tokenizer).control_tokens
    return [name for name in found if isinstance(name, str) and not any(one in name for one in control)]


def pieces_of(tokenizer: Any, names: Sequence[str]) -> list[list[int]]:
    """The ids that added tokens were before they were added: what their names are to the tokenizer without them."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    plain = _without(spec, {*names, *chat_of(tokenizer).control_tokens})
    return [encoding.ids for encoding in plain.encode_batch_fast(list(names), add_special_tokens=False)]


def _sharing(backend: Tokenizer, control: set[str]) -> Tokenizer | None:
    """What `_without` gives of a backend whose merges spell no control token, with the backend's own model instead of a
    second one (seconds and 200 MB for 256,000 pieces); None where ids would shift with the tokens that are left out.
    """
    plain = Tokenizer(backend.model)
    plain.normalizer, plain.pre_tokenizer, plain.decoder = backend.normalizer, backend.pre_tokenizer, backend.decoder
    kept = [(number, token) for number, token in sorted(backend.get_added_tokens_decoder().items())
            if token.content not in control]  # fmt: skip
    plain.add_tokens([token for _, token in kept])
    same = all(plain.token_to_id(token.content) == number for number, token in kept)
    return plain if same else None


def _without(spec: dict[str, Any], control: set[str]) -> Tokenizer:
    """The backend of a serialized tokenizer, with no control token among its added tokens or reachable by merges.

    Merges are generated from the vocabulary, so a chain of them may spell a control token or a byte piece ("<0x0A>").
    """
    spec = {**spec, "post_processor": None, "truncation": None, "padding": None}
    # a token's id is its place among those behind the vocabulary, so all of these are made part of the vocabulary
    behind = {token["content"]: token["id"] for token in spec["added_tokens"]}
    model = {**spec["model"], "vocab": behind | spec["model"]["vocab"]}
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in control]
    model["merges"] = [merge for merge in model.get("merges", []) if not spells_control(merge, control)]
    spec["model"] = model
    return Tokenizer.from_str(json.dumps(spec))


def load_tokenizer(path_or_hub_id: str, *, revision: str | None = None, trained_sha256: str | None = None) -> Any:
    """Gemma's fast transformers tokenizer from a folder (tokenizer.json or tokenizer.model) or a hub id.

    It adds BOS to plain text, pads on the right, and has a chat template: its own (of several the one named default),
    or ours where it has none (a base model tuned on chats must not be saved without one). Tokens that the first
    conversions of Gemma 1 have in the vocabulary alone are added tokens of it (`register_tokens`), unless
    `trained_sha256`, the ContentEncoder's sha256 of a finished training, says that they were none then.

    Raises: UserError in one line: no such folder, no tokenizer in it, not Gemma's, gated, or not reachable.
    """
    from transformers import GemmaTokenizer

    folder = _tokenizer_folder(path_or_hub_id, revision)
    pieces = settings_from_pieces(folder)
    try:
        tokenizer = GemmaTokenizer.from_pretrained(str(folder), add_bos_token=True, **pieces)
    except Exception as error:  # transformers raises many kinds; each becomes one line for the user
        raise UserError(f"{path_or_hub_id}: the tokenizer files cannot be read: {first_line(error)}") from error
    ControlIds.from_tokenizer(tokenizer)
    if lacks_tokens(tokenizer) and (trained_sha256 is None or ContentEncoder(tokenizer).sha256 != trained_sha256):
        register_tokens(tokenizer)
    tokenizer.init_kwargs.pop("vocab_file", None)  # a place on this machine, which would be saved with it
    tokenizer.padding_side = "right"
    tokenizer.chat_template = own_template(tokenizer, folder) or chat_of(tokenizer).text("fold")
    return tokenizer


def _tokenizer_folder(path_or_hub_id: str, revision: str | None) -> Path:
    """A local folder that holds the tokenizer's files, downloaded when the name is a hub id.

    transformers is not asked to download: where it finds no file, it makes a tokenizer of five tokens without a word.
    """
    folder = Path(path_or_hub_id)
    if not folder.is_dir():
        in_a_folder = len(folder.parts) > 1 and Path(folder.parts[0]).is_dir()
        if folder.exists() or in_a_folder or not HUB_ID.fullmatch(path_or_hub_id):
            what = "a file, not a folder" if folder.exists() else "no such folder"
            raise UserError(f"{path_or_hub_id}: {what}; name a folder with tokenizer files, or a hub id (owner/name)")
        folder = snapshot(path_or_hub_id, revision=revision, allow_patterns=TOKENIZER_FILES)
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise UserError(f"{path_or_hub_id}: there is no tokenizer.json or tokenizer.model in it")
    return folder
