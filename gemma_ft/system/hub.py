"""The hub: whether it answers, its snapshots and data sets, and what to tell a user when it does not give them."""

import functools
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gemma_ft.errors import DataError, UserError, first_line

CONNECT_SECONDS = 10
NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})(.*)")  # one of several files, as libraries number them
SERIES_NAMED = 3  # that a line names
NOT_REACHED = {"ConnectionError", "TransportError"}  # by name: the second is of the hub's own HTTP library


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def hub_reason(error: BaseException, name: str, *, kind: str, revision: str | None = None) -> str:
    """One line `name: what happened; what to do`, out of an exception of transformers, datasets or huggingface_hub.

    `kind` is "model" or "data set". The libraries wrap each other's errors, so the whole chain of causes is looked at.
    """
    names = {type(one).__name__ for one in _chain(error)}
    text = " ".join(str(one) for one in _chain(error)).lower()
    local = Path(name).exists()  # a folder's own name may hold any word
    page = f"https://huggingface.co/{'datasets/' if kind == 'data set' else ''}{name.partition(':')[0]}"
    if "GatedRepoError" in names or ("gated" in text and not local):
        return f"{name}: this {kind} is gated; accept its terms at {page}, then set HF_TOKEN or run `hf auth login`"
    if "RevisionNotFoundError" in names:
        return f"{name}: the {kind} has no revision {revision!r}; see {page}/tree/main"
    if names & {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectionError", "ConnectError", "ConnectTimeout"}:
        return f"{name}: not in the local cache and the hub cannot be reached; connect once, or name a local path"
    if ("connect" in text or "offline" in text) and not local:
        return f"{name}: not in the local cache and the hub cannot be reached; connect once, or name a local path"
    if names & {"RepositoryNotFoundError", "DatasetNotFoundError", "HfUriError", "HFValidationError"}:
        return f"{name}: no such {kind} on the hub, or it is private; check the name, or set HF_TOKEN"
    return f"{name}: the {kind} cannot be loaded: {first_line(error)}"


def not_reached(error: BaseException) -> bool:
    """Whether an error says that the hub could not be asked: refused, timed out, no such name, a proxy in between."""
    return bool({kind.__name__ for kind in type(error).__mro__} & NOT_REACHED)


@functools.cache  # a hub that does not answer delays a start once, whatever is asked of it afterwards
def ask_or_go_offline() -> None:
    """Ask the hub whether it is there; without an answer in CONNECT_SECONDS, huggingface_hub and datasets go into their
    own offline mode for the rest of this process, and take what is in the cache.

    Their client has no timeout: behind a firewall that swallows packets they wait for ever. The switch is their own,
    HF_HUB_OFFLINE, which they read from the environment at import, long before anybody knows.
    """
    from huggingface_hub import constants, get_session, is_offline_mode

    if is_offline_mode():
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=CONNECT_SECONDS)
    except Exception as error:
        if not not_reached(error):
            raise
        constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:
            import datasets

            datasets.config.HF_HUB_OFFLINE = datasets.config.HF_DATASETS_OFFLINE = True


def snapshot(name: str, *, revision: str | None, **wanted: Any) -> Path:
    """The local folder of a model on the hub, downloaded as far as it is not in the cache; `wanted`: as
    huggingface_hub.snapshot_download takes it.

    Raises: UserError in one line.
    """
    from huggingface_hub import snapshot_download

    try:
        if not wanted.get("local_files_only"):
            ask_or_go_offline()
        return Path(snapshot_download(name, revision=revision, **wanted))
    except Exception as error:  # the hub raises many kinds; each becomes one line for the user
        raise UserError(hub_reason(error, name, kind="model", revision=revision)) from error


def read_hub_records(
    source: str, *, split: str, revision: str | None, streaming: bool = False
) -> Iterator[dict[str, Any]]:
    """The rows of "owner/name" or "owner/name:config" on the hub, or without it in its local cache. `streaming`: they
    come one by one and are not put into the cache.

    Raises: DataError in one line: what is missing, and what to set.
    """
    import datasets
    from huggingface_hub import is_offline_mode

    name, _, config = source.partition(":")
    try:
        ask_or_go_offline()
        if is_offline_mode() or datasets.config.HF_HUB_OFFLINE:
            table = _cached(name, config or None, split, revision, streaming=streaming)
        else:
            more = {"streaming": True} if streaming else {}
            table = datasets.load_dataset(name, config or None, split=split, revision=revision, **more)
        yield from map(dict, table)  # of a stream each one may fail
    except DataError:
        raise
    except Exception as error:  # the library raises many kinds; each becomes one line for the user
        raise DataError(_hub_fault(error, source, name, split, revision)) from error


def _cached(name: str, config: str | None, split: str, revision: str | None, *, streaming: bool) -> Any:
    """The data set as it lies on this machine: a snapshot in the hub's cache, which is that of the revision, else what
    `datasets` has prepared in its own.

    Source: huggingface_hub 2.4.0 snapshot_download; datasets 5.2.0 load.CachedDatasetModuleFactory, which knows nothing
    of the first and takes the newest of the second, of whatever revision.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    kept: Exception | None = None  # raised outside of `except`: causes are read for what to tell
    try:
        folder = snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True)
        return _of_snapshot(name, Path(folder), config, split, streaming=streaming)
    except (LocalEntryNotFoundError, FileNotFoundError):  # none, or without rows: its card alone, say
        pass
    except Exception as error:
        kept = error
    try:
        return _prepared(name, config, split, revision)
    except Exception as error:
        kept = kept or error
    raise kept


def _of_snapshot(name: str, folder: Path, config: str | None, split: str, *, streaming: bool) -> Any:
    import datasets

    of_split = datasets.load_dataset_builder(str(folder), config).config.data_files or {}
    short = missing_shards(of_split.get(split.partition("[")[0], ()))
    if short:
        raise DataError(f"{name}: the local cache holds only {short.replace(f'{folder}/', '')}; download the rest")
    return datasets.load_dataset(str(folder), config, split=split, streaming=streaming)


def _prepared(name: str, config: str | None, split: str, revision: str | None) -> Any:
    import datasets

    table = datasets.load_dataset(name, config, split=split, revision=revision)
    files = " ".join(table.info.download_checksums or ())
    commits = set(re.findall(rf"hf://datasets/{re.escape(name)}@([0-9a-f]{{40}})/", files))
    if revision not in (None, "main") and not all(one.startswith(str(revision)) for one in commits):
        (known, *_) = sorted(commits)
        raise DataError(f"{name}: revision {revision!r} is not in the local cache, which has {known}; connect once")
    return table


def _hub_fault(error: Exception, source: str, name: str, split: str, revision: str | None) -> str:
    text = " ".join(str(error).split())
    if "Config name is missing" in text or ("BuilderConfig" in text and "not found" in text):
        configs = re.search(r"(?:available configs|Available): (\[[^\]]*\])", text)
        known = f"; it has {configs[1]}" if configs else ""
        return f"{source}: name one of its configurations, as {name}:CONFIG{known}"
    if "Unknown split" in text or "Bad split" in text:
        splits = re.search(r"(\[[^\]]*\])", text)
        return f"{source}: no split {split!r}{'; it has ' + splits[1] if splits else ''}; set the source's split"
    return hub_reason(error, source, kind="data set", revision=revision)


def missing_shards(names: Iterable[str]) -> str:
    """Of files numbered -00000-of-00003: which series is not whole, and by how much; "" where all are."""
    series: dict[tuple[str, ...], set[str]] = {}
    for name in names:
        if found := NUMBERED.fullmatch(name):
            series.setdefault((found[1], found[3], found[4]), set()).add(found[2])
    short = [(key, len(seen)) for key, seen in sorted(series.items()) if len(seen) < int(key[1])]
    return ", ".join(
        f"{seen} of the {int(total):,} files {start}-*" for (start, total, _), seen in short[:SERIES_NAMED]
    )
