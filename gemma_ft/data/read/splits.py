"""Which split the files of a folder belong to: as its README.md, a saved data set or its files' names tell.

Source: datasets 5.2.0, data_files.py (SPLIT_PATTERN_SHARDED, ALL_DEFAULT_PATTERNS), utils/metadata.py
(MetadataConfigs), arrow_dataset.py and dataset_dict.py (save_to_disk). `choose` says where this differs: no file
is left out without a word.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gemma_ft.errors import DataError
from gemma_ft.system.hub import NUMBERED, missing_shards

DEFAULT, ALL = "train", "all"
KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
CARD, SAVED_DICT, SAVED = "README.md", "dataset_dict.json", "state.json"
NO_ROWS = {  # names of files that libraries write beside rows or a model
    *(SAVED_DICT, SAVED, "dataset_info.json", "dataset_infos.json", "config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "adapter_config.json"),
    *("model.safetensors.index.json", "chat_template.json", "trainer_state.json"),
}
BETWEEN = "[-._ 0-9]"  # what parts a keyword from the rest of a name
MAPPED = re.compile(r"(cache-|tmp)\w+\.arrow")  # what `Dataset.map` leaves beside the rows it was given
NAMED = 3  # files or splits that a line names


@dataclass(frozen=True)
class Folder:
    """What lies below a folder: the names of its files relative to it, and how one of them is read."""

    names: Sequence[str]
    read: Callable[[str], bytes]

    def below(self, place: str) -> Folder:
        """A folder in it, with names relative to that."""
        start = f"{place.removeprefix('./').rstrip('/')}/" if place.strip("./") else ""
        names = [name.removeprefix(start) for name in self.names if name.startswith(start)]
        return Folder(names, lambda name: self.read(start + name))

    def told(self, name: str) -> Any:
        """What a file of JSON says; None where it is not there or is none."""
        try:
            return json.loads(self.read(name)) if name in self.names else None
        except ValueError:
            return None


@dataclass(frozen=True)
class Splits:
    """Names of files by split. `sure`: told by a list or by numbers, not by a word in a name."""

    files: Mapping[str, Sequence[str]]
    sure: bool


@dataclass(frozen=True)
class Choice:
    """The files that are read, and what a user is told of those that are not ("" where there are none)."""

    names: Sequence[str]
    told: str = ""
    parted: bool = False  # whether any file is left out


def rows_in(folder: Folder, is_rows: Callable[[str], bool]) -> list[str]:
    """The names of the files that hold rows, sorted: without what libraries write beside them."""
    kept = [name for name in folder.names if is_rows(name) and posixpath.basename(name) not in NO_ROWS]
    saved = {posixpath.dirname(name) for name in folder.names if posixpath.basename(name) == SAVED}
    written = {place: _written(folder.told(posixpath.join(place, SAVED))) for place in saved}

    def is_saved(name: str) -> bool:
        place, base = posixpath.split(name)
        listed = written.get(place)
        return not MAPPED.fullmatch(base) and (listed is None or not base.endswith(".arrow") or base in listed)

    return sorted(name for name in kept if is_saved(name))


def choose(where: str, folder: Folder, rows: Sequence[str], split: str, config: str | None) -> Choice:
    """The files of `rows` (see rows_in) that belong to a split, or to "all". A folder whose files name no split is read
    whole; so is one that names a single split by a word, when that is the one asked for or there is nothing else.

    Raises: DataError, beginning with `where`, for a split or configuration that is not there.
    """
    found = _splits(where, folder, rows, config)
    if found is None:
        if split not in (DEFAULT, ALL):
            raise DataError(f"{where}: no split {split!r}; its files name none: leave the source's split out")
        return Choice(rows)
    if split == ALL:
        names = sorted({name for files in found.files.values() for name in files}) if found.sure else rows
        return Choice(names, f"splits {', '.join(found.files)}, all read" + _missing(names))
    rest = sorted(set(rows).difference(*found.files.values()))
    if not found.sure and split == DEFAULT:
        whole = _read_whole(list(found.files), rest)
        if whole is not None:
            return Choice(rows, "; ".join(filter(None, [whole, missing_shards(rows)])))
    if split not in found.files:
        cure = f"set the source's split{'' if found.sure else f', or split: {ALL} for every file in it'}"
        raise DataError(f"{where}: no split {split!r}; it has {', '.join(found.files)}; {cure}")
    return _chosen(found, split, rest)


def choose_whole(rows: Sequence[str]) -> Choice:
    """All of the files that somebody asked for by a pattern; when their names tell several splits, that is said."""
    found = _of_names(rows)
    several = found is not None and len(found.files) > 1
    return Choice(rows, f"splits {', '.join(found.files)}, all read" if found and several else "")


def _read_whole(splits: Sequence[str], rest: Sequence[str]) -> str | None:
    """What to say of a folder whose names tell no training rows from others: all is read; None where they do."""
    if splits == [DEFAULT]:
        return ""
    if not set(splits) & set(KEYWORDS):
        return f"splits {', '.join(splits)}, all read" if len(splits) > 1 or rest else ""
    if len(splits) == 1 and not rest:
        return f"its files are named as split {splits[0]}, and are all read"
    return None


def _chosen(found: Splits, split: str, rest: Sequence[str]) -> Choice:
    names = sorted(found.files[split])
    left = {name: set(files).difference(names) for name, files in found.files.items()}
    others = [f"{name} ({_files(len(files))})" for name, files in left.items() if files]
    others += rest[:NAMED]
    if len(rest) > NAMED:
        others.append(f"{_files(len(rest) - NAMED)} more")
    told = f"split {split} ({_files(len(names))})" + _missing(names)
    return Choice(names, f"{told}; not read: {', '.join(others)}" if others else told, parted=bool(others))


def _files(count: int) -> str:
    return f"{count:,} file{'s' * (count != 1)}"


def _missing(names: Iterable[str]) -> str:
    short = missing_shards(names)
    return f"; {short}" if short else ""


def _splits(where: str, folder: Folder, rows: Sequence[str], config: str | None) -> Splits | None:
    """The splits of a folder; None where nothing tells them."""
    configs = _configurations(where, folder)
    if config is not None or configs:
        return _of_card(where, folder, rows, configs, config)
    saved = folder.told(SAVED_DICT)
    if isinstance(saved, dict) and isinstance(saved.get("splits"), list):
        parts = {str(one): [name for name in rows if name.startswith(f"{one}/")] for one in saved["splits"]}
        return _some(parts, sure=True)
    return _of_names(rows)


def _of_names(rows: Sequence[str]) -> Splits | None:
    """The splits that the names of files tell; None where they tell none."""
    numbered: dict[str, list[str]] = {}
    for name in rows:
        place, base = posixpath.split(name)
        if place == "data" and (found := NUMBERED.fullmatch(base)):
            numbered.setdefault(found[1], []).append(name)
    if numbered:
        return _some(numbered, sure=bool(_by_words([f"{split}-" for split in numbered], of_folders=False)))
    of_folders = _by_words(rows, of_folders=True)
    rest = sorted(set(rows).difference(*of_folders.values()))
    return _some({**_by_words(rest, of_folders=False), **of_folders}, sure=False)


def _some(files: Mapping[str, Sequence[str]], *, sure: bool) -> Splits | None:
    known = [split for split in KEYWORDS if files.get(split)]
    order = known + sorted(split for split in files if split not in known and files[split])
    return Splits({split: files[split] for split in order}, sure) if order else None


def _by_words(rows: Sequence[str], *, of_folders: bool) -> dict[str, list[str]]:
    """Files by the keyword in their own name, or in that of a folder they lie in; a folder that is named for several
    splits (train_test_split) tells none.
    """
    end = f"({BETWEEN}.*)?" if of_folders else f"{BETWEEN}.*"
    patterns = {
        split: re.compile(f"(.*{BETWEEN})?({'|'.join(words)}){end}", re.S | re.I) for split, words in KEYWORDS.items()
    }
    found: dict[str, list[str]] = {}
    for name in rows:
        *folders, base = name.split("/")
        for part in folders if of_folders else [base]:
            told = [split for split, pattern in patterns.items() if pattern.fullmatch(part)]
            for split in told if len(told) == 1 or not of_folders else ():
                found.setdefault(split, []).append(name)
    return {split: list(dict.fromkeys(files)) for split, files in found.items()}


# Configurations in a card


def _configurations(where: str, folder: Folder) -> dict[str, dict[str, Any]]:
    """The `configs` of a data set's card by name; none where it has none."""
    import yaml

    if CARD not in folder.names:
        return {}
    text = folder.read(CARD).decode("utf-8", "replace").lstrip("\ufeff")
    head = re.match(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.S)
    try:
        said = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError as error:
        raise DataError(f"{where}: the head of its {CARD} is not valid YAML; mend it, or name the files") from error
    configs = said.get("configs") if isinstance(said, dict) else None
    if not configs:
        return {}
    if not (isinstance(configs, list) and all(isinstance(one, dict) and "config_name" in one for one in configs)):
        raise DataError(f"{where}: 'configs' in its {CARD} is no list of named configurations; mend it")
    return {str(one["config_name"]): one for one in configs}


def _of_card(
    where: str, folder: Folder, rows: Sequence[str], configs: Mapping[str, dict[str, Any]], config: str | None
) -> Splits | None:
    """The splits of a configuration: the one named, else the only one, the one marked so, or that named default."""
    marked = [name for name, one in configs.items() if one.get("default")]
    name = config or next(iter(marked or configs if len(configs) == 1 else marked or ["default"]))
    if name not in configs:
        known = f"it has {', '.join(configs)}" if configs else "it has none"
        what = f"no configuration {name!r}" if config else f"name one of its configurations, as {where}:CONFIG"
        raise DataError(f"{where}: {what}; {known}")
    said = configs[name]
    place = str(said.get("data_dir") or "").removeprefix("./").strip("/")
    inside = folder.below(place)
    start = f"{place}/" if place else ""
    own = [row.removeprefix(start) for row in rows if row.startswith(start)]
    if said.get("data_files") is None:
        found = _splits(where, replace(inside, names=[one for one in inside.names if one != CARD]), own, None)
        found = found or _some({DEFAULT: own}, sure=True)
    else:
        found = _some(
            {split: _matching(own, patterns) for split, patterns in _patterns(where, said["data_files"]).items()},
            sure=True,
        )
    if found is None:
        raise DataError(f"{where}: the files of configuration {name!r} in its {CARD} are not there; download them")
    return Splits({split: [start + one for one in files] for split, files in found.files.items()}, found.sure)


def _patterns(where: str, said: Any) -> dict[str, list[str]]:
    """Split -> patterns, of the forms that `data_files` has in a card."""
    listed = said if isinstance(said, list) else [said]
    if all(isinstance(one, dict) and {"split", "path"} <= set(one) for one in listed):
        paths = {str(one["split"]): one["path"] for one in listed}
        return {split: path if isinstance(path, list) else [path] for split, path in paths.items()}
    if all(isinstance(one, str) for one in listed):
        return {DEFAULT: listed}
    raise DataError(f"{where}: 'data_files' in its {CARD} is neither patterns nor splits with paths; mend it")


def _matching(rows: Sequence[str], patterns: Sequence[str]) -> list[str]:
    from fsspec.utils import glob_translate

    wanted = [re.compile(glob_translate(str(one).removeprefix("./"))) for one in patterns]
    return [name for name in rows if any(one.match(name) for one in wanted)]


def _written(state: Any) -> set[str] | None:
    """The files that a saved data set consists of; None where it does not say."""
    listed = state.get("_data_files") if isinstance(state, dict) else None
    if not isinstance(listed, list):
        return None
    return {str(one["filename"]) for one in listed if isinstance(one, dict) and "filename" in one}
