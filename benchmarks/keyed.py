"""Rows that are known by a key of facts, for benchmarks that measure more than plans."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lines import Lines

from impq_core.model.device import hardware
from impq_core.runs.prepare import Prepared


def facts_of(prepared: Prepared) -> dict[str, Any]:
    """A key for losses of a prepared run's models, as plain data: digests of the model and of the texts, the backend
    with all its options, the menu, the type of the forwards and the hardware. Versions of software are left out, as in
    ``rows.variants_of``."""
    config, calibration = prepared.config, prepared.calibration
    return {"model": prepared.source.digest, "calibration": calibration.digest if calibration else "",
            "evaluation": [text.digest for text in prepared.held_out], "backend": config.backend,
            "options": asdict(prepared.parts.backend.options), "dtype": config.dtype,
            "hardware": hardware(prepared.device),
            "menu": [[choice.name, choice.group_size] for choice in prepared.space.choices]}


class Keyed:
    """The rows of a file that have the same key; those of other keys stay in it.

    Args:
        path: of ``Lines``.
        key: plain data that decides the measurements.

    Raises:
        ImpqError: a line is no object.
    """

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        self._lines, self.key = Lines(path), _plain(key)

    def rows(self, **facts: Any) -> list[dict[str, Any]]:
        """The rows of the key that have these facts, in the order in which they were added."""
        wanted = {"key": self.key, **_plain(facts)}
        return [row for row in self._lines.rows if wanted.items() <= row.items()]

    def add(self, **row: Any) -> None:
        """Append a row and write it to the disk."""
        self._lines.add({"key": self.key, **_plain(row)})


def _plain(data: Mapping[str, Any]) -> dict[str, Any]:
    """The data as JSON gives them back."""
    return json.loads(json.dumps(data))  # type: ignore[no-any-return]
