"""Finished runs beside one another, as one object."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from impq_core.compare.contest import Contest
from impq_core.compare.read import gather
from impq_core.displayed import Displayed


@dataclass(frozen=True, eq=False)
class Comparison(Displayed):
    """Finished runs, grouped by model and held-out windows.

    Args:
        contests: the groups.
        notes: a line for each run that is left out.
    """

    contests: tuple[Contest, ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def read(cls, *paths: str | Path) -> Comparison:
        """Read finished runs.

        Args:
            paths: run folders, or folders that hold run folders; ``impq-runs`` by default.

        Raises:
            ImpqError: a folder is missing or holds no finished run, or no finished run can be used.
        """
        return cls(*gather(paths or ("impq-runs",)))

    def write_page(self, path: str | Path) -> None:
        """Write the page of ``impq compare``; raises ImpqError if the file cannot be written."""
        from impq_core.compare.html import write_page

        write_page(self.contests, Path(path))
