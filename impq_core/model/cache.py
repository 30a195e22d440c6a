"""Cache of variants and held-out scores on disk, keyed by everything that determines them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from impq_core.errors import ImpqError, one_line
from impq_core.files import replace_file, write_text
from impq_core.keys import VariantsKey
from impq_core.model.demo import cache_folder
from impq_core.space import Choice, LinearSpec

if TYPE_CHECKING:
    from impq_core.interfaces import Variant

_DAMAGES = (OSError, KeyError, TypeError, ValueError)
"""Errors of reading a damaged file of a variant."""


ABOUT = "about.json"
"""The file of a shelf with the key of its variants."""

FORMAT = "impq-variants/1"
"""Format in that file. impq lists and deletes only folders with it."""

KEYS_BEFORE_FORMAT = frozenset({"model_digest", "dtype", "backend", "options", "versions", "code"})
"""Keys in the about.json of version 0.1, which wrote no format."""


@dataclass(frozen=True)
class Shelf:
    """Folder with the variants of one model by one backend, a file for each linear at each width, and held-out scores.

    Args:
        folder: the folder.
        about: everything that determines the variants: model, backend, options, calibration, code.
    """

    folder: Path
    about: Mapping[str, Any]

    @property
    def model(self) -> str:
        """The model's name."""
        return str(self.about.get("label") or self.about.get("model", ""))  # ``model`` in version 0.1

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(file.stat().st_size for file in self.folder.iterdir() if file.exists())

    @property
    def count(self) -> int:
        """Number of variants."""
        return sum(1 for _ in self.folder.glob("*.safetensors"))

    @property
    def facts(self) -> int:
        """Number of held-out scores."""
        return sum(1 for _ in self.folder.glob("*.json")) - 1  # without about.json

    @property
    def used(self) -> float:
        """Time of the last use, seconds since the epoch."""
        return (self.folder / ABOUT).stat().st_mtime

    def get(self, linear: LinearSpec, choice: Choice) -> Variant | None:
        """The variant; None if it is missing or damaged. A damaged one gives a warning."""
        path = self._file(linear, choice)
        if not path.exists():
            return None
        try:
            variant, digest = _open(path, choice)
            if digest != _digest(variant.tensors):
                raise ValueError("its digest does not match its content")
        except _DAMAGES as error:
            warnings.warn(f"{path} is damaged and made anew: {one_line(error, 120)}", RuntimeWarning,
                          stacklevel=2)
            return None
        return variant

    def reopen(self, linear: LinearSpec, choice: Choice) -> Variant:
        """A variant that ``get`` or ``put`` has seen, mapped from its file, whose digest is not computed again.

        Raises:
            ImpqError: the file was deleted or damaged since.
        """
        try:
            return _open(self._file(linear, choice), choice)[0]
        except _DAMAGES as error:
            raise ImpqError(f"the variant of {linear.name} at {choice} bits in the cache was deleted or damaged while "
                            f"it was in use ({one_line(error, 120)}); run again, and it is made again") from error

    def put(self, linear: LinearSpec, variant: Variant) -> bool:
        """Keep a variant, whole or not at all. Returns whether it is kept; a disk error gives a warning."""
        from safetensors.torch import save

        tensors = {name: tensor.contiguous() for name, tensor in variant.tensors.items()}
        metadata = json.dumps({"record": dict(variant.record), "sha256": _digest(tensors)})
        return self._write(self._file(linear, variant.choice), save(tensors, metadata={"impq": metadata}))

    def recall(self, name: str) -> dict[str, Any] | None:
        """The data under a name; None if they are missing or damaged. Damaged data give a warning."""
        path = self.folder / f"{name}.json"
        try:
            stored = json.loads(path.read_text())
            if stored["sha256"] != _digest_of(stored["fact"]):
                raise ValueError("its digest does not match its content")
        except FileNotFoundError:
            return None
        except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
            warnings.warn(f"{path} is damaged and made anew: {one_line(error, 120)}", RuntimeWarning,
                          stacklevel=2)
            return None
        data: dict[str, Any] = stored["fact"]
        return data

    def remember(self, name: str, data: Mapping[str, Any]) -> None:
        """Keep plain data about the variants under a name, whole or not at all; a disk error gives a warning."""
        self._write(self.folder / f"{name}.json", json.dumps({"fact": data, "sha256": _digest_of(data)}).encode())

    def _write(self, path: Path, data: bytes) -> bool:
        try:
            if not (self.folder / ABOUT).exists():  # a shelf without it would never be listed or deleted
                self.folder.mkdir(parents=True, exist_ok=True)
                write_text(self.folder / ABOUT, json.dumps({"format": FORMAT, **self.about}, indent=1) + "\n")
            replace_file(path, data)
        except OSError as error:
            warnings.warn(f"variants are not kept for later runs: {self.folder}: {error.strerror}", RuntimeWarning,
                          stacklevel=3)
            return False
        return True

    def touch(self) -> None:
        """Record the time of this use."""
        with suppress(OSError):  # the shelf is still empty, or the cache is read-only
            os.utime(self.folder / ABOUT)

    def remove(self) -> None:
        """Delete the folder; raises ImpqError if impq did not make it, or if it cannot be deleted."""
        if _read_about(self.folder) is None:
            raise ImpqError(f"{self.folder} is not deleted: it has no {ABOUT} of impq")
        try:
            shutil.rmtree(self.folder)
        except OSError as error:
            raise ImpqError(f"{self.folder} cannot be deleted: {error.strerror}") from error

    def _file(self, linear: LinearSpec, choice: Choice) -> Path:
        return self.folder / f"{linear.name}.{choice}.{choice.group_size}.safetensors"


def shelf_for(key: VariantsKey) -> Shelf:
    """The shelf of the variants with a key, in the user's cache; raises ImpqError if there is no cache."""
    return Shelf(cache_folder() / "variants" / key.digest, key.to_dict())


def shelves() -> list[Shelf]:
    """All shelves of the user's cache, the last used first; raises ImpqError if the cache folder cannot be made.

    A shelf is a folder with an about.json of impq: with the format, or with the keys of version 0.1.
    """
    shelves = [Shelf(file.parent, about) for file in (cache_folder() / "variants").glob(f"*/{ABOUT}")
               if (about := _read_about(file.parent)) is not None]
    return sorted(shelves, key=lambda shelf: -shelf.used)


def _read_about(folder: Path) -> dict[str, Any] | None:
    """Content of a shelf's about.json; None if impq did not write it."""
    try:
        about = json.loads((folder / ABOUT).read_text())
        format = about.pop("format", None)
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return None
    return about if format == FORMAT or (format is None and about.keys() >= KEYS_BEFORE_FORMAT) else None


def _digest_of(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _open(path: Path, choice: Choice) -> tuple[Variant, str]:
    """The variant in a file, mapped, and the digest of its tensors that the file holds. Raises one of ``_DAMAGES``."""
    from safetensors import SafetensorError, safe_open

    from impq_core.interfaces import Variant

    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads(file.metadata()["impq"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    return Variant(choice, tensors, metadata["record"]), metadata["sha256"]


def _digest(tensors: Mapping[str, Any]) -> str:
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
