"""Variants, and what held-out text says of them, on disk: found by what they were made of, so that nothing is
quantized or scored twice."""

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

from impq_core.errors import ImpqError
from impq_core.files import replace_file, write_text
from impq_core.keys import VariantsKey
from impq_core.model.demo import cache_folder
from impq_core.space import Choice, LinearSpec

if TYPE_CHECKING:
    from impq_core.interfaces import Variant


@dataclass(frozen=True)
class Shelf:
    """The variants of one model by one backend, a file for each linear at each width, and facts about them.

    Args:
        folder: where they are.
        about: all that decides what they are: model, backend, options, calibration, code.
    """

    folder: Path
    about: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(file.stat().st_size for file in self.folder.iterdir() if file.exists())

    @property
    def count(self) -> int:
        """Variants on it."""
        return sum(1 for _ in self.folder.glob("*.safetensors"))

    @property
    def facts(self) -> int:
        """Facts on it."""
        return sum(1 for _ in self.folder.glob("*.json")) - 1  # about.json is none

    @property
    def used(self) -> float:
        """When it was used last, in seconds since the epoch."""
        return (self.folder / "about.json").stat().st_mtime

    def get(self, linear: LinearSpec, choice: Choice) -> Variant | None:
        """The variant; None where it is not here, or damaged, which is said in a warning."""
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
                raise ValueError("its bytes are not those that were written")
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            warnings.warn(f"{path} is damaged and made anew: {' '.join(str(error).split())[:120]}", RuntimeWarning,
                          stacklevel=2)
            return None
        return Variant(choice, tensors, facts["record"])

    def put(self, linear: LinearSpec, variant: Variant) -> None:
        """Keep a variant, whole or not at all; a disk that does not take it is a warning."""
        from safetensors.torch import save

        tensors = {name: tensor.contiguous() for name, tensor in variant.tensors.items()}
        facts = json.dumps({"record": dict(variant.record), "sha256": _digest(tensors)})
        self._write(self._file(linear, variant.choice), save(tensors, metadata={"impq": facts}))

    def recall(self, name: str) -> dict[str, Any] | None:
        """What was remembered under a name; None where nothing was, or it is damaged, which is said in a warning."""
        path = self.folder / f"{name}.json"
        try:
            kept = json.loads(path.read_text())
            if kept["sha256"] != _digest_of(kept["fact"]):
                raise ValueError("it is not what was written")
        except FileNotFoundError:
            return None
        except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
            warnings.warn(f"{path} is damaged and made anew: {' '.join(str(error).split())[:120]}", RuntimeWarning,
                          stacklevel=2)
            return None
        found: dict[str, Any] = kept["fact"]
        return found

    def remember(self, name: str, fact: Mapping[str, Any]) -> None:
        """Keep plain data about the variants, whole or not at all; a disk that does not take it is a warning."""
        self._write(self.folder / f"{name}.json",
                    json.dumps({"fact": fact, "sha256": _digest_of(fact)}).encode())

    def _write(self, path: Path, data: bytes) -> None:
        try:
            if not (self.folder / "about.json").exists():  # without it nobody would list or delete the shelf
                self.folder.mkdir(parents=True, exist_ok=True)
                write_text(self.folder / "about.json", json.dumps(self.about, indent=1) + "\n")
            replace_file(path, data)
        except OSError as error:
            warnings.warn(f"variants are not kept for another time: {self.folder}: {error.strerror}", RuntimeWarning,
                          stacklevel=3)

    def touch(self) -> None:
        """Remember that it is in use."""
        with suppress(OSError):  # nothing is kept yet, or the cache is read only
            os.utime(self.folder / "about.json")

    def remove(self) -> None:
        """Delete it all; raises ImpqError where the disk refuses."""
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
    """All there are, those used last first; raises ImpqError where there is no cache."""
    found = []
    for file in (cache_folder() / "variants").glob("*/about.json"):
        try:
            about = json.loads(file.read_text())
        except (OSError, ValueError, RecursionError):
            about = {}
        found.append(Shelf(file.parent, about if isinstance(about, dict) else {}))
    return sorted(found, key=lambda shelf: -shelf.used)


def _digest_of(fact: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fact, sort_keys=True).encode()).hexdigest()


def _digest(tensors: Mapping[str, Any]) -> str:
    import torch

    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()
