"""Trust: what a file may decide, and what only the command line may.

Files travel: an export's ``impq.json``, a run's ``impq.toml`` and an ``impq.toml`` in the working folder may come from
another person. They may name models, texts, parts and options. They may not permit code to run: that permission is
given on the command line (or by the calling script), for one command at a time, and is never written down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from impq_core.errors import UsageError

PERMISSIONS = {"trust_remote_code": "--trust-remote-code"}
"""Names that a file must not set, and the flag that gives the permission."""


@dataclass(frozen=True)
class Trust:
    """The permissions of one command.

    Args:
        remote_code: transformers may run modeling and tokenizer code that comes with the model.
    """

    remote_code: bool = False


NO_TRUST = Trust()
"""No code but that of installed packages and of ``--plugin`` files runs."""


def without_permissions(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A configuration file's data without permissions. A permission that is false is dropped: impq 0.1 wrote those.

    Raises:
        UsageError: the file gives a permission.
    """
    for name, flag in PERMISSIONS.items():
        if data.get(name):
            raise UsageError(f"{where}: {name} permits code to run, which only the command line may: delete the line "
                             f"and give {flag} if the model's code is trusted")
    return {name: value for name, value in data.items() if name not in PERMISSIONS}
