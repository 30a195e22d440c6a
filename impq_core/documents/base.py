"""The envelope of all documents, and documents as plain data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

SCHEMA = 1
"""Number of the schema. It rises if a name changes its meaning or disappears; new names may come without that."""


class Document:
    """Base of the documents that a command prints; derived classes are frozen dataclasses.

    Attributes:
        kind: name of the document's schema.
    """

    kind: ClassVar[str]


@dataclass(frozen=True)
class ErrorDocument:
    """An error.

    Args:
        type: ``usage`` (a wrong word in the command line or in the configuration), ``error`` (a file or the machine:
            the message says what to do), ``system`` (a disk or its permissions), ``stopped`` (Ctrl-C or SIGTERM) or
            ``bug``.
        message: what happened, on one line, as it stands on stderr.
        exit_code: of the process.
    """

    type: str
    message: str
    exit_code: int


def envelope(document: Document | ErrorDocument) -> str:
    """The JSON text of a document: its ``kind`` and its ``result``, or an ``error``, beside the versions of impq and of
    the schema."""
    head = {"impq": version("impq"), "schema": SCHEMA}
    body = ({"kind": "error", "error": plain(document)} if isinstance(document, ErrorDocument)
            else {"kind": document.kind, "result": plain(document)})
    return json.dumps({**head, **body}, indent=1, allow_nan=False, ensure_ascii=False)


def plain(value: Any) -> Any:
    """A document, or a part of one, as data for JSON; a number that is not finite is None."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(part) for part in value]
    return value
