"""A tuned text model back in the multimodal folder that it was made from: each of the original's files as it is, with
the bytes of the tuned tensors in the place of the old ones.
"""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from gemma_ft.build.contract import CONTRACT, Contract
from gemma_ft.build.located import HUB_FILES, model_source
from gemma_ft.build.place import BaseFiles, Place, model_place
from gemma_ft.build.text_weights import others_fingerprint
from gemma_ft.build.weights import EMBEDDING, HEAD, TensorInfo, WeightFiles, dtype_name
from gemma_ft.data.encode.tokenizer import load_tokenizer
from gemma_ft.errors import UserError
from gemma_ft.export.merge.merged import MergedWeights
from gemma_ft.families.family import Composite
from gemma_ft.model.config_file import composite_in
from gemma_ft.recipe.run_files import FACTS

_BYTES = 2**24  # that are copied at a time
OTHER_CHATS = (
    "the chat template of the original is kept, and is not the one that was trained: chats are asked as the original's "
    "has them, and gemma_ft.json is left out"
)


@dataclass(frozen=True)
class Graft:
    """What a graft is made of. `files`: all tensors of the original, under the names in its files; `contract`: what is
    written beside them, None where the original's chat template is not what was trained.
    """

    original: BaseFiles
    composite: Composite
    weights: MergedWeights
    files: WeightFiles
    others_sha256: str
    contract: Contract | None

    @classmethod
    def of(cls, weights: MergedWeights, *, dtype: torch.dtype | None) -> Graft:
        """The graft of merged weights, or of those of a model that was tuned as a whole; nothing is written. `dtype`:
        what was asked for.

        Raises: UserError where they were not made from a multimodal folder that is here, and is as it was then; for a
        grown vocabulary, and a dtype.
        """
        if dtype is not None:
            raise UserError("--dtype: --graft keeps the dtypes of the original; leave one of them out")
        place = weights.place
        original = _original(place)
        composite = composite_in(original.folder)
        if composite is None or not original.weights.left:
            raise UserError(
                f"--graft: {original.source.name} holds a text model alone, with nothing beside it to be put back to; "
                "leave --graft out"
            )
        rows = original.weights.info(EMBEDDING).shape[0]
        if rows != weights.vocab_size:
            grown = f"from {rows:,} to {weights.vocab_size:,} tokens"
            raise UserError(
                f"--graft: the vocabulary grew {grown}, for which the original's config.json has no room; "
                "leave --graft out"
            )
        files = WeightFiles.open(original.folder)
        others = _checked(place, original)
        return cls(original, composite, weights, files, others, _contract(place, original.folder))

    @property
    def bytes(self) -> int:
        """What the weights weigh, all models of the folder."""
        return sum((self.files.folder / file).stat().st_size for file in self.files.shards)

    @property
    def notes(self) -> list[str]:
        """What a user should know of the result."""
        notes = [OTHER_CHATS] if self.contract is None and self.weights.place.contract is not None else []
        narrowed = sorted(
            {
                f"{dtype_name(self.weights.infos[native][0])} to {dtype_name(info.dtype)}"
                for _, info, native in self._replaced()
                if torch.finfo(self.weights.infos[native][0]).bits > torch.finfo(info.dtype).bits
            }
        )
        return notes + [f"weights are rounded from {one}, in which the original keeps them" for one in narrowed]

    def beside(self) -> list[Path]:
        """The original's other files: configs, tokenizer and what a processor reads."""
        patterns = [pattern for pattern in HUB_FILES if pattern != "*.safetensors"]
        return sorted(
            path
            for path in self.original.folder.iterdir()
            if path.is_file()
            and path.name not in (CONTRACT, FACTS)
            and any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns)
        )

    def facts(self) -> dict[str, Any]:
        """What merge.json says of a graft."""
        replaced = [name for name, _, _ in self._replaced()]
        return {
            "name": self.original.source.name,
            "revision": self.original.source.revision,
            "model_type": self.composite.model_type,
            "tensors": len(self.files.names),
            "replaced": len(replaced),  # the bytes of all others are the original's
            "bytes": self.bytes,
            "others_sha256": self.others_sha256,
            "checked": "text and others" if _knows_others(self.weights.place) else "text",
        }

    def write(self, folder: Path, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Write all files into `folder`; memory holds one tensor. Raises: UserError when one is not finite."""
        done, replaced = 0, {name: native for name, _, native in self._replaced()}
        for file, names in self.files.shards.items():
            with (self.files.folder / file).open("rb") as source, (folder / file).open("wb") as target:
                for name in names:
                    info = self.files.info(name)
                    if name in replaced:
                        _copy(source, target, info.start - source.tell())
                        target.write(_bytes(self._made(replaced[name], info)).numpy().data)
                        source.seek(info.start + info.bytes)
                    done += 1
                    if on_progress is not None:
                        on_progress(done, len(self.files.names))
                shutil.copyfileobj(source, target, _BYTES)
        self.write_beside(folder)

    def write_beside(self, folder: Path) -> None:
        """Write what lies beside the weights: the original's other files, and gemma_ft.json where that is kept to."""
        for path in self.beside():
            shutil.copyfile(path, folder / path.name)
        if self.contract is not None:
            self.contract.write(folder)

    def verify(self, folder: Path) -> None:
        """Read a written folder back: every tensor in its place, untouched ones equal to the original's, the others
        finite. Raises: UserError naming the first that is not.
        """
        written, replaced = WeightFiles.open(folder), {name for name, _, _ in self._replaced()}
        good = written.shards == self.files.shards
        lost = None if good else "the index"
        for name in self.files.names if good else ():
            one, other = self.files.info(name), written.info(name)
            same = replace(other, file=one.file) == one
            if same and name in replaced:
                same = bool(torch.isfinite(written.tensor(name)).all())
            elif same:
                same = torch.equal(_bytes(written.tensor(name)), _bytes(self.files.tensor(name)))
            lost = lost if same else lost or name
        if lost is not None:
            raise UserError(f"{lost} did not come back from the disk as it was written; check the disk and run again")

    def _replaced(self) -> Iterator[tuple[str, TensorInfo, str]]:
        """Tensors of the original that change: the name in its file, what it is, and which weight it becomes."""
        whole = not self.weights.adapters  # tuned as a whole, in a folder of its own
        for name in self.files.names:
            native = self.composite.native(name)
            native = EMBEDDING if native == HEAD else native
            if native in self.weights.infos and (whole or native in self.weights.changed):
                yield name, self.files.info(name), native

    def _made(self, native: str, info: TensorInfo) -> Tensor:
        made = self.weights.tensor(native).to(info.dtype)
        if not bool(torch.isfinite(made).all()):
            raise UserError(f"{native}: not finite in {info.dtype}, in which the original keeps it; leave --graft out")
        assert tuple(made.shape) == info.shape, f"{native} is not of the original's shape"
        return made


def _original(place: Place) -> BaseFiles:
    """The folder that a place was tuned from. Raises: UserError where it is not known, or not here."""
    if place.adapter is not None:
        return place.of_base
    if place.contract is None or place.contract.base is None or place.contract.base_sha256 is None:
        raise UserError(f"--graft: {place.base.name} does not say what it was tuned from ({CONTRACT}); name a run")
    try:
        source = model_source(place.contract.base, place.contract.revision)
    except UserError as error:
        raise UserError(f"--graft: the original that {place.base.name} was tuned from: {error}") from error
    return model_place(source).of_base


def _checked(place: Place, original: BaseFiles) -> str:
    """The fingerprint of the other models in the original. Raises: UserError where it is not the folder that the run
    was made from.
    """
    others = others_fingerprint(original.folder)
    assert others is not None, "all shards were opened"
    contract, name = place.contract, original.source.name
    found = original.unlike(contract)
    what, known = "text model", contract.base_sha256 if contract is not None else None
    if found is None and contract is not None and contract.others_sha256 not in (None, others):
        what, known, found = "vision tower", contract.others_sha256, others
    if found is not None:
        raise UserError(
            f"--graft: the {what} of {name} has fingerprint {found[:12]}, that of the run's base {str(known)[:12]} "
            f"({CONTRACT}); restore the base that it was trained on"
        )
    return others


def _knows_others(place: Place) -> bool:
    return place.contract is not None and place.contract.others_sha256 is not None


def _contract(place: Place, original: Path) -> Contract | None:
    """What is agreed with whoever serves the original's files with the tuned weights."""
    if place.contract is None:
        return None
    try:
        place.contract.encoder(load_tokenizer(str(original)), original)
    except UserError:
        return None
    return replace(place.contract, quantize=None, adapter_sha256=None)


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    while size > 0:
        block = source.read(min(size, _BYTES))
        assert block, "the header was checked against the length"
        target.write(block)
        size -= len(block)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
