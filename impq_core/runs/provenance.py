"""What decides a run's numbers, as digests and versions: enough to tell whether two losses may be held together."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from impq_core.interfaces import Part

LIBRARIES = ("torch", "transformers", "numpy")
"""Their versions go into every record."""


def versions(libraries: Iterable[str] = ()) -> dict[str, str]:
    """Versions of impq, of what every run computes with, and of further libraries by their import names."""
    names = [*LIBRARIES, *sorted(libraries)]
    return {"impq": importlib.metadata.version("impq"), **{name: _version(name) for name in names}}


def code_digest(*parts: Part | None) -> str:
    """Hex digest of impq's own source and that of the packages the parts come from."""
    return source_digest(type(part).__module__.split(".")[0] for part in parts if part)


def source_digest(packages: Iterable[str]) -> str:
    """Hex digest of impq's own source and that of further packages; "missing" where one is not there."""
    found = hashlib.sha256()
    for package in sorted({"impq_core", *packages}):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            return "missing"
        file = Path(spec.origin)
        for source in sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]:
            found.update(source.name.encode() + source.read_bytes())
    return found.hexdigest()[:16]


def digest_of(facts: Mapping[str, Any] | list[Any]) -> str:
    """Hex digest of plain data."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:  # imported under another name than it is installed under
        found = importlib.metadata.packages_distributions().get(library.split(".")[0], [""])
        return importlib.metadata.version(found[0]) if found[0] else "unknown"
