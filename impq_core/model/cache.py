"""Cache of variants and held-out scores on disk, keyed by everything that decides them."""

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


ABOUT = "about.json"
"""The file of a shelf that says what its variants are made of."""

FORMAT = "impq-variants/1"
"""Format mark in it: impq lists and deletes only folders that have it."""

KEYS_BEFORE_FORMAT = frozenset({"model_digest", "dtype", "backend", "options", "versions", "code"})
"""Keys in the about.json of version 0.1, which wrote no mark."""


@dataclass(frozen=True)
class Shelf:
    """Folder with the variants of one model by one backend, a file for each linear at each width, and held-out scores.

    Args:
        folder: the folder.
        about: everything that decides the variants: model, backend, options, calibration, code.
    """

    folder: Path
    about: Mapping[str, Any]

    @property
    def model(self) -> str:
        """The model's name."""
        return str(self.about.get("label") or self.about.get("model", ""))  # version 0.1 called it model

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
        """The variant; None if it is missing, or damaged, which gives a warning."""
        from safetensors import SafetensorError, safe_open

        from impq_core.interfaces import Variant

        path = self._file(linear, choice)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads(file.metadata()["impq"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if facts["sha256"] != _digest(tensors):
                raise ValueError("its digest does not match its content")
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            warnings.warn(f"{path} is damaged and made anew: {one_line(error, 120)}", RuntimeWarning,
                          stacklevel=2)
            return None
        return Variant(choice, tensors, facts["record"])

    def put(self, linear: LinearSpec, variant: Variant) -> None:
        """Keep a variant, whole or not at all; a disk that refuses it gives a warning."""
        from safetensors.torch import save

        tensors = {name: tensor.contiguous() for name, tensor in variant.tensors.items()}
        facts = json.dumps({"record": dict(variant.record), "sha256": _digest(tensors)})
        self._write(self._file(linear, variant.choice), save(tensors, metadata={"impq": facts}))

    def recall(self, name: str) -> dict[str, Any] | None:
        """The data kept under a name; None if there is none, or it is damaged, which gives a warning."""
        path = self.folder / f"{name}.json"
        try:
            kept = json.loads(path.read_text())
            if kept["sha256"] != _digest_of(kept["fact"]):
                raise ValueError("its digest does not match its content")
        except FileNotFoundError:
            return None
        except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
            warnings.warn(f"{path} is damaged and made anew: {one_line(error, 120)}", RuntimeWarning,
                          stacklevel=2)
            return None
        fact: dict[str, Any] = kept["fact"]
        return fact

    def remember(self, name: str, fact: Mapping[str, Any]) -> None:
        """Keep plain data about the variants, whole or not at all; a disk that refuses it gives a warning."""
        self._write(self.folder / f"{name}.json",
                    json.dumps({"fact": fact, "sha256": _digest_of(fact)}).encode())

    def _write(self, path: Path, data: bytes) -> None:
        try:
            if not (self.folder / ABOUT).exists():  # without it the shelf is never listed or deleted
                self.folder.mkdir(parents=True, exist_ok=True)
                write_text(self.folder / ABOUT, json.dumps({"format": FORMAT, **self.about}, indent=1) + "\n")
            replace_file(path, data)
        except OSError as error:
            warnings.warn(f"variants are not kept for another time: {self.folder}: {error.strerror}", RuntimeWarning,
                          stacklevel=3)

    def touch(self) -> None:
        """Record the time of this use."""
        with suppress(OSError):  # nothing is kept yet, or the cache is read-only
            os.utime(self.folder / ABOUT)

    def remove(self) -> None:
        """Delete the folder; raises ImpqError if impq did not make it, or the disk refuses."""
        if _read_about(self.folder) is None:
            raise ImpqError(f"{self.folder} has no {ABOUT} of impq's: it is not deleted")
        try:
            shutil.rmtree(self.folder)
        except OSError as error:
            raise ImpqError(f"{self.folder} cannot be deleted: {error.strerror}") from error

    def _file(self, linear: LinearSpec, choice: Choice) -> Path:
        return self.folder / f"{linear.name}.{choice.bits:g}bits.{choice.group_size}.safetensors"


def shelf_for(key: VariantsKey) -> Shelf:
    """The shelf of the variants with a key, in the user's cache; raises ImpqError if there is no cache."""
    return Shelf(cache_folder() / "variants" / key.digest, key.to_dict())


def shelves() -> list[Shelf]:
    """All shelves of the user's cache, the last used first; raises ImpqError if the cache folder cannot be made.

    Only folders whose about.json has impq's format mark, or the keys that version 0.1 wrote without a mark.
    """
    shelves = [Shelf(file.parent, about) for file in (cache_folder() / "variants").glob(f"*/{ABOUT}")
               if (about := _read_about(file.parent)) is not None]
    return sorted(shelves, key=lambda shelf: -shelf.used)


def _read_about(folder: Path) -> dict[str, Any] | None:
    """Content of a shelf's about.json; None if it is not of impq's."""
    try:
        about = json.loads((folder / ABOUT).read_text())
        mark = about.pop("format", None)
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return None
    return about if mark == FORMAT or (mark is None and about.keys() >= KEYS_BEFORE_FORMAT) else None


def _digest_of(fact: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fact, sort_keys=True).encode()).hexdigest()


def _digest(tensors: Mapping[str, Any]) -> str:
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
