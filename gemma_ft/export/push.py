"""Upload of a finished export to the hub: private unless asked otherwise, its own files alone, in one commit."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from gemma_ft.data.encode.tokenizer import HUB_ID
from gemma_ft.errors import UserError
from gemma_ft.system.hub import ask_or_go_offline, hub_reason, not_reached

NOT_ALLOWED = (401, 403)
WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", "adapter_config.json")


def check_name(name: str) -> None:
    """Raises UserError for what is no name of a repository on the hub."""
    try:
        validate_repo_id(name)
        valid = HUB_ID.fullmatch(name) is not None
    except HFValidationError:
        valid = False
    if not valid:
        raise UserError(f"--push {name}: expected OWNER/NAME of letters, digits, '-', '_' and '.'")


def push(folder: Path, files: Sequence[str], name: str, *, public: bool = False, api: Any = None) -> str:
    """Upload `files` of `folder` to the model repository `name`, made when it is not there; returns its address.

    api: an HfApi; its default reads the token that the hub's own tools stored, or HF_TOKEN.
    Raises: UserError in one line: not allowed, not reachable, a public repository where a private one was asked for, or
    weights there that these would not replace.
    """
    check_name(name)
    api = api or HfApi()
    again = f"{folder} is complete: hf upload {name} {shlex.quote(str(folder))}{'' if public else ' --private'}"
    try:
        ask_or_go_offline()
        address = str(api.create_repo(name, repo_type="model", private=not public, exist_ok=True))
        _check_repository(api, name, files, public)
        operations = [CommitOperationAdd(path_in_repo=file, path_or_fileobj=str(folder / file)) for file in files]
        api.create_commit(name, operations, commit_message="Upload from gemma-ft export", repo_type="model")
    except UserError:
        raise
    except Exception as error:  # the hub raises many kinds; each becomes one line for the user
        raise UserError(f"{_reason(error, name)}; {again}") from error
    return address


def _check_repository(api: Any, name: str, files: Sequence[str], public: bool) -> None:
    info = api.repo_info(name, repo_type="model")
    if not public and info.private is False:
        raise UserError(f"{name}: is public on the hub; use --public to upload there, or another name")
    kept = sorted({one.rfilename for one in info.siblings or ()} - set(files))
    stale = [file for file in kept if file.endswith(WEIGHTS)]
    if stale and any(file.endswith(WEIGHTS) for file in files):
        raise UserError(
            f"{name}: holds {stale[0]}, which would stay beside these weights and be loaded in their place; "
            "delete it there, or use another name"
        )


def _reason(error: Exception, name: str) -> str:
    """One line on a failed upload, without its end."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    if isinstance(error, LocalTokenNotFoundError) or status in NOT_ALLOWED:
        return f"{name}: the hub does not let you write there; set HF_TOKEN to a token that may, or run `hf auth login`"
    if not_reached(error):
        return f"{name}: the hub cannot be reached"
    return hub_reason(error, name, kind="model").replace("cannot be loaded", "cannot be uploaded")
