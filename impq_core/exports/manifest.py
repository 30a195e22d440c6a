"""The manifest of an exported folder, and checks of folders. Imports nothing heavy."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from impq_core.errors import ImpqError
from impq_core.runs.folder import RunFolder

MANIFEST = "impq.json"
FORMAT = "impq-export/1"


def check_target(folder: Path) -> None:
    """Raises ImpqError if the folder holds files, or cannot be made."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ImpqError(f"the export folder {folder} is not empty: give another with --to")
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir():
        raise ImpqError(f"the export folder {folder} cannot be made: {above} is no folder")


def exports_in(run: Path) -> list[Path]:
    """The exported folders in a run's folder, by name; damaged ones are left out."""
    found = []
    for manifest in sorted(run.glob(f"*/{MANIFEST}")):
        with suppress(ImpqError):
            read_manifest(manifest.parent)
            found.append(manifest.parent)
    return found


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an exported folder: at least its exporter's name and its run's configuration.

    Raises:
        ImpqError: impq did not write the folder, or another impq did.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if not isinstance(manifest["exporter"], str) or not isinstance(manifest["run"], dict):
            raise TypeError("exporter and run")
        (folder / "plan.json").stat()
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ImpqError(f"{folder} is no folder that impq exported: its {MANIFEST} or plan.json is missing or "
                        "damaged") from error
    if manifest.get("format") != FORMAT:
        raise ImpqError(f"{folder} is of format {manifest.get('format')}; this impq reads {FORMAT}")
    return manifest  # type: ignore[no-any-return]


def folder_of(path: str | Path) -> Path:
    """The folder of a finished run or an exported folder, also by a file in it.

    Raises:
        ImpqError: the path is neither.
    """
    found = Path(path).expanduser()
    folder = found.parent if found.is_file() else found
    if (folder / MANIFEST).is_file():
        return folder
    if not (folder / "provenance.json").is_file():
        raise ImpqError(f"{path} is no run folder, and no folder that impq exported")
    return RunFolder.open(folder, "plan.json", "evaluation.json").path
